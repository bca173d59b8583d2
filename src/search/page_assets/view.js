// Photo search, the page: draw what search.js finds; handle keys, clicks and the URL.
//
// Captions and names are untrusted: they become text nodes and attributes, never markup.
"use strict";

const PAGE = 24; // results that are added at a time
const LONGEST_QUERY = 2000; // characters; far more than the words that are used

// ---- The state is in the URL, so that it can be shared and the back button works ----------------

let state = readAddress();
let typing = false; // while a query is typed, its history entry is replaced

function readAddress() {
  const parts = new URLSearchParams(location.hash.slice(1));
  return {
    text: (parts.get("q") ?? "").slice(0, LONGEST_QUERY),
    like: parts.get("like") ?? "", // a photo is the query instead of a text
    photo: parts.get("photo") ?? "",
    all: parts.get("d") === "1", // near duplicates are shown one by one
  };
}

function addressOf(changes) {
  const { text, like, photo, all } = { ...state, ...changes };
  const parts = new URLSearchParams();
  if (text) parts.set("q", text);
  if (like) parts.set("like", like);
  if (photo) parts.set("photo", photo);
  if (all) parts.set("d", "1");
  return `#${parts}`;
}

// `opened` counts the history entries of opened images: closing an image goes back over them.
function go(changes, { replace = false, opened = 0, redraw = true } = {}) {
  const address = addressOf(changes);
  state = { ...state, ...changes };
  try {
    history[replace ? "replaceState" : "pushState"]({ opened }, "", address);
  } catch {
    // Some browsers refuse a hundred changes in a few seconds; a later change sets the URL again.
  }
  if (redraw) schedule();
}

function openedBefore() {
  return history.state?.opened ?? 0;
}

// ---- Drawing ------------------------------------------------------------------------------------

// The address of a link. Its text is the one that was searched for: while letters are typed that do
// not change the completed query, the links stay as they are.
const linkTo = (changes) => addressOf({ text: drawnText, ...changes });

const get = (id) => document.getElementById(id);
const box = get("query");
const list = get("results");
const title = document.title;
const cards = new Map(); // image -> its <li>, kept while it is shown
let results = []; // the hits in the list, in order
let largest = 0; // the largest contribution of a word among the first results
let drawn = ""; // the state that is drawn
let drawnText = ""; // the query with its last word completed
let more = 0; // results beyond the first PAGE
let missingFiles = false;
let waiting = false;

// Every change requests a drawing; there is at most one per frame.
function schedule() {
  if (waiting) return;
  waiting = true;
  requestAnimationFrame(() => {
    waiting = false;
    draw();
  });
}

// Creates every element. Children that are strings become text, whatever they hold.
function el(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...children);
  return node;
}

// Untrusted text in one line; characters that hide or reverse other text are replaced.
function tame(text) {
  const hidden = /[\u0000-\u001f\u007f-\u009f\u202a-\u202e\u2066-\u2069]/g;
  return text.replace(/\s+/g, " ").trim().replace(hidden, "\ufffd");
}

const number = (value) => value.toLocaleString("en");
// Captions of Flickr30k are tokenized: "on a beach ."
const prose = (caption) => tame(caption).replace(/ +([.,;:!?])(?=\s|$)/g, "$1");
const labelOf = (photo) => prose(photos.captions[photo][0] ?? "") || tame(photos.names[photo]);
const bdi = (text) => el("bdi", {}, tame(text));

function signed(value, digits) {
  const text = Math.abs(value).toFixed(digits);
  if (Number(text) === 0) return text;
  return (value < 0 ? "\u2212" : "+") + text;
}

// Width and height in pixels of the large image, from its name: DIGEST_WIDTHxHEIGHT.
const sizeOf = (photo) => photos.pictures[photo].split("_")[1].split("x").map(Number);

function picture(photo, folder) {
  const [width, height] = sizeOf(photo);
  return el("img", {
    src: `${folder}/${photos.pictures[photo]}.jpg`, alt: labelOf(photo), width, height,
    loading: folder === "t" ? "lazy" : "eager", decoding: "async",
  });
}

function draw() {
  if (!dim) return;
  get("wait")?.remove();
  if (box.value !== state.text) box.value = state.text; // setting it always would move the cursor
  // While the last word is unfinished, its completion counts.
  const completed = typing ? complete(state.text) : { text: state.text, typed: "" };
  drawnText = completed.text;
  const wanted = [completed.text, state.like, state.all];
  const isNew = drawn && JSON.stringify(JSON.parse(drawn).slice(0, 3)) !== JSON.stringify(wanted);
  if (isNew) {
    more = 0;
    scrollTo(0, 0);
  }
  const loaded = `${photos.count} ${vocabulary.ids.size}`;
  const key = JSON.stringify([...wanted, loaded, more, completed.typed, missingFiles]);
  const [, , , before, shown] = JSON.parse(drawn || "[]");
  const isLonger = !isNew && before === loaded && shown <= more;
  if (key !== drawn) drawSearch(completed, isLonger ? results.length : 0);
  drawn = key;
  drawPhoto();
}

// What is searched for: a text, which waits for the words, or with { like } the number of a photo.
function currentQuery(text) {
  const like = state.like ? photos.names.indexOf(state.like) : -1;
  if (like < 0 && !vocabulary.codes) return { ...encode(""), like, waits: Boolean(text.trim()) };
  if (like < 0) return { ...encode(text), like };
  return { ...encode(""), like, known: true, vector: vectorOf(like) };
}

function findPhotos(query, count) {
  const { known, vector, like } = query;
  if (isLost(query) || query.waits || (state.like && like < 0 && isLoading())) return [];
  if (!known) return samplePhotos(count);
  if (!state.all) return bestGroups(vector, count, like);
  return bestPhotos(vector, count + (like >= 0)).filter(({ photo }) => photo !== like)
    .slice(0, count);
}

// Whether there are words to search for, and none of them is known.
const isLost = ({ known, words, labels }) =>
  !known && words.some((word, i) => word === labels[i]);
const isLoading = () => photos.count < photos.total && !missingFiles;

// Draw the results from number `first` on; those before are as they were.
function drawSearch(completed, first) {
  const query = currentQuery(completed.text);
  const started = performance.now();
  results = findPhotos(query, PAGE + more);
  const took = performance.now() - started;
  const name = query.like >= 0 ? `Photos like ${labelOf(query.like)}` : tame(state.text);
  document.title = name ? `${name} – ${title}` : title;
  drawIntro(query);
  drawNotes(query, completed);
  drawResults(query, first);
  const button = get("more");
  button.hidden = results.length < PAGE + more;
  nearEnd.unobserve(button); // observed again, it reports whether it is still near
  nearEnd.observe(button);
  const time = took < 1 ? "less than 1 ms" : `${took.toFixed(0)} ms`;
  get("time").textContent = query.known && photos.count ? `${number(photos.count)} scored in ${time}` : "";
}

// ---- Above the photos: the introduction, and what to know about the results ---------------------

const queryLink = (text, ...shown) =>
  el("a", { href: linkTo({ text, like: "", photo: "" }) }, ...(shown.length ? shown : [bdi(text)]));

function drawIntro(query) {
  const shown = isLost(query) ? "nothing" : state.like || state.text.trim() ? "" : "start";
  const intro = get("intro");
  if (document.body.className === shown && intro.hidden !== Boolean(shown)) return;
  intro.hidden = !shown;
  document.body.className = shown;
  const chips = (name, texts) => (texts.length ? [
    el("ul", { class: "examples", "aria-label": name }, ...texts.map((text) =>
      el("li", {}, queryLink(text))))] : []);
  const words = number(vocabulary.total);
  if (shown === "start") {
    intro.replaceChildren(
      el("p", { class: "lead" }, "Describe a photo in a few words."),
      el("p", {}, `${photos.total === 1 ? "1 photo is" : `${number(photos.total)} photos are`} ranked as you type. `
        + `The model knows ${words} words and ignores their order. `
        + "A minus sign before a word avoids it."),
      ...chips("Examples", examples));
  } else if (shown) {
    intro.replaceChildren(
      el("p", {}, "A photo is found by words that the model knows. Try one of these:"),
      ...chips("Examples", examples),
      el("p", {}, `Some of the ${words} words that it knows:`),
      ...chips("Known words", knownWords));
  }
}

function drawNotes(query, completed) {
  const notes = [photosNote(query), likeNote(query), weakNote(query), ...wordNotes(query, completed),
    duplicatesNote(query)];
  get("notes").replaceChildren(...notes.filter(Boolean).map((note) => el("p", {}, ...note)));
}

// How many photos were searched.
function photosNote(query) {
  if (!photos.total) return ["There are no photos"];
  if (!photos.count) return [missingFiles ? "No photo is loaded" : "Loading the photos …"];
  if (isLost(query)) return ["Nothing found"];
  if (query.waits) return [missingFiles ? "No word is loaded" : "Loading the words …"];
  const order = query.known ? ", the best first" : "";
  if (photos.count === photos.total) return [`${number(photos.total)} ${photos.total === 1 ? "photo" : "photos"}${order}`];
  return [`The first ${number(photos.count)} of ${number(photos.total)} photos${order}`,
    missingFiles ? "; others are missing" : "; the others are loading …"];
}

function likeNote({ like }) {
  if (!state.like) return null;
  const end = el("a", { href: linkTo({ like: "", photo: "" }), "aria-label": "End" }, "×");
  if (like >= 0) {
    return [el("span", { class: "liked" }, "like ", picture(like, "t"), bdi(labelOf(like))), " ", end];
  }
  if (isLoading()) return null;
  return ["There is no photo named ", bdi(state.like), " ", end];
}

function weakNote({ known, like }) {
  const weak = known && like < 0 ? results.findIndex(({ score }) => score < weakScore) : -1;
  if (weak < 0) return null;
  const title = "Nine in ten captions of the validation photos have a higher score with their own "
    + `photo: ${weakScore.toFixed(3)}`;
  return [el("span", { title }, weak ? `Weak matches from number ${number(weak + 1)} on`
    : "Weak matches: no photo fits well")];
}

function wordNotes(query, { typed, word }) {
  const notes = [];
  if (typed && query.known) notes.push([bdi(typed), " … counts as ", bdi(word)]);
  if (state.text.trim() && !query.words.length && !query.waits) notes.push(["The query has no words"]);
  else if (!query.known && !isLost(query) && query.words.length) {
    notes.push(["Words to avoid need a word to search for"]);
  }
  const unknown = [...new Set(query.words.filter((_, i) => query.ids[i] === UNKNOWN))];
  if (!unknown.length) return notes;
  const more = unknown.length > 4 ? ` and ${unknown.length - 4} more` : "";
  notes.push(["Not known: ", ...unknown.slice(0, 4).flatMap((one, i) => [
    i ? ", " : "", el("span", { class: "unknown" }, el("span", { class: "word" }, bdi(one)))]), more]);
  // Only unknown words are replaced; the others are as the model reads them.
  const replaced = (choose) => query.words.map((w, i) =>
    (query.labels[i] === w ? "" : "-") + (unknown.includes(w) ? choose(w) : w)).join(" ");
  const near = new Map(unknown.slice(0, 20).map((one) => [one, nearWords(one)]));
  if (![...near.values()].some((words) => words.length)) return notes;
  notes.push(["Did you mean ", queryLink(replaced((w) => near.get(w)?.[0] ?? w)),
    ...(unknown.length > 1 ? [] : near.get(unknown[0]).slice(1).flatMap((other, i) => [
      i ? ", " : " Or ", queryLink(replaced(() => other), bdi(other))]))]);
  return notes;
}

function duplicatesNote(query) {
  const hidden = results.reduce((sum, { photo }) => sum + copiesOf(photo), 0);
  if (!query.known || !(hidden || state.all)) return null;
  return [state.all ? "" : `${number(hidden)} near duplicates are hidden `,
    el("a", { href: linkTo({ all: !state.all }) },
      state.all ? "Hide near duplicates" : "show all")];
}

// How many near duplicates an image stands for.
function copiesOf(photo) {
  return state.all ? 0 : photos.groupSizes.get(photos.groups[photo]) - 1;
}

// ---- The photos ---------------------------------------------------------------------------------

function drawResults(query, first) {
  const added = results.slice(first);
  const merged = added.map(({ photo }) =>
    (query.known ? mergeWords(query, contributionsOf(query, photo)) : []));
  if (!first) {
    largest = Math.max(...merged.flat().map(({ value }) => Math.abs(value)), 1e-9);
    const shown = new Set(results.map(({ photo }) => photo));
    for (const photo of cards.keys()) if (!shown.has(photo)) cards.delete(photo);
    list.replaceChildren();
  }
  list.append(...added.map((result, i) => drawCard(query, result, first + i + 1, merged[i])));
}

function drawCard({ known, like }, { photo, score }, rank, merged) {
  if (!cards.has(photo)) cards.set(photo, newCard(photo));
  const card = cards.get(photo);
  const [link, line] = card.children;
  link.setAttribute("href", linkTo({ photo: photos.names[photo] }));
  line.replaceChildren();
  if (known) {
    line.append(el("span", { class: "rank" }, `${rank}`));
    const copies = copiesOf(photo);
    const title = `${copies} near duplicates`;
    if (copies) line.append(el("span", { class: "copies", title }, `+${copies}`));
    const weak = like < 0 && score < weakScore ? "weak " : "";
    line.append(el("span", { class: "score" }, weak + score.toFixed(3)));
  }
  card.lastChild.replaceChildren(...contributionItems(merged, largest, 2));
  card.lastChild.classList.toggle("many", merged.length > 10);
  return card;
}

function newCard(photo) {
  const [width, height] = sizeOf(photo);
  const card = el("li", { class: "card" },
    el("a", {}, picture(photo, "t")),
    el("p", { class: "line" }),
    // Hidden from screen readers: the alt text of the image already reads the caption.
    el("p", { class: "caption", "aria-hidden": "true" }, bdi(labelOf(photo))),
    el("ul", { class: "contributions", "aria-label": "Contribution of each word to the score" }));
  // The rows are filled by widths in proportion; very narrow and very wide images get a frame.
  card.style.setProperty("--ratio", Math.min(2.6, Math.max(0.7, width / height)));
  return card;
}

// The contributions of a query's words to a score, with repeated words added up.
function mergeWords(query, contributions) {
  const merged = new Map();
  contributions.forEach((value, i) => {
    const label = query.labels[i];
    const found = merged.get(label) ?? { label, value: 0, count: 0, unknown: query.ids[i] === UNKNOWN };
    merged.set(label, { ...found, value: found.value + value, count: found.count + 1 });
  });
  return [...merged.values()];
}

function contributionItems(merged, largest, digits) {
  return merged.map(({ label, value, count, unknown }) => {
    const item = el("li", { class: (value < 0 ? "minus" : "plus") + (unknown ? " unknown" : "") },
      el("span", { class: "word" }, bdi(label), count > 1 ? ` ×${count}` : ""), " ",
      el("span", { class: "value" }, signed(value, digits)));
    item.style.setProperty("--size", Math.abs(value) / largest);
    return item;
  });
}

// ---- Input --------------------------------------------------------------------------------------

box.addEventListener("input", () => {
  go({ text: box.value, like: "", photo: "" }, { replace: typing });
  typing = true;
});

// Enter, or the focus left the box: the word is finished, and the completion that counted is written.
box.addEventListener("change", () => {
  if (!typing) return;
  typing = false;
  box.value = complete(box.value).text;
  // The results are the same. A new link under a pressed mouse button would not be clicked.
  go({ text: box.value }, { replace: true, opened: openedBefore(), redraw: false });
});
document.querySelector("form").addEventListener("submit", (event) => {
  event.preventDefault();
  schedule();
});

function showMore() {
  if (get("more").hidden || !drawn || JSON.parse(drawn)[4] !== more) return;
  more += PAGE;
  schedule();
}

get("more").addEventListener("click", showMore);
// The next results are drawn one screen before the end of the list comes into view.
const nearEnd = new IntersectionObserver((entries) => {
  if (entries.at(-1).isIntersecting) showMore();
}, { rootMargin: "0px 0px 100% 0px" });

addEventListener("popstate", () => {
  state = readAddress();
  typing = false;
  schedule();
});

document.addEventListener("click", (event) => {
  const link = event.target.closest('a[href^="#"]');
  if (!link || event.ctrlKey || event.metaKey || event.shiftKey) return;
  event.preventDefault();
  typing = false;
  const parts = new URLSearchParams(link.getAttribute("href").slice(1));
  const [text, like, photo] = ["q", "like", "photo"].map((name) => parts.get(name) ?? "");
  const all = parts.get("d") === "1";
  go({ text, like, photo, all }, { opened: photo ? openedBefore() + 1 : 0 });
  // On a phone the focus would open the keyboard.
  if (!photo && !like && !matchMedia("(pointer: coarse)").matches) box.focus();
});

// The link above or below another one, in the nearest row.
function linkInRow(links, at, direction) {
  const own = links[at].getBoundingClientRect();
  let best;
  let least = Infinity;
  for (const link of links) {
    const { left, width, top } = link.getBoundingClientRect();
    const rows = (top - own.top) * direction;
    const distance = 1000 * rows + Math.abs(left + width / 2 - own.left - own.width / 2);
    if (rows > 1 && distance < least) [best, least] = [link, distance];
  }
  return best;
}

document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || event.isComposing || dialog.open) return;
  const links = [...list.querySelectorAll(".card > a")];
  const at = links.indexOf(document.activeElement);
  const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
  const direction = { ArrowUp: -1, ArrowDown: 1 }[event.key];
  if (event.key === "/" && document.activeElement !== box) {
    event.preventDefault();
    box.select();
  } else if (event.key === "ArrowDown" && document.activeElement === box) {
    event.preventDefault();
    links[0]?.focus();
  } else if (at >= 0 && (step || direction)) {
    event.preventDefault();
    const to = step ? links[at + step] : linkInRow(links, at, direction);
    if (to) to.focus();
    else if (direction < 0) box.focus();
  }
});

// ---- What is missing ----------------------------------------------------------------------------

get("alone").remove();
for (const node of document.querySelectorAll("form, footer")) node.hidden = false;

// A data file that is missing is named, because only a part of the images is searched. A missing
// picture gets a quiet placeholder.
function reportMissing(file) {
  missingFiles = true;
  get("wait")?.remove();
  get("missing").hidden = false;
  get("missing").append(el("p", {}, `Missing: ${file}. The page is incomplete: copy its whole `
    + "folder, or write it again."));
}

addEventListener("error", ({ target }) => {
  if (target.tagName === "IMG") target.parentNode.classList.add("no-picture");
  if (target.tagName !== "SCRIPT") return;
  reportMissing(target.getAttribute("src"));
  if (typeof dim === "number") schedule();
}, true);
if (typeof dim !== "number") reportMissing("search.js"); // its event came before this listener
