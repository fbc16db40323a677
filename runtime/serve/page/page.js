// One photograph at a time: sent as it is to /label, and shown under the colours of its labels.
import { readLabels } from "./png.js";
import { readMasks } from "./rle.js";

const $ = (id) => document.getElementById(id);
const models = new Map(); // name → what it says of itself
let shown = null; // {picture, width, height, labels, told}
let urls = []; // of the downloads of what is shown
let current = null; // the file of the last photograph
let given = 0; // files that were given at once, of which it is the first
const NAMED = 20; // classes, at most, before there is a photograph
let turn = 0; // counts the photographs: an answer that was overtaken is not shown
let cursor = null; // {x, y} of the arrow keys

// The server's models

function headers() {
  const token = $("token").value.trim();
  return token ? { Authorization: `Bearer ${token}` } : {};
}

async function ask(address, options = {}) {
  const answer = await fetch(address, { ...options, headers: { ...headers(), ...options.headers } });
  if (answer.ok) return answer;
  if (answer.status === 401) $("token-choice").hidden = false;
  let text = `the server answered ${answer.status}`;
  try {
    text = (await answer.json()).error || text;
  } catch {
    // it was not JSON: the status says enough
  }
  throw new Error(text);
}

async function learn() {
  const server = await (await ask("v2")).json();
  models.clear();
  $("model").replaceChildren();
  for (const { name } of server.models) {
    models.set(name, await (await ask(`v2/models/${encodeURIComponent(name)}`)).json());
    $("model").append(new Option(name, name));
  }
  $("model-choice").hidden = models.size < 2;
  chosen();
}

function chosen() {
  const model = models.get($("model").value);
  $("refine-choice").hidden = !model || !model.outputs.some((output) => output.name === "refined");
  if (current || !model) return;
  const { classes } = model.parameters;
  const more = classes.length > NAMED ? ` and ${classes.length - NAMED} more` : "";
  $("status").textContent = `${model.name} knows ${classes.slice(0, NAMED).join(", ")}${more}.`;
}

// From a file to its labels

async function label(file) {
  const mine = ++turn;
  current = file;
  const started = performance.now();
  $("error").hidden = true;
  $("status").textContent = `Sending ${file.name || "the picture"} …`;
  $("drop").setAttribute("aria-busy", "true");
  try {
    if (!models.size) await learn();
    const model = models.get($("model").value);
    const kind = model.parameters.kind;
    if (kind === "values") {
      throw new Error(`${model.name} gives values, which this page does not show; ask for them by /v2`);
    }
    const query = new URLSearchParams({ model: model.name, format: kind === "masks" ? "rle" : "png" });
    if (!$("refine-choice").hidden && $("refine").checked) query.set("output", "refined");
    const answer = await ask(`label?${query}`, { method: "POST", body: file, headers: { "Content-Type": "application/octet-stream" } });
    const sent = await answer.arrayBuffer();
    const total = performance.now() - started;
    const found = kind === "masks" ? readMasks(sent) : await readLabels(sent);
    const picture = await pictureOf(file, found);
    if (mine !== turn) return;
    show(model, file, found, picture, sent, answer, total);
    $("status").textContent = `${file.name || "The picture"}: ${found.width} × ${found.height} pixels, labelled by ${model.name}.${several(answer)}${others()}`;
  } catch (error) {
    if (mine !== turn) return;
    $("status").textContent = others().trim();
    if (shown && shown.file !== file) $("result").hidden = true; // it is of another file than the error
    failed(error, `${file.name || "the picture"}: `);
  } finally {
    if (mine === turn) $("drop").removeAttribute("aria-busy");
  }
}

function several(answer) {
  const pages = answer.headers.get("X-Pages");
  return pages ? ` The file holds ${pages} pictures; this is the first.` : "";
}

function others() {
  return given > 1 ? ` Of ${given} files the first was taken: give this page one at a time, and label-images a folder.` : "";
}

function take(files) {
  if (!files.length) return;
  given = files.length;
  label(files[0]);
}

function again() {
  if (current) label(current);
}

// What the browser cannot decode (most TIFFs) is shown as its labels alone.
async function pictureOf(file, { width, height }) {
  try {
    const picture = await createImageBitmap(file);
    return picture.width === width && picture.height === height ? picture : null;
  } catch {
    return null;
  }
}

// Of labels each value is a class; of masks each value stands for the set of masks that a pixel is in.
function show(model, file, found, picture, sent, answer, total) {
  const { classes, colors, no_data: noData } = model.parameters;
  const masks = found.sets !== undefined;
  const counts = new Map();
  for (const value of found.labels) {
    for (const index of masks ? found.sets[value] : [value]) counts.set(index, (counts.get(index) || 0) + 1);
  }
  const pixels = found.labels.length - (masks ? 0 : counts.get(noData) || 0) || 1;
  const rows = [...counts].sort((a, b) => b[1] - a[1]).map(([index, count]) => ({
    class: index,
    name: index < classes.length ? classes[index] : "no data",
    color: index < classes.length ? colors[index] : null,
    pixels: count,
    share: index < classes.length ? count / pixels : null,
  }));
  const clear = classes.findIndex((name) => name.toLowerCase() === "background");
  const byClass = new Map(rows.map((row) => [row.class, row]));
  const told = new Map(); // of each value: its name and share, its colour, its classes
  const sets = masks ? found.sets.map((set, value) => [value, set]) : rows.map((row) => [row.class, [row.class]]);
  for (const [value, set] of sets) {
    const those = set.map((index) => byClass.get(index));
    const drawn = those.filter((row) => row.color && !(picture && row.class === clear));
    const mixed = [0, 1, 2].map((c) => drawn.reduce((sum, row) => sum + row.color[c], 0) / drawn.length);
    told.set(value, {
      text: those.map((row) => row.name).join(" and ") || "no class",
      share: those.length === 1 ? those[0].share : null,
      color: drawn.length ? mixed : null,
      classes: new Set(set),
    });
  }
  shown = { ...found, file, picture, told };
  cursor = null;
  list(rows);
  times(answer.headers.get("Server-Timing") || "", total);
  const name = (file.name || "picture").replace(/\.[^.]*$/, "");
  urls.forEach((url) => URL.revokeObjectURL(url));
  const version = answer.headers.get("X-Model-Version");
  const record = { model: model.name, version, size: [found.height, found.width], classes: rows };
  const json = masks ? sent : JSON.stringify(record, null, 1); // run lengths come as JSON already
  urls = [[sent, "image/png"], [json, "application/json"]].map(([part, type]) => URL.createObjectURL(new Blob([part], { type })));
  $("save-png").hidden = masks;
  Object.assign($("save-png"), { href: urls[0], download: `${name}.labels.png` });
  Object.assign($("save-json"), { href: urls[1], download: `${name}.labels.json` });
  $("result").hidden = false;
  draw();
}

function list(rows) {
  const body = $("classes");
  body.replaceChildren();
  for (const row of rows) {
    const line = body.insertRow();
    line.dataset.class = row.class;
    const name = line.insertCell();
    const swatch = document.createElement("span");
    swatch.className = "swatch";
    swatch.style.background = row.color ? `rgb(${row.color})` : "transparent";
    name.append(swatch, row.name);
    line.insertCell().textContent = row.pixels.toLocaleString("en");
    line.insertCell().textContent = row.share === null ? "–" : percent(row.share);
  }
}

function percent(share) {
  return share < 0.0005 ? "< 0.1 %" : `${(100 * share).toFixed(1)} %`;
}

function times(header, total) {
  const parts = new Map([...header.matchAll(/(\w+);dur=([\d.]+)/g)].map(([, name, time]) => [name, Number(time)]));
  const inside = [...parts.values()].reduce((sum, time) => sum + time, 0);
  const rows = [
    ["In the queue", parts.get("queue") || 0],
    ["Reading the file", parts.get("read") || 0],
    ["In the network", parts.get("infer") || 0],
    ["Writing the PNG", parts.get("write") || 0],
    ["Transfer, both ways", Math.max(0, total - inside)],
    ["Altogether", total],
  ];
  const body = $("times");
  body.replaceChildren();
  for (const [name, time] of rows) {
    const line = body.insertRow();
    line.insertCell().textContent = name;
    line.insertCell().textContent = time.toLocaleString("en", { minimumFractionDigits: 1, maximumFractionDigits: 1 });
  }
}

// The picture

function draw() {
  if (!shown) return;
  const { width, height, labels, picture, told } = shown;
  const canvas = $("view");
  // No larger than a screen has pixels: a canvas of a huge picture would not be drawn at all.
  const scale = Math.min(1, 2048 / Math.max(width, height));
  canvas.width = Math.max(1, Math.round(width * scale));
  canvas.height = Math.max(1, Math.round(height * scale));
  const context = canvas.getContext("2d", { willReadFrequently: true });
  context.clearRect(0, 0, canvas.width, canvas.height);
  if (picture) context.drawImage(picture, 0, 0, canvas.width, canvas.height);
  const opacity = picture ? Number($("opacity").value) / 100 : 1;
  const image = context.getImageData(0, 0, canvas.width, canvas.height);
  for (let y = 0, to = 0; y < canvas.height; y++) {
    const line = Math.min(height - 1, Math.floor((y + 0.5) * height / canvas.height)) * width;
    for (let x = 0; x < canvas.width; x++, to += 4) {
      const value = labels[line + Math.min(width - 1, Math.floor((x + 0.5) * width / canvas.width))];
      const color = told.get(value).color;
      if (!color) continue;
      for (let c = 0; c < 3; c++) image.data[to + c] += (color[c] - image.data[to + c]) * opacity;
      image.data[to + 3] = 255;
    }
  }
  context.putImageData(image, 0, 0);
  if (cursor) {
    const x = (cursor.x + 0.5) * canvas.width / width;
    const y = (cursor.y + 0.5) * canvas.height / height;
    for (const [style, wide] of [["black", 5], ["white", 2]]) {
      context.strokeStyle = style;
      context.lineWidth = wide;
      context.beginPath();
      context.arc(x, y, Math.max(6, canvas.width / 60), 0, 7);
      context.stroke();
    }
  }
}

function tell(x, y) {
  const { text, share, classes } = shown.told.get(shown.labels[y * shown.width + x]);
  $("here").textContent = `${text}, at ${x}, ${y}${share === null ? "" : ` (${percent(share)} of the picture)`}`;
  for (const line of $("classes").rows) line.classList.toggle("here", classes.has(Number(line.dataset.class)));
}

// `object-fit: contain` leaves bars around a tall picture.
function place(event) {
  const box = $("view").getBoundingClientRect();
  const scale = Math.min(box.width / shown.width, box.height / shown.height);
  const x = Math.floor((event.clientX - box.left - (box.width - shown.width * scale) / 2) / scale);
  const y = Math.floor((event.clientY - box.top - (box.height - shown.height * scale) / 2) / scale);
  return x >= 0 && y >= 0 && x < shown.width && y < shown.height ? { x, y } : null;
}

function point(event) {
  if (!shown) return;
  const found = place(event);
  if (found) tell(found.x, found.y);
}

function move(event) {
  const steps = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
  if (!shown || !(event.key in steps)) return;
  event.preventDefault();
  const far = Math.max(1, Math.round(Math.max(shown.width, shown.height) / (event.shiftKey ? 10 : 50)));
  cursor ||= { x: Math.floor(shown.width / 2), y: Math.floor(shown.height / 2) };
  cursor.x = Math.min(shown.width - 1, Math.max(0, cursor.x + steps[event.key][0] * far));
  cursor.y = Math.min(shown.height - 1, Math.max(0, cursor.y + steps[event.key][1] * far));
  draw();
  tell(cursor.x, cursor.y);
}

// What people do

$("file").addEventListener("change", () => {
  const files = [...$("file").files];
  $("file").value = ""; // or the same file, chosen again after an error, would be no change
  take(files);
});
$("model").addEventListener("change", () => (chosen(), again()));
$("refine").addEventListener("change", again);
$("token").addEventListener("change", () => learn().then(() => ($("error").hidden = true), failed));
$("token-choice").addEventListener("submit", (event) => event.preventDefault());
$("opacity").addEventListener("input", draw);
$("view").addEventListener("pointermove", point);
$("view").addEventListener("pointerdown", point);
$("view").addEventListener("keydown", move);
document.addEventListener("paste", (event) => {
  take([...event.clipboardData.files]);
});
for (const kind of ["dragover", "dragleave", "drop"]) {
  document.addEventListener(kind, (event) => {
    event.preventDefault();
    $("drop").classList.toggle("over", kind === "dragover");
    if (kind === "drop") take([...event.dataTransfer.files]);
  });
}

function failed(error, before = "") {
  $("error").textContent = error instanceof TypeError ? "The server does not answer; is it running?" : before + error.message;
  $("error").hidden = false;
}

learn().catch(failed);
