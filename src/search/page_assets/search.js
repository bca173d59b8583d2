// Photo search without the page: load the data, embed a text, rank the images.
//
// The embedding of a text is the mean of its word vectors at unit length, and a score is its dot
// product with the embedding of an image. The scripts in data/ call addWords once and addPhotos for
// each block of images: a page opened from disk may not fetch. view.js displays the results.
"use strict";

const UNKNOWN = 1; // id of <unk>

let dim = 0;
let contextLength = 0;
let examples = [];
// Vectors: int8 codes (rows, dim), and for each row the scale that converts them to floats.
const vocabulary = { words: [], ids: new Map(), codes: null, scales: null };
const photos = {
  total: 0, count: 0, // images of the page, and how many of them are loaded
  names: [], captions: [], pictures: [], codes: null, scales: null,
};

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
  ({ dim, contextLength, examples } = data);
  vocabulary.words = data.words;
  data.words.forEach((word, id) => id > UNKNOWN && vocabulary.ids.set(word, id));
  vocabulary.codes = codesOf(data);
  vocabulary.scales = scalesOf(data);
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
  }
  photos.count = photos.names.length;
  // Run for 20 ms, so that the browser compiles the ranking before the first query.
  const end = performance.now() + 20;
  while (!first && performance.now() < end) photosLike(0, 24);
  schedule();
}

// The tokenizer that the model was trained with: runs of letters and digits of any script.
function splitWords(text) {
  return text.normalize("NFKC").toLowerCase().match(/[\p{L}\p{N}]+/gu) ?? [];
}

function encode(text) {
  const all = splitWords(text);
  const words = all.slice(0, contextLength);
  const ids = words.map((word) => vocabulary.ids.get(word) ?? UNKNOWN);
  const vector = new Float64Array(dim);
  for (const id of ids) addRow(vector, vocabulary, id);
  const length = normalize(vector); // of the sum: the number of words cancels out
  return { words, ids, vector, length, leftOut: all.length - words.length };
}

function addRow(vector, { codes, scales }, row) {
  for (let d = 0; d < dim; d++) vector[d] += codes[row * dim + d] * scales[row];
}

function normalize(vector) {
  const length = Math.hypot(...vector) || 1;
  for (let d = 0; d < dim; d++) vector[d] /= length;
  return length;
}

// What each word adds to the score of an image; the score is their exact sum.
function contributionsOf(query, photo) {
  return query.ids.map((id) => {
    const a = id * dim, b = photo * dim;
    let dot = 0;
    for (let d = 0; d < dim; d++) dot += vocabulary.codes[a + d] * photos.codes[b + d];
    return (dot * vocabulary.scales[id] * photos.scales[photo]) / query.length;
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

function photosLike(photo, k) {
  const vector = new Float64Array(dim);
  addRow(vector, photos, photo);
  normalize(vector); // its length is not exactly 1 after rounding
  return bestPhotos(vector, k + 1).filter((other) => other.photo !== photo).slice(0, k);
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
