// From the page's data to maps, masks and scores: functions of a variant v (one model) and of a view `at`, which has a
// block, level, head (-1: the mean), reading, direction (I2T or T2I) and off (the classes that do not compete).
"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const truthKnown = data.truth !== null;
const [width, height] = data.size;                       // of the masks, pixels

// ------------------------------------------------------------------------------------------ data

async function bytes(text) {
  const packed = Uint8Array.from(atob(text), c => c.charCodeAt(0));
  const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"));
  return new Response(stream).arrayBuffer();
}

// explore.py's quantised(): value = top * (code / steps)^2. Returns a function of the leading indices -> one map.
async function unpack(array) {
  const codes = new Uint8Array(await bytes(array.codes));
  const top = new Float32Array(await bytes(array.top));
  const n = array.shape.at(-1);
  return (...index) => {
    let row = 0;
    index.forEach((i, axis) => { row = row * array.shape[axis] + i; });
    const map = new Float32Array(n);
    for (let i = 0; i < n; i++) map[i] = top[row] * (codes[row * n + i] / array.steps) ** 2;
    return map;
  };
}

async function loadImage(address) {
  const image = new Image();
  image.src = address;
  await image.decode();
  const grey = document.createElement("canvas");
  grey.width = image.naturalWidth;
  grey.height = image.naturalHeight;
  const pen = grey.getContext("2d");
  pen.drawImage(image, 0, 0);
  const pixels = pen.getImageData(0, 0, grey.width, grey.height);
  const x = pixels.data;
  for (let i = 0; i < x.length; i += 4)
    x[i] = x[i + 1] = x[i + 2] = 0.3 * x[i] + 0.59 * x[i + 1] + 0.11 * x[i + 2];
  pen.putImageData(pixels, 0, 0);
  return { colour: image, grey };
}

async function load() {
  for (const v of data.variants) {
    for (const name of ["i2t", "t2i", "i2t_heads", "t2i_heads", "i2i"]) v[name] = await unpack(v[name]);
    v.images = await Promise.all(v.pictures.map(loadImage));
    if (v.pixels) v.pixels = new Uint8Array(await bytes(v.pixels));
  }
  if (truthKnown) data.truth = new Uint8Array(await bytes(data.truth));
}

// ------------------------------------------------------------------------------------------ maps

const side = at => at.head < 0 ? data.side : data.head_side;     // of the maps of a view

// The map of one column of text: mean over heads (Eq. 10), or one head's, which are kept at the preset's level.
function columnMap(v, at, column) {
  const name = at.direction.toLowerCase();
  return at.head < 0 ? v[name](at.level, at.block, column) : v[name + "_heads"](at.block, at.head, column);
}

// A class of several tokens gets their mean (Sec. 3.4).
function classMap(v, at, k) {
  const maps = data.classes[k].columns.map(column => columnMap(v, at, column));
  return maps[0].map((_, n) => maps.reduce((sum, map) => sum + map[n], 0) / maps.length);
}

// "c3": a class, "t5": a token
const wordMap = (v, at, word) =>
  word[0] === "c" ? classMap(v, at, +word.slice(1)) : columnMap(v, at, +word.slice(1));

const competing = at => data.classes.map((_, k) => k).filter(k => !at.off.includes(k));

// The maps that compete for the mask: [class, map] each, after the reading.
function classMaps(v, at) {
  const ids = competing(at);
  let maps = ids.map(k => classMap(v, at, k));
  if (at.reading !== "paper") {                          // shares: divided by their sum over the classes at each patch
    const sums = maps[0].map((_, n) => maps.reduce((sum, map) => sum + map[n], 0));
    maps = maps.map(map => map.map((x, n) => x / Math.max(sums[n], 1e-30)));
  }
  if (at.reading === "i2i") maps = throughI2I(v, at.block, maps);
  return ids.map((k, i) => [k, maps[i]]);
}

// Each map averaged, at every patch, with the weights of its row of I2I: over the patches that it attends to.
function throughI2I(v, block, maps) {
  const out = maps.map(map => new Float32Array(map.length));
  for (let n = 0; n < maps[0].length; n++) {
    const row = v.i2i(data.i2i_blocks.indexOf(block), n);
    const mass = row.reduce((a, b) => a + b);
    maps.forEach((map, i) => {
      let sum = 0;
      for (let m = 0; m < map.length; m++) sum += row[m] * map[m];
      out[i][n] = sum / mass;
    });
  }
  return out;
}

// A patch of the stored grid -> the patch of another grid at the same place.
function patchIn(patch, otherSide) {
  const x = (patch % data.side + 0.5) / data.side;
  const y = (Math.floor(patch / data.side) + 0.5) / data.side;
  return Math.floor(y * otherSide) * otherSide + Math.floor(x * otherSide);
}

const mean = map => map.reduce((a, b) => a + b, 0) / map.length;

// How much attention goes to each column (its number of tokens counts), at a patch or as a mean over patches (-1).
// I2T: of what a patch gives. T2I: of what one such token gives; over all patches its sum.
function columnValues(v, at, patch) {
  return data.columns.map(({ count }, column) => {
    const map = columnMap(v, at, column);
    const value = patch < 0 ? mean(map) : map[patchIn(patch, side(at))];
    if (at.direction === "I2T") return value * count;
    return patch < 0 ? value * data.patches ** 2 : value;
  });
}

const textShare = (v, at) => columnValues(v, { ...at, direction: "I2T" }, -1).reduce((a, b) => a + b);

// ------------------------------------------------------------------------------------------ masks and scores

// Where a row or column of `to` pixels reads among `from` patches, bilinear without aligned corners, as PyTorch does.
function taps(from, to) {
  return Array.from({ length: to }, (_, i) => {
    const x = Math.max(0, (i + 0.5) * from / to - 0.5);
    const low = Math.min(Math.floor(x), from - 1);
    return [low, Math.min(low + 1, from - 1), x - low];
  });
}

const kept = new Map();                                  // label maps and scores that were computed before
function remember(key, compute) {
  if (kept.size > 400) kept.clear();
  if (!kept.has(key)) kept.set(key, compute());
  return kept.get(key);
}
const keyOf = (v, at) => [v.name, at.block, at.level, at.head, at.reading, at.direction, at.off].join("|");

// Every pixel's best class after the bilinear step: (height * width) numbers of classes.
function labelsOf(v, at) {
  return remember(keyOf(v, at), () => {
    if (at.reading === "pixels") return v.pixels;
    const maps = classMaps(v, at);
    const columns = taps(side(at), width);
    const rows = taps(side(at), height);
    const labels = new Uint8Array(width * height);
    const best = new Float32Array(width * height).fill(-1);
    for (const [k, map] of maps) {
      for (let y = 0; y < height; y++) {
        const [top, bottom, down] = rows[y];
        for (let x = 0; x < width; x++) {
          const [left, right, across] = columns[x];
          const upper = map[top * side(at) + left] * (1 - across) + map[top * side(at) + right] * across;
          const lower = map[bottom * side(at) + left] * (1 - across) + map[bottom * side(at) + right] * across;
          const value = upper * (1 - down) + lower * down;
          if (value > best[y * width + x]) {
            best[y * width + x] = value;
            labels[y * width + x] = k;
          }
        }
      }
    }
    return labels;
  });
}

// IoU of every class of the mask, in percent; null for one that is not in the truth.
function IoUs(v, at) {
  return remember("IoUs" + keyOf(v, at), () => {
    const counts = data.classes.map(() => ({ both: 0, found: 0, there: 0 }));
    labelsOf(v, at).forEach((label, i) => {
      counts[label].found++;
      counts[data.truth[i]].there++;
      if (label === data.truth[i]) counts[label].both++;
    });
    return counts.map(c => c.there > 0 ? 100 * c.both / (c.found + c.there - c.both) : null);
  });
}

// Mean IoU over the classes that are in the truth, in percent (Eq. 14).
function mIoU(v, at) {
  const known = IoUs(v, at).filter(iou => iou !== null);
  return known.reduce((a, b) => a + b) / known.length;
}

// ------------------------------------------------------------------------------------------ what can be shown

const readings = ["paper", "shares", "i2i"].concat(data.variants[0].pixels ? ["pixels"] : []);

// A view that can be shown: single heads, i2i and pixels are kept at the preset's level only. What the reader has just
// changed stays, and the rest gives way.
function settled(at, changed) {
  at = { ...at };
  if (at.head >= 0 && at.level !== data.preset) {
    if (changed === "head") at.level = data.preset;
    else at.head = -1;
  }
  if (changed === "reading" && (at.reading === "i2i" || at.reading === "pixels")) {
    at.level = data.preset;
    at.head = -1;
    at.direction = "I2T";
    if (at.reading === "pixels" || !data.i2i_blocks.includes(at.block)) at.block = data.expert;
    if (at.reading === "pixels") at.off = [];
  }
  const plain = at.level === data.preset && at.head < 0 && at.direction === "I2T";
  if (at.reading === "pixels" && !(plain && at.block === data.expert && !at.off.length)) at.reading = "i2i";
  if (at.reading === "i2i" && !(plain && data.i2i_blocks.includes(at.block))) at.reading = "shares";
  return at;
}

const canLook = at => at.level === data.preset && data.i2i_blocks.includes(at.block);       // is there I2I?
