// A label map from the PNG that the server sends: the palette's indices themselves, which a canvas does not give.
// Non-interlaced PNGs of 8 or 16 bits, one sample a pixel (https://www.w3.org/TR/png-3/).

export async function readLabels(buffer) {
  const view = new DataView(buffer);
  let place = 8;
  let width = 0;
  let height = 0;
  let bytes = 1;
  const packed = [];
  while (place < view.byteLength) {
    const length = view.getUint32(place);
    const kind = String.fromCharCode(...new Uint8Array(buffer, place + 4, 4));
    if (kind === "IHDR") {
      width = view.getUint32(place + 8);
      height = view.getUint32(place + 12);
      const depth = view.getUint8(place + 16);
      const colour = view.getUint8(place + 17);
      if (![8, 16].includes(depth) || ![0, 3].includes(colour) || view.getUint8(place + 20) !== 0) {
        throw new Error(`the labels came as a PNG of another kind (${depth} bits, colour type ${colour})`);
      }
      bytes = depth / 8;
    } else if (kind === "IDAT") {
      packed.push(new Uint8Array(buffer, place + 8, length));
    }
    place += length + 12;
  }
  const unpacked = new Blob(packed).stream().pipeThrough(new DecompressionStream("deflate"));
  const data = new Uint8Array(await new Response(unpacked).arrayBuffer());
  const rows = unfiltered(data, width * bytes, height, bytes);
  if (bytes === 1) return { width, height, labels: rows };
  const labels = new Uint16Array(width * height);
  for (let i = 0; i < labels.length; i++) labels[i] = (rows[2 * i] << 8) | rows[2 * i + 1];
  return { width, height, labels };
}

function unfiltered(data, line, height, bytes) {
  const out = new Uint8Array(line * height);
  for (let y = 0; y < height; y++) {
    const filter = data[y * (line + 1)];
    const from = y * (line + 1) + 1;
    const to = y * line;
    for (let x = 0; x < line; x++) {
      const left = x < bytes ? 0 : out[to + x - bytes];
      const above = y ? out[to + x - line] : 0;
      const corner = y && x >= bytes ? out[to + x - line - bytes] : 0;
      let guess = 0;
      if (filter === 1) guess = left;
      else if (filter === 2) guess = above;
      else if (filter === 3) guess = (left + above) >> 1;
      else if (filter === 4) guess = paeth(left, above, corner);
      out[to + x] = data[from + x] + guess;
    }
  }
  return out;
}

function paeth(left, above, corner) {
  const guess = left + above - corner;
  const a = Math.abs(guess - left);
  const b = Math.abs(guess - above);
  const c = Math.abs(guess - corner);
  if (a <= b && a <= c) return left;
  return b <= c ? above : corner;
}
