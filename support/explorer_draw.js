// What the reader sees: everything is drawn from `view`, what was chosen, and `hover`, what is pointed at.
const $ = id => document.getElementById(id);
// Okabe and Ito's colours, which colour-blind people can tell apart; more classes get them with stripes
const COLOURS = [[0, 114, 178], [230, 159, 0], [0, 158, 115], [213, 94, 0], [86, 180, 233], [204, 121, 167],
                 [240, 228, 66]];
// Viridis, dark for nothing to yellow for the largest value of a map
const HEAT = [[68, 1, 84], [59, 82, 139], [33, 145, 140], [94, 201, 98], [253, 231, 37]];
// What is shown at first: the expert's map of the last class, and the paper's mask.
const START = { block: data.expert, level: data.preset, head: -1, reading: "paper", direction: "I2T", base: "mask",
                word: `c${data.classes.length - 1}`, patch: -1, show: "word", off: [] };
let view = { ...START };
let hover = { word: null, patch: null, map: false };     // what the mouse points at; map: it is on the right picture

function make(tag, parent, text = "", attributes = {}) {
  const element = document.createElement(tag);
  element.textContent = text;
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  parent.append(element);
  return element;
}

// ------------------------------------------------------------------------------------------ pictures

const PIXELS = 512;                                      // width of the pictures' canvases
const pictureOf = v => v.images[data.generated ? view.level : 0];
const patchNow = () => hover.patch ?? view.patch;
const wordNow = () => hover.word ?? view.word;
// Whether the right picture shows where a patch looks, and not a word's map.
const showsPatch = () =>
  !hover.word && patchNow() >= 0 && (view.show === "patch" || hover.patch !== null && !hover.map);
const nameOf = word => {
  if (word[0] === "c") return data.classes[+word.slice(1)].name;
  return tokenName(data.columns[+word.slice(1)]);
};
function tokenName({ label, first, count }) {
  if (label === "<empty>") return `empty rows (${count})`;
  return label !== "<pad>" ? label : count === 1 ? `<pad> ${first}` : `<pad> ${first} to ${first + count - 1}`;
}
const place = patch => `row ${Math.floor(patch / data.side) + 1}, column ${patch % data.side + 1}`;
const percent = x => (100 * x).toFixed(x >= 0.1 ? 0 : x >= 0.001 ? 1 : 2) + " %";

// Colour of class k at a pixel; the second seven classes are striped with white.
const colourOf = (k, x, y) => k >= COLOURS.length && (x + y) % 6 < 2 ? [255, 255, 255] : COLOURS[k % COLOURS.length];

function paint(canvas, w, h, colour) {                   // canvas <- w x h cells; colour(x, y) -> [r, g, b, opacity]
  const small = document.createElement("canvas");
  small.width = w;
  small.height = h;
  const image = new ImageData(w, h);
  for (let y = 0; y < h; y++)
    for (let x = 0; x < w; x++) image.data.set(colour(x, y), 4 * (y * w + x));
  small.getContext("2d").putImageData(image, 0, 0);
  const pen = canvas.getContext("2d");
  pen.imageSmoothingEnabled = false;
  pen.drawImage(small, 0, 0, canvas.width, canvas.height);
}

function outline(canvas, patch) {
  const w = canvas.width / data.side;
  const h = canvas.height / data.side;
  const pen = canvas.getContext("2d");
  for (const [colour, line] of [["#000", 6], ["#ffd84d", 3]]) {
    pen.strokeStyle = colour;
    pen.lineWidth = line;
    pen.strokeRect(patch % data.side * w, Math.floor(patch / data.side) * h, w, h);
  }
}

// Where each class is widest: the middle of its longest runs of pixels, {class: [x, y]}.
function centres(labels) {
  const runs = {};                                       // class -> the longest run of each row, [length, x, y]
  for (let y = 0; y < height; y++) {
    const longest = {};
    for (let x = 0, start = 0; x < width; x++) {
      const k = labels[y * width + x];
      if (x === 0 || labels[y * width + x - 1] !== k) start = x;
      if (x - start >= (longest[k]?.[0] ?? 0)) longest[k] = [x - start + 1, (x + start + 1) / 2, y + 0.5];
    }
    for (const k in longest) (runs[k] ??= []).push(longest[k]);
  }
  for (const k in runs) {
    const most = Math.max(...runs[k].map(run => run[0]));
    const wide = runs[k].filter(run => run[0] > 0.9 * most);
    runs[k] = wide[Math.floor(wide.length / 2)].slice(1);
  }
  return runs;
}

function nameRegions(canvas, labels) {
  const pen = canvas.getContext("2d");
  const scale = canvas.width / width;
  pen.font = "600 24px system-ui, sans-serif";
  pen.textAlign = "center";
  pen.textBaseline = "middle";
  pen.lineJoin = "round";
  pen.lineWidth = 6;
  for (const [k, [x, y]] of Object.entries(centres(labels))) {
    if (!data.classes[k]) continue;                      // pixels that belong to no class
    const { name } = data.classes[k];
    const half = pen.measureText(name).width / 2 + 4;
    const within = (at, margin, length) => Math.min(Math.max(at * scale, margin), length - margin);
    const where = [within(x, half, canvas.width), within(y, 16, canvas.height)];
    pen.strokeStyle = "#000";
    pen.strokeText(name, ...where);
    pen.fillStyle = "#fff";
    pen.fillText(name, ...where);
  }
}

function drawPicture(v) {
  const image = pictureOf(v);
  const pen = v.left.getContext("2d");
  pen.imageSmoothingEnabled = true;
  const labels = view.base === "truth" ? data.truth : labelsOf(v, view);
  const others = data.variants.filter(other => other !== v).map(other => labelsOf(other, view));
  const shown = i => {
    if (view.base === "changes") return others.some(other => other[i] !== labels[i]);
    if (view.base === "errors") return labels[i] !== data.truth[i];
    return labels[i] !== 255;
  };
  const opacity = view.base === "changes" || view.base === "errors" ? 255 : 150;
  pen.drawImage(view.base === "picture" ? image.colour : image.grey, 0, 0, v.left.width, v.left.height);
  if (view.base !== "picture") {
    paint(v.left, width, height, (x, y) => {
      const i = y * width + x;
      return shown(i) ? [...colourOf(labels[i], x, y), opacity] : [0, 0, 0, 0];
    });
    nameRegions(v.left, labels);
  }
  if (patchNow() >= 0) outline(v.left, patchNow());
  const score = truthKnown ? `, mIoU ${mIoU(v, view).toFixed(1)} %` : "";
  const what = { mask: `Mask (${view.reading})${score}`, truth: "True mask",
                 errors: `Where the mask is wrong${score}`, changes: `Where the masks differ${score}`,
                 picture: data.generated ? "The sampler's estimate" : "Picture" };
  v.leftCaption.textContent = what[view.base];
}

function drawMap(v) {
  const patch = patchNow();
  const n = showsPatch() ? data.side : side(view);
  let map = null;
  if (!showsPatch()) map = wordMap(v, view, wordNow());
  else if (canLook(view)) map = v.i2i(data.i2i_blocks.indexOf(view.block), patch);
  v.right.getContext("2d").drawImage(pictureOf(v).grey, 0, 0, v.right.width, v.right.height);
  v.rightText = v.rightCaption.textContent = "I2I is not kept here";
  if (map) {
    const top = map.reduce((a, b) => Math.max(a, b), 1e-30);
    paint(v.right, n, n, (x, y) => {
      const value = 4 * map[y * n + x] / top;
      const low = Math.min(3, Math.floor(value));
      return [...HEAT[low].map((c, i) => c + (value - low) * (HEAT[low + 1][i] - c)), 215];
    });
    const here = showsPatch() || patch < 0 ? "" : `, in the marked patch ${percent(map[patchIn(patch, n)])}`;
    const kind = showsPatch() ? "I2I" : view.direction;
    v.rightText = `${kind} from 0 (dark) to ${percent(top)} (yellow)${here}`;
    v.rightCaption.textContent = `${kind}: 0`;
    make("span", v.rightCaption, "", { class: "scale" });
    v.rightCaption.append(percent(top) + here);
  }
  if (patch >= 0) outline(v.right, patch);
}

// ------------------------------------------------------------------------------------------ words, plot, sentence

function drawTokens() {
  const patch = patchNow();
  const isShare = view.direction === "I2T";
  const values = data.variants.map(v => columnValues(v, view, patch));
  const totals = values.map(x => x.reduce((a, b) => a + b));
  const shares = values.map((x, i) => isShare ? x.map(value => value / totals[i]) : x);
  const top = Math.max(...shares.flat(), 1e-30);
  const who = patch < 0 ? "All patches" : `Patch ${place(patch)}`;
  const goes = totals.map((x, i) => percent(x) + (totals.length > 1 ? ` (${data.variants[i].name})` : ""));
  const rows = data.columns.reduce((sum, { count }) => sum + count, 0);
  const even = percent(rows / (rows + data.patches ** 2));
  $("heading").textContent = isShare
    ? `${who}: ${goes.join(", ")} of the attention goes to text (${even} if it were even), the rest to the picture. `
      + "The bars are shares of what goes to text:"
    : `${patch < 0 ? "The whole picture" : who}: how much of each word's own attention it gets:`;
  document.querySelectorAll(".token").forEach((row, column) => {
    row.classList.toggle("on", row.dataset.word === wordNow() && !showsPatch());
    shares.forEach((x, i) => { row.querySelectorAll("i")[i].style.width = 100 * x[column] / top + "%"; });
    const numbers = shares.map(x => percent(x[column])).join(" | ");
    row.querySelector("output").textContent = numbers;
    row.setAttribute("aria-label", `${nameOf(row.dataset.word)}: ${numbers}`);
  });
  document.querySelectorAll(".chip").forEach((chip, k) => {
    chip.classList.toggle("on", `c${k}` === wordNow() && !showsPatch());
    chip.querySelector("input").checked = !view.off.includes(k);
    if (truthKnown) chip.querySelector("output").textContent = data.variants.map(v => classScore(v, view, k)).join(" | ");
  });
}

const classScore = (v, at, k) => IoUs(v, at)[k]?.toFixed(0) ?? "-";
const chosenClass = () => truthKnown && view.word[0] === "c" ? +view.word.slice(1) : null;

// What the small plot shows of a block: mIoU with the view's other choices, or the share of attention that text gets.
function blockValue(v, block) {
  const at = settled({ ...view, block }, "block");
  if (truthKnown) return mIoU(v, at);
  return remember("text" + keyOf(v, at), () => 100 * textShare(v, at));
}

// The small plot that is also the slider of the blocks; where truth is known, with a thin line for the chosen class
// alone. All that goes into its text are numbers.
const xOf = block => 30 + ($("plot").clientWidth - 40) * block / Math.max(1, data.depth - 1);
function drawPlot() {
  const values = data.variants.map(v => Array.from({ length: data.depth }, (_, block) => blockValue(v, block)));
  const most = Math.max(...values.flat());
  const top = truthKnown ? 100 : 10 * Math.ceil(most / 10 + 0.001);
  const yOf = value => 128 - 108 * value / top;
  const right = xOf(data.depth - 1);
  let svg = `<rect x="${xOf(view.block) - 11}" y="8" width="22" height="122" rx="4" fill="var(--line)"/>`;
  for (const tick of [0, top / 2, top]) {
    svg += `<line x1="30" x2="${right}" y1="${yOf(tick)}" y2="${yOf(tick)}" stroke="var(--line)"/>`;
    svg += `<text x="24" y="${yOf(tick) + 4}" text-anchor="end">${tick}</text>`;
  }
  const every = Math.ceil(data.depth / 13);              // blocks whose number is written
  for (let block = 0; block < data.depth; block++) {
    const look = block === view.block ? ' class="value"' : "";
    if (block % every && !look) continue;
    svg += `<text x="${xOf(block)}" y="144" text-anchor="middle"${look}>${block}</text>`;
  }
  values.forEach((line, i) => {                          // blue, with circles; the LoRA's orange, dashed, with squares
    const colour = i ? "var(--second)" : "var(--first)";
    const points = line.map((value, block) => `${xOf(block)},${yOf(value)}`);
    svg += `<polyline points="${points.join(" ")}" fill="none" stroke="${colour}" stroke-width="2" `
         + `stroke-dasharray="${i ? "5 4" : "none"}"/>`;
    line.forEach((value, block) => {
      svg += `<rect x="${xOf(block) - 4}" y="${yOf(value) - 4}" width="8" height="8" rx="${i ? 0 : 4}" `
           + `fill="${colour}"/>`;
    });
  });
  const only = chosenClass();
  if (only !== null) data.variants.forEach((v, i) => {
    const ious = values[i].map((_, block) => IoUs(v, settled({ ...view, block }, "block"))[only] ?? 0);
    const points = ious.map((iou, block) => `${xOf(block)},${yOf(iou)}`);
    svg += `<polyline points="${points.join(" ")}" fill="none" stroke="${i ? "var(--second)" : "var(--first)"}" `
         + `stroke-width="1" stroke-dasharray="${i ? "2 3" : "none"}"/>`;
  });
  const chosen = values.map(line => line[view.block].toFixed(1)).join(" | ");
  const x = Math.min(Math.max(xOf(view.block), 60), right - 30);
  const y = yOf(Math.max(...values.map(line => line[view.block]))) - 9;
  $("plot").innerHTML = svg + `<text class="value" x="${x}" y="${y}" text-anchor="middle">${chosen}</text>`;
  const what = truthKnown ? "mIoU of the mask" : "Attention that goes to text";
  const thin = only === null ? "" : ` (thin: ${data.classes[only].name})`;
  $("plotname").textContent = `Block: ${view.block}${view.block === data.expert ? " (expert)" : ""}. ${what}${thin}, %:`;
  $("plot").setAttribute("aria-valuenow", view.block);
  $("plot").setAttribute("aria-valuetext", `block ${view.block}, ${what} ${chosen} %`);
}

// What the pointed-at patch listens to most, in words.
function listens() {
  const values = columnValues(data.variants[0], { ...view, direction: "I2T" }, patchNow());
  const total = values.reduce((a, b) => a + b);
  const most = values.map((value, column) => [value / total, column]).sort((a, b) => b[0] - a[0]).slice(0, 3);
  const names = most.map(([share, column]) => `${nameOf(`t${column}`)} ${percent(share)}`);
  const whose = data.variants.length > 1 ? `In ${data.variants[0].name} the` : "The";
  return `${whose} marked patch gives ${percent(total)} of its attention to text, of that ${names.join(", ")}.`;
}

const MASKS = {
  paper: "Mask: the class whose map is highest at each pixel (Eq. 11, then argmax).",
  shares: "Mask: maps divided by their sum over the classes at each patch, then the highest.",
  i2i: "Mask: shares, averaged over the patches that each patch attends to, then the highest.",
  pixels: "Mask: i2i, then averaged over neighbouring pixels of the same colour.",
};
const stepName = ({ left, sigma }) => `sigma ${sigma.toFixed(3)}, ${left} of ${data.steps} steps left`;

// One sentence that says what is shown, and by which equation; a second one on the patch, or else on the mask.
function sentence() {
  const heads = view.head < 0 ? `mean over ${data.heads} heads` : `head ${view.head}`;
  const expert = view.block === data.expert ? " (the expert)" : "";
  const eq = view.head < 0 ? "Eq. 4, 10" : "Eq. 4";
  const word = `“${nameOf(wordNow())}”`;
  let what = `the attention of ${word} to each patch (T2I, ${eq}).`;
  if (view.direction === "I2T") what = `each patch's attention to ${word} (I2T, ${eq}).`;
  if (showsPatch()) what = `where the patch in ${place(patchNow())} looks (I2I, Eq. 4 over image keys, mean over heads).`;
  if (showsPatch() && !canLook(view)) what = "where a patch looks (I2I) is not kept here, only for "
    + `${data.i2i_blocks.length > 1 ? "all blocks" : `block ${data.expert}`} at ${stepName(data.levels[data.preset])}.`;
  const second = patchNow() >= 0 ? listens() : MASKS[view.reading];
  return `Block ${view.block}${expert}, ${heads}, ${stepName(data.levels[view.level])}: ${what} ${second}`;
}

// What each head would find of the chosen class, where truth is known and heads are few.
function byHead() {
  const k = chosenClass();
  if (k === null || data.heads > 8) return "";
  const heads = [...Array(data.heads).keys()];
  const scores = data.variants.map(v => heads.map(head => classScore(v, settled({ ...view, head }, "head"), k)).join(" "));
  return `. ${data.classes[k].name} by head: ${scores.join(" | ")}`;
}

function drawControls() {
  const level = `${data.generated ? "Sampling step" : "Noise level"}: ${stepName(data.levels[view.level])}`;
  const head = `Head: ${view.head < 0 ? `mean over ${data.heads}` : view.head}${byHead()}`;
  for (const [name, text] of [["level", level], ["head", head]]) {
    $(name).value = view[name];
    $(name + "name").textContent = text;
    $(name).setAttribute("aria-valuetext", text);
  }
  for (const name of ["reading", "direction", "base"])
    for (const input of $(name).querySelectorAll("input")) input.checked = input.value === view[name];
}

let waiting = false;
function draw() {                                        // at most once a frame
  if (waiting) return;
  waiting = true;
  requestAnimationFrame(() => {
    waiting = false;
    $("sentence").textContent = sentence();
    for (const v of data.variants) {
      drawPicture(v);
      drawMap(v);
      const patch = patchNow() < 0 ? "No patch is chosen" : `The chosen patch: ${place(patchNow())}`;
      v.left.setAttribute("aria-label", `${v.name}. ${v.leftCaption.textContent}. ${patch}; `
                                        + `arrow keys choose another of ${data.side} by ${data.side}.`);
      v.right.setAttribute("aria-label", `${v.name}. ${v.rightText}. ${sentence()}`);
    }
    drawTokens();
    drawPlot();
    drawControls();
  });
}
