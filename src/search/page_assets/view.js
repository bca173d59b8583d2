// Photo search, the page: draw what search.js finds; handle keys, clicks and the URL.
//
// Captions and names are untrusted: they become text nodes and attributes, never markup.
"use strict";

const COUNTS = [12, 24, 48, 96];
const ALIKE = 8; // similar images shown below an open one
const LONGEST_QUERY = 2000; // characters; far more than the words that are used

// ---- The state is in the URL, so that it can be shared and the back button works ----------------

let state = readAddress();
let typing = false; // while a query is typed, its history entry is replaced

function readAddress() {
  const parts = new URLSearchParams(location.hash.slice(1));
  const count = Number(parts.get("n"));
  return {
    text: (parts.get("q") ?? "").slice(0, LONGEST_QUERY),
    count: COUNTS.includes(count) ? count : 24,
    photo: parts.get("photo") ?? "",
    all: parts.get("d") === "1", // near duplicates are shown one by one
  };
}

function addressOf(changes) {
  const { text, count, photo, all } = { ...state, ...changes };
  const parts = new URLSearchParams();
  if (text) parts.set("q", text);
  if (count !== 24) parts.set("n", count);
  if (photo) parts.set("photo", photo);
  if (all) parts.set("d", "1");
  return `#${parts}`;
}

// `opened` counts the history entries of opened images: closing an image goes back over them.
function go(changes, { replace = false, opened = 0 } = {}) {
  const address = addressOf(changes);
  state = { ...state, ...changes };
  try {
    history[replace ? "replaceState" : "pushState"]({ opened }, "", address);
  } catch {
    // Some browsers refuse a hundred changes in a few seconds; a later change sets the URL again.
  }
  schedule();
}

function openedBefore() {
  return history.state?.opened ?? 0;
}

function closePhoto() {
  const opened = openedBefore();
  state.photo = "";
  drawnPhoto = "";
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
const cards = new Map(); // image -> its <li>, kept while it is shown
let results = []; // the hits in the list, in order
let drawn = ""; // the state that is drawn
let drawnPhoto = "";
let lastPhoto = -1;
let more = 0; // results beyond the chosen number, after scrolling
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
  if (box.value !== state.text) box.value = state.text; // setting it always would move the cursor
  countBox.value = state.count;
  document.title = state.text ? `${tame(state.text)} – ${title}` : title;
  const wanted = [state.text, state.count, photos.count, state.all];
  if (drawn && JSON.stringify(JSON.parse(drawn).slice(0, 4)) !== JSON.stringify(wanted)) more = 0;
  const key = JSON.stringify([...wanted, more]);
  if (key !== drawn) drawSearch();
  drawn = key;
  drawPhoto();
}

function drawSearch() {
  const query = encode(state.text);
  const { known } = query;
  const started = performance.now();
  const best = state.all ? bestPhotos : bestGroups;
  if (known) results = best(query.vector, state.count + more);
  else results = query.words.length ? [] : samplePhotos();
  const took = performance.now() - started;
  drawIntro(!state.text.trim());
  drawNotes(query, known);
  drawResults(query, known);
  get("more").hidden = !known || results.length < state.count + more;
  const time = took < 1 ? "less than 1 ms" : `${took.toFixed(0)} ms`;
  get("time").textContent = known ? `${number(photos.count)} scored in ${time}` : "";
}

// Images at regular intervals, shown before anything is typed.
function samplePhotos() {
  const shown = Math.min(state.count, photos.total);
  return Array.from({ length: shown }, (_, i) => Math.floor((i * photos.total) / shown))
    .filter((photo) => photo < photos.count)
    .map((photo) => ({ photo }));
}

function statusLine(query, known) {
  const all = photos.count < photos.total
    ? `the first ${number(photos.count)} of ${number(photos.total)} photos (more are loading)`
    : `${number(photos.total)} photos`;
  if (known) return `The ${results.length} best of ${all}`;
  if (!query.words.length) return `${results.length} of ${all}`;
  return query.words.length > 1
    ? "None of these words is in the vocabulary, so nothing can be ranked."
    : "This word is not in the vocabulary, so nothing can be ranked.";
}

function drawIntro(shown) {
  const intro = get("intro");
  intro.hidden = !shown;
  if (!shown || intro.hasChildNodes()) return;
  intro.append(
    el("p", { class: "lead" }, "Describe a photo in a few words."),
    el("p", {}, `${number(photos.total)} photos are ranked as you type. `
      + `The model knows ${number(vocabulary.ids.size)} words and ignores their order. `
      + "A minus sign before a word avoids it."),
    el("ul", { class: "examples", "aria-label": "Examples" }, ...examples.map((text) =>
      el("li", {}, el("a", { href: addressOf({ text, photo: "" }) }, bdi(text))))),
  );
}

function drawNotes(query, known) {
  const notes = [[statusLine(query, known)]];
  const unknown = [...new Set(query.words.filter((_, i) => query.ids[i] === UNKNOWN))];
  if (state.text.trim() && !query.words.length) {
    notes.push(["The query has no words"]);
  }
  for (const word of unknown.slice(0, 4)) {
    const near = nearWords(word).map((other) => {
      // Only the unknown word is replaced; the others are as the model reads them.
      const text = query.words.map((w, i) =>
        (query.labels[i] === w ? "" : "-") + (w === word ? other : w)).join(" ");
      return el("a", { href: addressOf({ text, photo: "" }) }, bdi(other));
    });
    notes.push([el("span", { class: "unknown" }, el("span", { class: "word" }, bdi(word))),
      " is not in the vocabulary", ...(near.length ? [", similar: ", ...near] : [])]);
  }
  if (unknown.length > 4) notes.push([`${unknown.length - 4} more words are not in the vocabulary`]);
  const hidden = results.reduce((sum, { photo }) => sum + copiesOf(photo), 0);
  if (known && (hidden || state.all)) {
    notes.push([state.all ? "" : `${number(hidden)} near duplicates are hidden `,
      el("a", { href: addressOf({ all: !state.all }) },
        state.all ? "Hide near duplicates" : "show all")]);
  }
  get("notes").classList.toggle("lost", query.words.length > 0 && !known);
  get("notes").replaceChildren(...notes.map((note) => el("p", {}, ...note)));
}

// How many near duplicates an image stands for.
function copiesOf(photo) {
  return state.all ? 0 : photos.groupSizes.get(photos.groups[photo]) - 1;
}

function drawResults(query, known) {
  const contributions = results.map(({ photo }) => (known ? contributionsOf(query, photo) : []));
  const largest = Math.max(...contributions.flat().map(Math.abs), 1e-9);
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
    if (known && copiesOf(photo)) {
      const title = `${copiesOf(photo)} near duplicates`;
      rank.splice(1, 0, el("span", { class: "copies", title }, `+${copiesOf(photo)}`));
    }
    line.replaceChildren(...rank);
    card.lastChild.replaceChildren(...contributionItems(query, contributions[i], largest, 2));
    card.lastChild.classList.toggle("many", query.words.length > 10);
    return card;
  }));
}

function newCard(photo) {
  return el("li", { class: "card" },
    el("a", {}, picture(photo, "t")),
    el("p", { class: "line" }),
    // Hidden from screen readers: the alt text of the image already reads the caption.
    el("p", { class: "caption", "aria-hidden": "true" }, bdi(labelOf(photo))),
    el("ul", { class: "contributions", "aria-label": "Contribution of each word to the score" }));
}

function contributionItems(query, contributions, largest, digits) {
  return contributions.map((value, i) => {
    const unknown = query.ids[i] === UNKNOWN ? " unknown" : "";
    const item = el("li", { class: (value < 0 ? "minus" : "plus") + unknown },
      el("span", { class: "word" }, bdi(query.labels[i])), " ",
      el("span", { class: "value" }, signed(value, digits)));
    item.style.setProperty("--size", Math.abs(value) / largest);
    return item;
  });
}

function drawPhoto() {
  const photo = state.photo ? photos.names.indexOf(state.photo) : -1;
  if (photo < 0) {
    drawnPhoto = "";
    dialog.close();
    if (state.photo && photos.count === photos.total) {
      get("notes").append(el("p", {}, "There is no photo named ", bdi(state.photo)));
      state.photo = "";
    }
    return;
  }
  if (drawnPhoto === drawn + state.photo) return;
  drawnPhoto = drawn + state.photo;
  lastPhoto = photo;
  const full = picture(photo, "f");
  // The thumbnail is shown until the large image is loaded.
  full.style.backgroundImage = `url("t/${photos.pictures[photo]}.jpg")`;
  const heading = el("h2", { id: "photo-title", tabindex: "-1" }, bdi(labelOf(photo)));
  dialog.replaceChildren(
    el("div", { class: "frame" }, full),
    el("div", { class: "about" }, heading, ...captionItems(photo), ...scoreItems(photo),
      el("p", { class: "name" }, bdi(photos.names[photo]))),
    el("section", { class: "alike", "aria-label": "Similar photos" },
      el("h3", {}, "Similar photos"),
      el("ul", {}, ...photosLike(photo, ALIKE).map(({ photo: other, score }) =>
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
  if (!query.known) return [];
  const contributions = contributionsOf(query, photo);
  const total = contributions.reduce((sum, value) => sum + value, 0);
  const rank = results.findIndex((result) => result.photo === photo) + 1;
  return [
    el("h3", {}, "Contributions of the words ", el("span", { class: "score" }, total.toFixed(3)),
      rank ? ` rank ${rank}` : ""),
    el("ul", { class: "bars", "aria-label": "Contribution of each word to the score" },
      ...contributionItems(query, contributions,
        Math.max(...contributions.map(Math.abs), 1e-9), 3)),
  ];
}

// ---- Input --------------------------------------------------------------------------------------

function neighbor(photo, step) {
  const at = results.findIndex((result) => result.photo === photo);
  return at < 0 ? undefined : results[at + step]?.photo;
}

function stepButton(photo, step, label, sign) {
  const to = neighbor(photo, step);
  const button = el("button", { type: "button", "data-step": step, "aria-label": label }, sign);
  button.disabled = to === undefined;
  return button;
}

function stepPhoto(step) {
  const to = neighbor(photos.names.indexOf(state.photo), step);
  // Replaced, so that closing goes back to the results in one step.
  if (to !== undefined) go({ photo: photos.names[to] }, { replace: true, opened: openedBefore() });
}

box.addEventListener("input", () => {
  go({ text: box.value, photo: "" }, { replace: typing });
  typing = true;
});
box.addEventListener("change", () => (typing = false)); // Enter, or the focus left the box
document.querySelector("form").addEventListener("submit", (event) => event.preventDefault());

countBox.append(...COUNTS.map((count) => el("option", { value: count }, `${count}`)));
countBox.addEventListener("change", () => go({ count: Number(countBox.value) }));

function showMore() {
  if (get("more").hidden || JSON.parse(drawn)[4] !== more) return;
  more += state.count;
  schedule();
}

get("more").addEventListener("click", showMore);
addEventListener("scroll", () => {
  const page = document.documentElement;
  if (scrollY > 0 && innerHeight + scrollY > page.scrollHeight - innerHeight / 2) showMore();
}, { passive: true });

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
    const all = parts.get("d") === "1";
    go({ text: parts.get("q") ?? "", photo, all }, { opened: photo ? openedBefore() + 1 : 0 });
    if (!photo) box.focus();
  }
  const step = event.target.closest("[data-step]");
  if (step) stepPhoto(Number(step.dataset.step));
  // The target is the dialog itself only for clicks beside its content.
  if (event.target === dialog || event.target.closest("[data-close]")) dialog.close();
});

// This event comes after the dialog has closed. If the URL closed it, drawnPhoto is empty; and the
// next image may be open already.
dialog.addEventListener("close", () => {
  if (!dialog.open) cards.get(lastPhoto)?.firstChild.focus(); // the image shown last, not the one opened first
  if (drawnPhoto && !dialog.open) closePhoto();
});

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

// A data file that is missing is named, because only a part of the images is searched.
addEventListener("error", ({ target }) => {
  if (target.tagName !== "SCRIPT") return;
  get("missing").hidden = false;
  get("missing").append(el("p", {}, `Missing: ${target.getAttribute("src")}. The page is `
    + "incomplete: copy its whole folder, or write it again."));
}, true);
