// Photo search without the page: load the data, embed a text, rank the images.
//
// The embedding of a text is the mean of its word vectors at unit length, and a score is its dot
// product with the embedding of an image. The scripts in data/ call addPage, addPhotos for each block
// of images, and addWords: a page opened from disk may not fetch. view.js displays the results, and
// photo.js an opened one.
"use strict";

const UNKNOWN = 1; // id of <unk>

let dim = 0;
let examples = []; // queries
let knownWords = []; // some words that fit photos of this page
let weakScore = -Infinity; // lower scores are weak matches
// Vectors: int8 codes (rows, dim), and for each row the scale that converts them to floats.
const vocabulary = { total: 0, words: [], ids: new Map(), codes: null, scales: null };
const photos = {
  total: 0, count: 0, // images of the page, and how many of them are loaded
  first: 0, // images of the first file
  names: [], captions: [], pictures: [], codes: null, scales: null,
  groups: [], groupSizes: new Map(), // near duplicates have the same group
};
const NEGATIVE = /(?<!\S)-(?=[\p{L}\p{N}])\S+/gu; // "-people", but not "t-shirt" or " - "

function bytesOf(base64) {
  if (Uint8Array.fromBase64) return Uint8Array.fromBase64(base64);
  const text = atob(base64); // older browsers
  const bytes = new Uint8Array(text.length);
  for (let i = 0; i < text.length; i++) bytes[i] = text.charCodeAt(i);
  return bytes;
}

const codesOf = (data) => new Int8Array(bytesOf(data.codes).buffer);
const scalesOf = (data) => new Float32Array(bytesOf(data.scales).buffer);

function addWords(data) {
  vocabulary.words = data.words;
  data.words.forEach((word, id) => id > UNKNOWN && vocabulary.ids.set(word, id));
  vocabulary.codes = codesOf(data);
  vocabulary.scales = scalesOf(data);
  schedule();
}

function addPage(data) {
  ({ dim, examples, knownWords } = data);
  weakScore = data.weakScore ?? -Infinity;
  dataFiles.push(...data.files);
  vocabulary.total = data.words;
  photos.total = data.photos;
  photos.codes = new Int8Array(Math.ceil(data.photos / 4) * 4 * dim); // see bestPhotos
  photos.scales = new Float32Array(data.photos);
  schedule();
}

function addPhotos(data) {
  const first = photos.count;
  photos.codes.set(codesOf(data), first * dim);
  photos.scales.set(scalesOf(data), first);
  for (let i = 0; i < data.names.length; i++) {
    photos.names.push(data.names[i]);
    photos.captions.push(data.captions[i]);
    photos.pictures.push(data.pictures[i]);
    photos.groups.push(data.groups[i]);
    photos.groupSizes.set(data.groups[i], (photos.groupSizes.get(data.groups[i]) ?? 0) + 1);
  }
  photos.count = photos.names.length;
  photos.first ||= photos.count;
  // Run for 20 ms, so that the browser compiles the ranking before the first query.
  const end = performance.now() + 20;
  while (!first && performance.now() < end) photosLike(0, 24);
  schedule();
}

// The data files after the first one, which are loaded one after the other: on a slow line they
// would delay the first one, with which the page can search already.
const dataFiles = [];
const dataPolicy = globalThis.trustedTypes?.createPolicy("data-files", {
  createScriptURL(url) {
    if (!/^data\/photos-\d+\.js\?v=[0-9a-f]+$/.test(url)) throw new TypeError(url);
    return url;
  },
});

function loadNextFile() {
  const url = dataFiles.shift();
  if (!url) return;
  const script = document.createElement("script");
  script.src = dataPolicy ? dataPolicy.createScriptURL(url) : url;
  for (const event of ["load", "error"]) script.addEventListener(event, loadNextFile);
  document.head.append(script);
}

addEventListener("DOMContentLoaded", loadNextFile); // after the scripts of index.html

// The words of src/models/tokenizer.py: runs of letters, digits and their marks; each Han, Hiragana
// and Katakana character is a word. Variation selectors and joiners are not part of a word.
const CJK = String.raw`\u3005-\u3007\u3021-\u3029\u3038-\u303b\u3041-\u30ff\u31f0-\u31ff\u3400-\u4dbf`
  + String.raw`\u4e00-\u9fff\uf900-\ufaff\u{20000}-\u{3ffff}`;
const MARK = String.raw`(?![\ufe00-\ufe0f\u{e0100}-\u{e01ef}])[\p{Mn}\p{Mc}]`;
const LETTER = String.raw`(?![${CJK}])[\p{L}\p{N}]`;
const WORD = new RegExp(
  String.raw`(?=[\p{L}\p{N}])[${CJK}](?:${MARK})*|${LETTER}(?:${LETTER}|${MARK})*`, "gu");

function splitWords(text) {
  const lower = text.normalize("NFKC").toLowerCase().replace(/[\u200c\u200d]/g, "");
  return lower.match(WORD) ?? [];
}

// "beach -people" subtracts the vector of a word; an unknown word to avoid changes nothing.
function encode(text) {
  const wanted = splitWords(text.replace(NEGATIVE, " "));
  const avoided = (text.match(NEGATIVE) ?? []).flatMap(splitWords);
  const words = [...wanted, ...avoided];
  const ids = words.map((word) => vocabulary.ids.get(word) ?? UNKNOWN);
  const signs = ids.map((id, i) => (i < wanted.length ? 1 : id === UNKNOWN ? 0 : -1));
  const vector = new Float64Array(dim);
  ids.forEach((id, i) => addRow(vector, vocabulary, id, signs[i]));
  const length = normalize(vector); // of the sum: the number of words cancels out
  const known = ids.some((id, i) => id !== UNKNOWN && i < wanted.length);
  const labels = words.map((word, i) => (i < wanted.length ? word : `-${word}`));
  return { words, labels, ids, signs, known, vector, length };
}

// The text with its last word completed to the most frequent word that starts with it, if the word
// is not known as it is: { text, typed, word }.
function complete(text) {
  const tail = text.match(/[\p{L}\p{N}\p{M}]+$/u)?.[0] ?? "";
  const [typed, ...others] = splitWords(tail);
  if (typed && !others.length && !vocabulary.ids.has(typed)) {
    for (const word of vocabulary.ids.keys()) {
      if (word.startsWith(typed)) {
        return { text: text.slice(0, text.length - tail.length) + word, typed, word };
      }
    }
  }
  return { text, typed: "", word: "" };
}

function addRow(vector, { codes, scales }, row, sign = 1) {
  for (let d = 0; d < dim; d++) vector[d] += sign * codes[row * dim + d] * scales[row];
}

function normalize(vector) {
  const length = Math.hypot(...vector) || 1;
  for (let d = 0; d < dim; d++) vector[d] /= length;
  return length;
}

// What each word adds to the score of an image; the score is their exact sum.
function contributionsOf(query, photo) {
  return query.ids.map((id, i) => {
    const a = id * dim, b = photo * dim;
    let dot = 0;
    for (let d = 0; d < dim; d++) dot += vocabulary.codes[a + d] * photos.codes[b + d];
    const value = (dot * vocabulary.scales[id] * photos.scales[photo]) / query.length;
    return value * query.signs[i];
  });
}

// The k best of the loaded images: [{photo, score}], best first, ties in the order of the images.
//
// Integers, four images at a time, take half the time of floats and a quarter of their memory. The
// unit vector is scaled so that no sum overflows 32 bits: a sum is at most the product of the
// lengths, and the codes of an image have a length of at most 127 * sqrt(dim). The resolution is
// about 1e-6, where rounding to int8 changes a score by 1e-3.
function bestPhotos(vector, k) {
  const { count, codes, scales } = photos;
  const steps = 2 ** 31 / (127 * Math.sqrt(dim)) - dim;
  const q = Int32Array.from(vector, (x) => Math.round(x * steps));
  const best = [];
  const offer = (photo, sum) => {
    if (photo >= count) return; // the codes are padded to a multiple of four rows
    const score = (sum * scales[photo]) / steps;
    if (best.length === k && score <= best[k - 1].score) return;
    if (best.length === k) best.pop();
    let at = best.length;
    while (at > 0 && best[at - 1].score < score) at--;
    best.splice(at, 0, { photo, score });
  };
  for (let photo = 0; photo < count; photo += 4) {
    const a = photo * dim, b = a + dim, c = b + dim, d = c + dim;
    let sumA = 0, sumB = 0, sumC = 0, sumD = 0;
    for (let i = 0; i < dim; i++) {
      const x = q[i];
      sumA = (sumA + Math.imul(codes[a + i], x)) | 0;
      sumB = (sumB + Math.imul(codes[b + i], x)) | 0;
      sumC = (sumC + Math.imul(codes[c + i], x)) | 0;
      sumD = (sumD + Math.imul(codes[d + i], x)) | 0;
    }
    offer(photo, sumA);
    offer(photo + 1, sumB);
    offer(photo + 2, sumC);
    offer(photo + 3, sumD);
  }
  return best;
}

// The k best images that are no near duplicates of a better one, or of the image `skip`.
function bestGroups(vector, k, skip = -1) {
  for (let n = k + 16; ; n *= 2) {
    const seen = new Set(skip < 0 ? [] : [photos.groups[skip]]);
    const found = bestPhotos(vector, n).filter(({ photo }) => {
      const group = photos.groups[photo];
      return !seen.has(group) && Boolean(seen.add(group));
    });
    if (found.length >= k || n >= photos.count) return found.slice(0, k);
  }
}

function vectorOf(photo) {
  const vector = new Float64Array(dim);
  addRow(vector, photos, photo);
  normalize(vector); // its length is not exactly 1 after rounding
  return vector;
}

function photosLike(photo, k) {
  return bestPhotos(vectorOf(photo), k + 1).filter((other) => other.photo !== photo).slice(0, k);
}

// The first k images in an order that mixes those of the first file, which are taken from everywhere
// in the folder; the others follow. Any k have the same beginning.
function samplePhotos(k) {
  const { first } = photos;
  const divisor = (a, b) => (b ? divisor(b, a % b) : a);
  let step = Math.max(1, Math.round(first * 0.618));
  while (divisor(step, first) > 1) step += 1;
  return Array.from({ length: Math.min(k, photos.count) }, (_, i) =>
    ({ photo: i < first ? (i * step) % first : i }));
}

// The optimal string alignment distance of two arrays of letters, as edit_distance in
// src/search/query.py: insertions, deletions, replacements and swaps of neighbors.
function editDistance(a, b) {
  let before = [];
  let row = Array.from({ length: b.length + 1 }, (_, j) => j);
  for (let i = 1; i <= a.length; i++) {
    const next = [i];
    for (let j = 1; j <= b.length; j++) {
      next[j] = Math.min(row[j] + 1, next[j - 1] + 1, row[j - 1] + (a[i - 1] !== b[j - 1]));
      const swapped = i > 1 && j > 1 && a[i - 1] === b[j - 2] && a[i - 2] === b[j - 1];
      if (swapped) next[j] = Math.min(next[j], before[j - 2] + 1);
    }
    [before, row] = [row, next];
  }
  return row[b.length];
}

const nearWordsOf = new Map(); // results for words that were looked up before

// Up to four known words that an unknown word may stand for, as near_words in src/search/query.py:
// first the words that start with it, then those within one edit (words of two to four letters) or
// two edits (longer words). Ties are in the order of the vocabulary, the most frequent first.
function nearWords(word) {
  if (nearWordsOf.has(word)) return nearWordsOf.get(word);
  const letters = [...word]; // code points, not UTF-16 units
  const limit = letters.length < 2 ? 0 : letters.length < 5 ? 1 : 2;
  const found = [];
  for (const [other, id] of vocabulary.ids) {
    let distance = limit + 1;
    if (other.startsWith(word)) distance = 0;
    else if (limit) {
      const others = [...other];
      if (Math.abs(others.length - letters.length) <= limit) {
        distance = editDistance(letters, others);
      }
    }
    if (distance <= limit) found.push({ other, distance, id });
  }
  found.sort((a, b) => a.distance - b.distance || a.id - b.id);
  const near = found.slice(0, 4).map(({ other }) => other);
  nearWordsOf.set(word, near);
  return near;
}
