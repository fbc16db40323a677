// A label map from the PNG that the server sends: the palette's indices themselves, which a canvas does not give.
// PNGs of one sample a pixel, of 1 to 16 bits, not interlaced (https://www.w3.org/TR/png-3/).

export async function readLabels(buffer) {
  const view = new DataView(buffer);
  let place = 8;
  let width = 0;
  let height = 0;
  let depth = 8;
  const packed = [];
  while (place < view.byteLength) {
    const length = view.getUint32(place);
    const kind = String.fromCharCode(...new Uint8Array(buffer, place + 4, 4));
    if (kind === "IHDR") {
      width = view.getUint32(place + 8);
      height = view.getUint32(place + 12);
      depth = view.getUint8(place + 16);
      const colour = view.getUint8(place + 17);
      if (![0, 3].includes(colour) || view.getUint8(place + 20) !== 0) {
        throw new Error(`the labels came as a PNG of another kind (${depth} bits, colour type ${colour})`);
      }
    } else if (kind === "IDAT") {
      packed.push(new Uint8Array(buffer, place + 8, length));
    }
    place += length + 12;
  }
  const unpacked = new Blob(packed).stream().pipeThrough(new DecompressionStream("deflate"));
  const data = new Uint8Array(await new Response(unpacked).arrayBuffer());
  const line = Math.ceil((width * depth) / 8);
  const rows = unfiltered(data, line, height, depth === 16 ? 2 : 1);
  return { width, height, labels: depth === 8 ? rows : samples(rows, line, width, height, depth) };
}

function samples(rows, line, width, height, depth) {
  const labels = depth === 16 ? new Uint16Array(width * height) : new Uint8Array(width * height);
  const mask = (1 << depth) - 1;
  for (let y = 0, to = 0; y < height; y++) {
    for (let x = 0; x < width; x++, to++) {
      const bit = x * depth;
      const from = y * line + (bit >> 3);
      if (depth === 16) labels[to] = (rows[from] << 8) | rows[from + 1];
      else labels[to] = (rows[from] >> (8 - depth - (bit & 7))) & mask;
    }
  }
  return labels;
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
