// What the reader does: every control changes `view`, which the page's address holds, and has it drawn.

// ------------------------------------------------------------------------------------------ changes and their address

function change(what, changed) {
  view = settled({ ...view, ...what }, changed ?? Object.keys(what)[0]);
  const facts = Object.entries(view).filter(([key, value]) => String(value) !== String(START[key]));
  history.replaceState(null, "", "#" + facts.map(([key, value]) => `${key}=${value}`).join("&"));
  draw();
}

// Only what is known and in range is taken over.
function readHash() {
  const given = Object.fromEntries(new URLSearchParams(location.hash.slice(1)));
  const at = { ...START };
  const ranges = { block: [0, data.depth], level: [0, data.levels.length], head: [-1, data.heads],
                   patch: [-1, data.side ** 2] };
  for (const [key, [low, high]] of Object.entries(ranges)) {
    const value = parseInt(given[key]);
    if (value >= low && value < high) at[key] = value;
  }
  if (readings.includes(given.reading)) at.reading = given.reading;
  if (["I2T", "T2I"].includes(given.direction)) at.direction = given.direction;
  if (bases.includes(given.base)) at.base = given.base;
  if (given.show === "patch" && at.patch >= 0) at.show = "patch";
  const [, kind, number] = /^([ct])(\d+)$/.exec(given.word) ?? [];
  if (kind && +number < (kind === "c" ? data.classes : data.columns).length) at.word = given.word;
  if (given.off) at.off = given.off.split(",").map(Number).filter(k => k in data.classes);
  if (at.off.length >= data.classes.length) at.off = [];
  view = settled(at, "block");
  draw();
}

// ------------------------------------------------------------------------------------------ controls

const many = data.variants.length > 1;
const bases = ["mask", "picture"].concat(truthKnown ? ["truth", "errors"] : [], many ? ["changes"] : []);
function buildStage() {
  $("title").textContent = `Where does ${data.variants.map(v => v.name).join(", and where does ")} look?`;
  const made = data.generated ? "Drawn from the prompt" : "A picture, with the prompt";
  $("prompt").textContent = `${made} “${data.prompt}”, seed ${data.seed}. `
    + "Point at a patch or at a word; press to keep it.";
  document.body.classList.toggle("many", many);
  for (const v of data.variants) {
    const pair = make("div", $("stage"), "", { class: "pair" });
    if (many) make("h2", pair, v.name);
    for (const which of ["left", "right"]) {
      const figure = make("figure", pair);
      const roles = which === "left" ? { role: "application", tabindex: 0 } : { role: "img" };
      const canvas = make("canvas", figure, "", roles);
      canvas.width = PIXELS;
      canvas.height = Math.round(PIXELS * height / width);
      v[which] = canvas;
      v[which + "Caption"] = make("figcaption", figure);
      pointAt(canvas, which === "right");
    }
  }
}

// Mouse: pointing shows, pressing keeps. Finger: pressing and moving keeps. Keys: arrows move the kept patch.
function pointAt(canvas, isMap) {
  const patchAt = event => {
    const box = canvas.getBoundingClientRect();
    const cell = (at, length) => Math.min(data.side - 1, Math.max(0, Math.floor(data.side * at / length)));
    return cell(event.clientY - box.top, box.height) * data.side + cell(event.clientX - box.left, box.width);
  };
  const keep = event => {
    hover = { word: null, patch: null, map: false };
    change(isMap ? { patch: patchAt(event) } : { patch: patchAt(event), show: "patch" });
  };
  canvas.addEventListener("pointerdown", keep);
  canvas.addEventListener("pointermove", event => {
    if (event.buttons) return keep(event);
    hover = { word: null, patch: patchAt(event), map: isMap };
    draw();
  });
  canvas.addEventListener("pointerleave", () => { hover = { word: null, patch: null, map: false }; draw(); });
  canvas.addEventListener("keydown", event => {
    const ways = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
    if (!(event.key in ways)) return;
    const [dx, dy] = ways[event.key];
    event.preventDefault();
    const middle = Math.floor(data.side / 2);
    const x = view.patch < 0 ? middle : view.patch % data.side + dx;
    const y = view.patch < 0 ? middle : Math.floor(view.patch / data.side) + dy;
    if (x >= 0 && x < data.side && y >= 0 && y < data.side) change({ patch: y * data.side + x, show: "patch" });
  });
}

function wordButton(button, word) {
  button.addEventListener("pointerenter", event => {
    if (event.pointerType === "mouse") { hover.word = word; draw(); } });
  button.addEventListener("pointerleave", () => { hover.word = null; draw(); });
  button.addEventListener("click", () => change({ word, show: "word" }));
}

function buildWords() {
  data.classes.forEach(({ name }, k) => {
    const chip = make("span", $("chips"), "", { class: "chip" });
    const title = `${name} competes for the mask`;
    const box = make("input", chip, "", { type: "checkbox", "aria-label": title, title });
    box.addEventListener("change", () => {
      const off = box.checked ? view.off.filter(other => other !== k) : [...view.off, k].sort();
      change({ off: off.length < data.classes.length ? off : view.off });
    });
    const patch = make("i", chip);
    const [r, g, b] = COLOURS[k % COLOURS.length];
    const stripes = `repeating-linear-gradient(45deg, rgb(${r} ${g} ${b}) 0 4px, #fff 4px 6px)`;
    patch.style.background = k < COLOURS.length ? `rgb(${r} ${g} ${b})` : stripes;
    wordButton(make("button", chip, name), `c${k}`);
    if (truthKnown) make("output", chip, "", { title: `IoU of ${name} in the mask, %` });
  });
  data.columns.forEach((column, t) => {
    const row = make("button", $("tokens"), "", { class: "token", "data-word": `t${t}` });
    make("b", row, tokenName(column));
    const bars = make("span", row);
    data.variants.forEach(() => make("i", bars));
    make("output", row);
    wordButton(row, `t${t}`);
  });
}

function buildSwitch(name, values) {
  for (const value of values) {
    const label = make("label", $(name));
    const input = make("input", label, "", { type: "radio", name, value });
    label.append(value);
    input.addEventListener("change", () => change({ [name]: value }));
  }
}

function buildControls() {
  buildSwitch("reading", readings);
  buildSwitch("direction", ["I2T", "T2I"]);
  buildSwitch("base", bases);
  $("level").max = data.levels.length - 1;
  $("level").addEventListener("input", () => change({ level: +$("level").value }));
  $("head").max = data.heads - 1;
  $("head").addEventListener("input", () => change({ head: +$("head").value }));
  const plot = $("plot");
  plot.setAttribute("aria-valuemax", data.depth - 1);
  const blockAt = event => {
    const x = event.clientX - plot.getBoundingClientRect().left;
    const far = block => Math.abs(xOf(block) - x);
    change({ block: [...Array(data.depth).keys()].reduce((a, b) => far(b) < far(a) ? b : a) });
  };
  plot.addEventListener("pointerdown", blockAt);
  plot.addEventListener("pointermove", event => { if (event.buttons) blockAt(event); });
  document.addEventListener("keydown", event => {        // blocks by arrows, but where arrows mean something else
    if (event.key === "Escape") change({ patch: -1, show: "word" });
    if (event.target.matches("input, canvas")) return;
    const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    const block = view.block + step;
    if (step && block >= 0 && block < data.depth) change({ block });
  });
  let playing = null;
  $("play").addEventListener("click", () => {
    clearInterval(playing);
    change({ level: 0 });
    playing = setInterval(() => {
      if (view.level < data.levels.length - 1) change({ level: view.level + 1 });
      else clearInterval(playing);
    }, 700);
  });
  $("reset").addEventListener("click", () => { clearInterval(playing); change({ ...START }, "block"); });
  $("save").addEventListener("click", save);
  window.addEventListener("hashchange", readHash);
  window.addEventListener("resize", draw);
}

function describe() {
  const n = data.patches;
  const grid = side => side < n ? `${side} x ${side} of the ${n} x ${n} patches` : `${n} x ${n} patches`;
  const averaged = data.side < n ? `averaged down to ${data.side} x ${data.side} patches, ` : "";
  const blocks = data.i2i_blocks.length > 1 ? "of every block" : `of block ${data.expert}`;
  const preset = stepName(data.levels[data.preset]);
  $("kept").textContent = "Kept: I2T and T2I of every block, mean over heads, at "
    + `${data.levels.length} of ${data.steps} noise levels (${grid(data.side)}). `
    + `Every single head at ${preset} (${grid(data.head_side)}). `
    + `I2I ${blocks} there, ${averaged}mean over heads, softmax over image keys alone. `
    + "Left out: other noise levels, single heads at others, T2T, queries, keys and values. "
    + "A map's values are stored as square roots of their share of its largest, in 8 bits (I2I: 6). "
    + "Text rows that share a map: later <pad> tokens, and empty rows in the place of T5. "
    + "Keys: left and right change the block; on the left picture arrows move the patch; Escape lets it go. "
    + "The page's address holds the view: who opens it sees the same.";
}

// The pictures with their captions and the sentence as one PNG.
async function save() {
  const gap = 12;
  const tall = data.variants[0].left.height;
  const out = document.createElement("canvas");
  out.width = 2 * PIXELS + 3 * gap;
  out.height = data.variants.length * (tall + 40) + 130;
  const pen = out.getContext("2d");
  pen.fillStyle = "#fff";
  pen.fillRect(0, 0, out.width, out.height);
  pen.fillStyle = "#000";
  pen.font = "18px system-ui, sans-serif";
  data.variants.forEach((v, i) => {
    const y = gap + i * (tall + 40);
    pen.drawImage(v.left, gap, y);
    pen.drawImage(v.right, PIXELS + 2 * gap, y);
    pen.fillText(`${v.name}. ${v.leftCaption.textContent}`, gap, y + tall + 22);
    pen.fillText(v.rightText, PIXELS + 2 * gap, y + tall + 22);
  });
  let line = "";
  let y = out.height - 96;
  for (const word of sentence().split(" ")) {
    if (pen.measureText(`${line} ${word}`).width > out.width - 2 * gap) {
      pen.fillText(line, gap, y);
      line = "";
      y += 24;
    }
    line = `${line} ${word}`.trim();
  }
  pen.fillText(line, gap, y);
  const blob = await new Promise(done => out.toBlob(done, "image/png"));
  const link = make("a", document.body, "", { download: "attention.png", href: URL.createObjectURL(blob) });
  link.click();
  link.remove();
}

load().then(() => {
  buildStage();
  buildWords();
  buildControls();
  describe();
  readHash();
  document.body.dataset.ready = "yes";
}).catch(error => { $("sentence").textContent = `This page needs a browser of 2023 or later (${error}).`; });
