// Photo search, the part without a page: the data, encoding a text, ranking the photos.
//
// A text's embedding is the mean of its words' vectors at length 1, and a score is its dot product
// with a photo's embedding. Data files next to this one call addWords once and addPhotos a few
// times: scripts, since a page opened from disk may not fetch. view.js shows what comes of it.
"use strict";

const UNKNOWN = 1; // id of <unk>

let dim = 0;
let contextLength = 0;
let examples = [];
// Rows of vectors: int8 codes (rows, dim) and for each row the scale that makes floats of them.
const vocabulary = { words: [], ids: new Map(), codes: null, scales: null };
const photos = {
  total: 0, count: 0, // all, and those that have arrived
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
  // Slow until the browser has compiled it: 20 ms of practice, so that no query is the first.
  const enough = performance.now() + 20;
  while (!first && performance.now() < enough) photosLike(0, 24);
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
  const length = normalise(vector); // of the sum: the mean's number of words cancels out
  return { words, ids, vector, length, leftOut: all.length - words.length };
}

function addRow(vector, { codes, scales }, row) {
  for (let d = 0; d < dim; d++) vector[d] += codes[row * dim + d] * scales[row];
}

function normalise(vector) {
  const length = Math.hypot(...vector) || 1;
  for (let d = 0; d < dim; d++) vector[d] /= length;
  return length;
}

// What each word adds to a photo's score: the score is their sum, exactly.
function sharesOf(query, photo) {
  return query.ids.map((id) => {
    const a = id * dim, b = photo * dim;
    let dot = 0;
    for (let d = 0; d < dim; d++) dot += vocabulary.codes[a + d] * photos.codes[b + d];
    return (dot * vocabulary.scales[id] * photos.scales[photo]) / query.length;
  });
}

// The k best of the photos that have arrived: [{photo, score}], best first, ties in their order.
//
// In whole numbers, four photos at a time: half the time of floats, and a quarter of their memory.
// The vector, of length 1, is counted in as many steps as 32 bits hold whatever the photo: no sum
// is larger than the product of the lengths, and codes are no longer than 127 * sqrt(dim). These
// are a million steps: scores move by a millionth, where rounding to int8 moves them a thousandth.
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
  normalise(vector); // rounding has moved it a little from 1
  return bestPhotos(vector, k + 1).filter((other) => other.photo !== photo).slice(0, k);
}

// Insertions, deletions, replacements and swaps of neighbours that make a of b, arrays of letters:
// as edit_distance of src/search/query.py.
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

const nearWordsOf = new Map(); // a longer query should not search for the same word again

// Up to four known words that an unknown one may have meant, as near_words of src/search/query.py: first
// those that it begins (one is still typing), then those one or two mistakes away (one for a word of
// fewer than five letters, none for a single letter); of each the first in the vocabulary, which is
// ordered by frequency.
function nearWords(word) {
  if (nearWordsOf.has(word)) return nearWordsOf.get(word);
  const letters = [...word]; // not UTF-16's halves of letters
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
