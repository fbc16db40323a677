// Masks from COCO's run lengths, as the server sends them: of each pixel, which set of masks it is in.
// Lengths are those of columns, in digits of 5 bits, less the one two before from the fourth on (pycocotools' maskApi.c).

function runs(text) {
  const lengths = [];
  for (let place = 0; place < text.length; ) {
    let value = 0;
    let digit = 0;
    let shift = 0;
    do {
      digit = text.charCodeAt(place++) - 48;
      value += (digit & 31) * 2 ** shift;
      shift += 5;
    } while (digit & 32);
    if (digit & 16) value -= 2 ** shift;
    lengths.push(lengths.length > 2 ? value + lengths[lengths.length - 2] : value);
  }
  return lengths;
}

// {width, height, labels: of each pixel the number of its set, sets: the masks' classes of each}
export function readMasks(buffer) {
  const answer = JSON.parse(new TextDecoder().decode(buffer));
  const [height, width] = answer.size;
  const labels = new Uint32Array(width * height);
  const sets = [[]];
  for (const { class: index, counts } of answer.rle) {
    const joined = new Map(); // the set with this mask, of each without it
    let pixel = 0;
    runs(counts).forEach((length, run) => {
      for (const end = pixel + length; pixel < end; pixel++) {
        if (run % 2 === 0) continue;
        const place = (pixel % height) * width + Math.floor(pixel / height);
        const before = labels[place];
        if (!joined.has(before)) joined.set(before, sets.push([...sets[before], index]) - 1);
        labels[place] = joined.get(before);
      }
    });
  }
  return { width, height, labels, sets };
}
