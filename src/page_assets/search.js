// Photo search: encodes a text, ranks the photos and shows them, all in this browser.
//
// A text's embedding is the mean of its words' vectors at length 1, and a score is its dot product
// with a photo's embedding. Data files next to this one call addWords once and addPhotos a few
// times: scripts, since a page opened from disk may not fetch. Captions and names are data from
// strangers: they reach the page as text nodes and attributes only, never as markup.
"use strict";

const COUNTS = [12, 24, 48, 96];
const ALIKE = 8; // photos shown as most like the open one
const LONGEST_QUERY = 2000; // characters; far more than the words that count
const UNKNOWN = 1; // id of <unk>

// ---- The data -----------------------------------------------------------------------------------

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
  if (!first) photosLike(0); // slow until the browser has compiled it; not to be a query's fate
  schedule();
}

// ---- The search ---------------------------------------------------------------------------------

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
    let dot = 0;
    for (let d = 0; d < dim; d++) dot += vocabulary.codes[id * dim + d] * photos.codes[photo * dim + d];
    return (dot * vocabulary.scales[id] * photos.scales[photo]) / query.length;
  });
}

// The k best of the photos that have arrived: [{photo, score}], best first, ties in their order.
//
// In whole numbers, four photos at a time: half the time of floats, and a quarter of their memory.
// The vector, of length 1, gets as many steps as 32 bits hold whatever the photo: no sum is larger
// than the product of the lengths, and codes are no longer than 127 * sqrt(dim). That is a million
// steps, so a score is off by a millionth at most, where rounding photos to int8 costs a thousandth.
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

function photosLike(photo) {
  const vector = new Float64Array(dim);
  addRow(vector, photos, photo);
  normalise(vector); // rounding has moved it a little from 1
  return bestPhotos(vector, ALIKE + 1).filter((other) => other.photo !== photo).slice(0, ALIKE);
}

// Insertions, deletions, replacements and swapped neighbours that make a of b.
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

// Up to four known words that an unknown one may have meant: what it begins (one is still typing),
// then what is one or two mistakes away; the more frequent first, as the vocabulary is ordered.
function nearWords(word) {
  if (nearWordsOf.has(word)) return nearWordsOf.get(word);
  const limit = word.length < 5 ? 1 : 2;
  const found = [];
  for (const [other, id] of vocabulary.ids) {
    let distance = limit + 1;
    if (other.startsWith(word)) distance = 0;
    else if (word.length > 1 && Math.abs(other.length - word.length) <= limit) {
      distance = editDistance(word, other);
    }
    if (distance <= limit) found.push({ other, distance, id });
  }
  found.sort((a, b) => a.distance - b.distance || a.id - b.id);
  const near = found.slice(0, 4).map(({ other }) => other);
  nearWordsOf.set(word, near);
  return near;
}

// ---- What is shown lives in the address, so that it can be shared and gone back to ---------------

let state = readAddress();
let typing = false; // within one burst of typing the address is replaced, not added to

function readAddress() {
  const parts = new URLSearchParams(location.hash.slice(1));
  const count = Number(parts.get("n"));
  return {
    text: (parts.get("q") ?? "").slice(0, LONGEST_QUERY),
    count: COUNTS.includes(count) ? count : 24,
    photo: parts.get("photo") ?? "",
  };
}

function addressOf(changes) {
  const { text, count, photo } = { ...state, ...changes };
  const parts = new URLSearchParams();
  if (text) parts.set("q", text);
  if (count !== 24) parts.set("n", count);
  if (photo) parts.set("photo", photo);
  return `#${parts}`;
}

// `opened` counts the entries since the results were left: closing a photo goes back to them.
function go(changes, { replace = false, opened = 0 } = {}) {
  const address = addressOf(changes);
  state = { ...state, ...changes };
  try {
    history[replace ? "replaceState" : "pushState"]({ opened }, "", address);
  } catch {
    // Some browsers refuse after a hundred changes in a few seconds; the next one will be taken.
  }
  schedule();
}

function openedBefore() {
  return history.state?.opened ?? 0;
}

function closePhoto() {
  const opened = openedBefore();
  state.photo = "";
  if (opened) history.go(-opened);
  else go({}, { replace: true });
}

// ---- Drawing ------------------------------------------------------------------------------------

const get = (id) => document.getElementById(id);
const box = get("query");
const countBox = get("count");
const list = get("results");
const dialog = get("photo");
const title = document.title;
const cards = new Map(); // photo -> its <li>, kept while shown so that its picture is not redrawn
let results = []; // what the list shows, in order
let drawn = ""; // what it was drawn for
let drawnPhoto = "";
let waiting = false;

// Anything that changes asks for a drawing; there is one a frame at most.
function schedule() {
  if (waiting) return;
  waiting = true;
  requestAnimationFrame(() => {
    waiting = false;
    draw();
  });
}

// The only maker of elements. Children that are strings become text, whatever they hold.
function el(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...children);
  return node;
}

// Text of strangers: blanks in one line; what would hide or turn around its neighbours made visible.
function tame(text) {
  const hidden = /[\u0000-\u001f\u007f-\u009f\u202a-\u202e\u2066-\u2069]/g;
  return text.replace(/\s+/g, " ").trim().replace(hidden, "\ufffd");
}

const number = (value) => value.toLocaleString("en");
// Flickr30k's captions come in tokens: "on a beach ."
const prose = (caption) => tame(caption).replace(/ +([.,;:!?])/g, "$1");
const labelOf = (photo) => prose(photos.captions[photo][0] ?? "") || tame(photos.names[photo]);
const bdi = (text) => el("bdi", {}, tame(text));

function signed(value, digits) {
  const text = Math.abs(value).toFixed(digits);
  if (Number(text) === 0) return text;
  return (value < 0 ? "\u2212" : "+") + text;
}

function picture(photo, folder) {
  const name = photos.pictures[photo]; // digest_WIDTHxHEIGHT
  const [width, height] = name.split("_")[1].split("x");
  return el("img", {
    src: `${folder}/${name}.jpg`, alt: labelOf(photo), width, height,
    loading: folder === "t" ? "lazy" : "eager", decoding: "async",
  });
}

function draw() {
  if (!dim) return;
  if (box.value !== state.text) box.value = state.text; // writing it would move the caret
  countBox.value = state.count;
  document.title = state.text ? `${tame(state.text)} – ${title}` : title;
  const wanted = JSON.stringify([state.text, state.count, photos.count]);
  if (wanted !== drawn) drawSearch();
  drawn = wanted;
  drawPhoto();
}

function drawSearch() {
  const query = encode(state.text);
  const known = query.ids.some((id) => id !== UNKNOWN);
  const started = performance.now();
  if (known) results = bestPhotos(query.vector, state.count);
  else results = query.words.length ? [] : samplePhotos();
  const took = performance.now() - started;
  drawIntro(!state.text.trim());
  drawNotes(query, known);
  drawResults(query, known);
  get("time").textContent = known ? `${number(photos.count)} scored in ${took.toFixed(1)} ms` : "";
}

// Something to look at before anything is typed: every so many-th photo.
function samplePhotos() {
  const shown = Math.min(state.count, photos.total);
  return Array.from({ length: shown }, (_, i) => Math.floor((i * photos.total) / shown))
    .filter((photo) => photo < photos.count)
    .map((photo) => ({ photo }));
}

function statusLine(query, known) {
  const all = photos.count < photos.total
    ? `the first ${number(photos.count)} of ${number(photos.total)} photos (the rest is loading)`
    : `${number(photos.total)} photos`;
  if (known) return `The ${results.length} best of ${all}`;
  if (!query.words.length) return `${results.length} of ${all}`;
  return query.words.length > 1
    ? "The model has learned none of these words, so there is nothing to rank by."
    : "The model has not learned this word, so there is nothing to rank by.";
}

function drawIntro(shown) {
  const intro = get("intro");
  intro.hidden = !shown;
  if (!shown || intro.hasChildNodes()) return;
  intro.append(
    el("p", { class: "lead" }, "Say in a few words what a picture shows."),
    el("p", {}, `${number(photos.total)} photos are ranked by how well they fit, as you type. `
      + `The model knows ${number(vocabulary.ids.size)} words, not their order.`),
    el("ul", { class: "examples", "aria-label": "Examples" }, ...examples.map((text) =>
      el("li", {}, el("a", { href: addressOf({ text, photo: "" }) }, bdi(text))))),
  );
}

function drawNotes(query, known) {
  const notes = [[statusLine(query, known)]];
  const unknown = [...new Set(query.words.filter((_, i) => query.ids[i] === UNKNOWN))];
  if (state.text.trim() && !query.words.length) {
    notes.push(["There is no word in this"]);
  }
  for (const word of unknown.slice(0, 4)) {
    const near = nearWords(word).map((other) => {
      // Only the word at fault changes; the others stand as the model reads them.
      const text = splitWords(state.text).map((w) => (w === word ? other : w)).join(" ");
      return el("a", { href: addressOf({ text, photo: "" }) }, bdi(other));
    });
    notes.push([el("span", { class: "unknown" }, el("span", { class: "word" }, bdi(word))),
      " is unknown", ...(near.length ? [", nearest: ", ...near] : [])]);
  }
  if (unknown.length > 4) notes.push([`${unknown.length - 4} more unknown`]);
  if (query.leftOut) {
    notes.push([`Only the first ${contextLength} words count, ${number(query.leftOut)} left out`]);
  }
  get("notes").classList.toggle("lost", query.words.length > 0 && !known);
  get("notes").replaceChildren(...notes.map((note) => el("p", {}, ...note)));
}

function drawResults(query, known) {
  const shares = results.map(({ photo }) => (known ? sharesOf(query, photo) : []));
  const largest = Math.max(...shares.flat().map(Math.abs), 1e-9);
  const shown = new Set(results.map(({ photo }) => photo));
  for (const photo of cards.keys()) if (!shown.has(photo)) cards.delete(photo);
  list.classList.toggle("ranked", known);
  list.replaceChildren(...results.map(({ photo, score }, i) => {
    if (!cards.has(photo)) cards.set(photo, newCard(photo));
    const card = cards.get(photo);
    const [link, line] = card.children;
    link.setAttribute("href", addressOf({ photo: photos.names[photo] }));
    const rank = known ? [el("span", { class: "rank" }, `${i + 1}`),
      el("span", { class: "score" }, score.toFixed(3))] : [];
    line.replaceChildren(...rank);
    card.lastChild.replaceChildren(...shareItems(query, shares[i], largest, 2));
    card.lastChild.classList.toggle("many", query.words.length > 10);
    return card;
  }));
}

function newCard(photo) {
  return el("li", { class: "card" },
    el("a", {}, picture(photo, "t")),
    el("p", { class: "line" }),
    // The link is already called by the caption: hidden here, or it would be read twice.
    el("p", { class: "caption", "aria-hidden": "true" }, bdi(labelOf(photo))),
    el("ul", { class: "shares", "aria-label": "Share of each word in the score" }));
}

function shareItems(query, shares, largest, digits) {
  return shares.map((share, i) => {
    const unknown = query.ids[i] === UNKNOWN ? " unknown" : "";
    const item = el("li", { class: (share < 0 ? "minus" : "plus") + unknown },
      el("span", { class: "word" }, bdi(query.words[i])), " ",
      el("span", { class: "value" }, signed(share, digits)));
    item.style.setProperty("--size", Math.abs(share) / largest);
    return item;
  });
}

function drawPhoto() {
  const photo = state.photo ? photos.names.indexOf(state.photo) : -1;
  if (photo < 0) {
    drawnPhoto = "";
    dialog.close();
    if (state.photo && photos.count === photos.total) {
      get("notes").append(el("p", {}, "There is no photo called ", bdi(state.photo), " here"));
      state.photo = "";
    }
    return;
  }
  if (drawnPhoto === drawn + state.photo) return;
  drawnPhoto = drawn + state.photo;
  const full = picture(photo, "f");
  // The thumbnail, already there, until the full size has come.
  full.style.backgroundImage = `url("t/${photos.pictures[photo]}.jpg")`;
  const heading = el("h2", { id: "photo-title", tabindex: "-1" }, bdi(labelOf(photo)));
  dialog.replaceChildren(
    el("div", { class: "frame" }, full),
    el("div", { class: "about" }, heading, ...captionItems(photo), ...scoreItems(photo),
      el("p", { class: "name" }, bdi(photos.names[photo]))),
    el("section", { class: "alike", "aria-label": "Photos most like this" },
      el("h3", {}, "Most like this"),
      el("ul", {}, ...photosLike(photo).map(({ photo: other, score }) =>
        el("li", {}, el("a", { href: addressOf({ photo: photos.names[other] }) },
          picture(other, "t"), el("span", { class: "score" }, score.toFixed(2))))))),
    el("nav", { "aria-label": "Photo" },
      stepButton(photo, -1, "Previous photo", "‹"), stepButton(photo, 1, "Next photo", "›"),
      el("button", { type: "button", "data-close": "", "aria-label": "Close" }, "×")),
  );
  if (!dialog.open) dialog.showModal();
  dialog.scrollTop = 0;
  heading.focus();
}

function captionItems(photo) {
  const others = photos.captions[photo].slice(1);
  return others.length ? [el("ul", { class: "captions", "aria-label": "More captions" },
    ...others.map((caption) => el("li", {}, bdi(prose(caption)))))] : [];
}

function scoreItems(photo) {
  const query = encode(state.text);
  if (query.ids.every((id) => id === UNKNOWN)) return [];
  const shares = sharesOf(query, photo);
  const total = shares.reduce((sum, share) => sum + share, 0);
  const rank = results.findIndex((result) => result.photo === photo) + 1;
  return [
    el("h3", {}, "Why this picture? ", el("span", { class: "score" }, total.toFixed(3)),
      rank ? ` rank ${rank}` : ""),
    el("ul", { class: "bars", "aria-label": "Share of each word in the score" },
      ...shareItems(query, shares, Math.max(...shares.map(Math.abs), 1e-9), 3)),
  ];
}

// ---- Hands on it --------------------------------------------------------------------------------

function neighbour(photo, step) {
  const at = results.findIndex((result) => result.photo === photo);
  return at < 0 ? undefined : results[at + step]?.photo;
}

function stepButton(photo, step, label, sign) {
  const to = neighbour(photo, step);
  const button = el("button", { type: "button", "data-step": step, "aria-label": label }, sign);
  button.disabled = to === undefined;
  return button;
}

function stepPhoto(step) {
  const to = neighbour(photos.names.indexOf(state.photo), step);
  // Replaced: closing should not have to walk back through all of them.
  if (to !== undefined) go({ photo: photos.names[to] }, { replace: true, opened: openedBefore() });
}

box.addEventListener("input", () => {
  go({ text: box.value, photo: "" }, { replace: typing });
  typing = true;
});
box.addEventListener("change", () => (typing = false)); // Enter, or the box was left
document.querySelector("form").addEventListener("submit", (event) => event.preventDefault());

countBox.append(...COUNTS.map((count) => el("option", { value: count }, `${count}`)));
countBox.addEventListener("change", () => go({ count: Number(countBox.value) }));

addEventListener("popstate", () => {
  state = readAddress();
  typing = false;
  schedule();
});

document.addEventListener("click", (event) => {
  const link = event.target.closest('a[href^="#"]');
  if (link && !event.ctrlKey && !event.metaKey && !event.shiftKey) {
    event.preventDefault();
    typing = false;
    const parts = new URLSearchParams(link.getAttribute("href").slice(1));
    const photo = parts.get("photo") ?? "";
    go({ text: parts.get("q") ?? "", photo }, { opened: photo ? openedBefore() + 1 : 0 });
    if (!photo) box.focus();
  }
  const step = event.target.closest("[data-step]");
  if (step) stepPhoto(Number(step.dataset.step));
  // The dialog itself is hit only beside what it holds.
  if (event.target === dialog || event.target.closest("[data-close]")) dialog.close();
});

// Closed by Esc, the button or a click beside it; not when the address closed it, which is known.
dialog.addEventListener("close", () => state.photo && closePhoto());

document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || event.isComposing) return;
  const links = [...list.querySelectorAll(".card > a")];
  const at = links.indexOf(document.activeElement);
  const columns = getComputedStyle(list).gridTemplateColumns.split(" ").length;
  const steps = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -columns, ArrowDown: columns };
  const step = steps[event.key];
  if (dialog.open) {
    if (event.key === "ArrowLeft" || event.key === "ArrowRight") stepPhoto(step);
  } else if (event.key === "/" && document.activeElement !== box) {
    event.preventDefault();
    box.select();
  } else if (event.key === "ArrowDown" && document.activeElement === box) {
    event.preventDefault();
    links[0]?.focus();
  } else if (at >= 0 && step) {
    event.preventDefault();
    if (at + step < 0 && event.key === "ArrowUp") box.focus();
    else links[at + step]?.focus();
  }
});

// A data file that did not come: say so, instead of searching a part in silence.
addEventListener("error", ({ target }) => {
  if (target.tagName !== "SCRIPT") return;
  get("missing").hidden = false;
  get("missing").append(el("p", {}, `Missing: ${target.getAttribute("src")}. This page is not `
    + "whole: copy its whole folder, or write it anew."));
}, true);
