// Photo search, the opened photo: steps, zoom, links, and why it was found.
"use strict";

const ALIKE = 8; // similar images beside an open one
const ZOOM = 2.5; // times the size at which the whole image is visible
const dialog = get("photo");
const stage = get("stage");
let drawnPhoto = "";
let lastPhoto = -1;

function closePhoto() {
  const opened = openedBefore();
  state.photo = "";
  drawnPhoto = "";
  if (opened) history.go(-opened);
  else go({}, { replace: true });
}

function drawPhoto() {
  const photo = state.photo ? photos.names.indexOf(state.photo) : -1;
  if (photo < 0) {
    drawnPhoto = "";
    dialog.close();
    if (state.photo && (photos.count === photos.total || missingFiles)) {
      get("notes").append(el("p", {}, "There is no photo named ", bdi(state.photo)));
      state.photo = "";
    }
    return;
  }
  if (drawnPhoto === drawn + state.photo) return;
  const isNew = lastPhoto !== photo || !dialog.open;
  drawnPhoto = drawn + state.photo;
  lastPhoto = photo;
  if (isNew) {
    drawPicture(photo);
    get("photo-title").replaceChildren(bdi(labelOf(photo)));
    get("like").setAttribute("href", linkTo({ text: "", like: state.photo, photo: "" }));
    get("about").scrollTop = 0;
  }
  get("details").replaceChildren(
    ...captionItems(photo), ...scoreItems(photo),
    el("h3", {}, "Similar photos"),
    el("ul", { class: "alike" }, ...photosLike(photo, ALIKE).map(({ photo: other, score }) =>
      el("li", {}, el("a", { href: linkTo({ photo: photos.names[other] }) },
        picture(other, "t"), el("span", { class: "score" }, score.toFixed(2)))))),
    el("p", { class: "name" }, bdi(photos.names[photo])));
  // Not disabled, which would lose the focus.
  for (const button of dialog.querySelectorAll("[data-step]")) {
    button.setAttribute("aria-disabled", neighbor(photo, Number(button.dataset.step)) === undefined);
  }
  if (!dialog.open) {
    dialog.showModal();
    dialog.focus(); // it is read by its title, and Tab goes to the buttons
  }
}

function drawPicture(photo) {
  const [width, height] = sizeOf(photo);
  const full = picture(photo, "f");
  // The thumbnail is shown until the large image is loaded.
  full.style.backgroundImage = `url("t/${photos.pictures[photo]}.jpg")`;
  // Small images are enlarged a little.
  const scale = Math.max(1, Math.min(3, 720 / Math.max(width, height)));
  full.style.maxWidth = `min(100%, ${Math.round(width * scale)}px)`;
  full.style.maxHeight = `min(100%, ${Math.round(height * scale)}px)`;
  setZoom(false);
  stage.className = "";
  stage.replaceChildren(full);
}

function captionItems(photo) {
  const others = photos.captions[photo].slice(1);
  return others.length ? [el("ul", { class: "captions", "aria-label": "More captions" },
    ...others.map((caption) => el("li", {}, bdi(prose(caption)))))] : [];
}

function scoreItems(photo) {
  const query = currentQuery(drawnText);
  if (!query.known || query.like >= 0) return [];
  const merged = mergeWords(query, contributionsOf(query, photo));
  const total = merged.reduce((sum, { value }) => sum + value, 0);
  const rank = results.findIndex((result) => result.photo === photo) + 1;
  const facts = [rank ? `number ${number(rank)}` : "", total < weakScore ? "a weak match" : ""];
  return [
    el("h3", {}, total < 0 ? "How it scores " : "Why it fits ",
      el("span", { class: "score" }, total.toFixed(3).replace("-", "\u2212")),
      ...facts.filter(Boolean).map((fact) => `, ${fact}`)),
    el("ul", { class: "bars", "aria-label": "Contribution of each word to the score" },
      ...contributionItems(merged, Math.max(...merged.map(({ value }) => Math.abs(value)), 1e-9), 3)),
  ];
}

// ---- Steps --------------------------------------------------------------------------------------

function neighbor(photo, step) {
  const at = results.findIndex((result) => result.photo === photo);
  return at < 0 ? undefined : results[at + step]?.photo;
}

function stepPhoto(step) {
  const photo = photos.names.indexOf(state.photo);
  const to = neighbor(photo, step);
  // Replaced, so that closing goes back to the results in one step.
  if (to !== undefined) go({ photo: photos.names[to] }, { replace: true, opened: openedBefore() });
  if (step > 0 && (to === undefined || neighbor(to, 1) === undefined)) showMore();
}

let touch = null; // where a finger touched the picture
stage.addEventListener("touchstart", ({ touches }) => {
  touch = touches.length === 1 && !isZoomed() && (visualViewport?.scale ?? 1) < 1.01
    ? [touches[0].clientX, touches[0].clientY] : null;
}, { passive: true });
stage.addEventListener("touchend", ({ changedTouches }) => {
  if (!touch) return;
  const [right, down] = [changedTouches[0].clientX - touch[0], changedTouches[0].clientY - touch[1]];
  touch = null;
  if (Math.abs(right) > 40 && Math.abs(right) > 1.5 * Math.abs(down)) stepPhoto(right < 0 ? 1 : -1);
});

// ---- Zoom ---------------------------------------------------------------------------------------

const isZoomed = () => stage.classList.contains("zoomed");

// Enlarge the picture around a point of the stage, given in shares of its width and height.
function setZoom(zoomed, x = 0.5, y = 0.5) {
  const image = stage.firstChild;
  get("zoom").setAttribute("aria-pressed", zoomed);
  stage.classList.toggle("zoomed", zoomed);
  if (zoomed) stage.setAttribute("tabindex", "0"); // the keyboard scrolls it
  else stage.removeAttribute("tabindex");
  if (!image) return;
  const [width, height] = sizeOf(lastPhoto);
  const fit = Math.min(stage.clientWidth / width, stage.clientHeight / height);
  image.style.width = zoomed ? `${Math.round(width * Math.max(1, ZOOM * fit))}px` : "";
  stage.scrollTo((stage.scrollWidth - stage.clientWidth) * x,
    (stage.scrollHeight - stage.clientHeight) * y);
}

get("zoom").addEventListener("click", () => setZoom(!isZoomed()));
stage.addEventListener("click", (event) => {
  if (event.target.tagName !== "IMG") return;
  const { left, top, width, height } = stage.getBoundingClientRect();
  setZoom(!isZoomed(), (event.clientX - left) / width, (event.clientY - top) / height);
});

// ---- Buttons and keys ---------------------------------------------------------------------------

get("copy").addEventListener("click", async () => {
  const before = [...get("copy").childNodes];
  let copied = true;
  try {
    await navigator.clipboard.writeText(location.href);
  } catch { // the browser does not allow it, for example without https
    const field = el("input", { class: "unseen", "aria-hidden": "true" });
    field.value = location.href;
    dialog.append(field);
    field.select();
    copied = document.execCommand("copy");
    field.remove();
    get("copy").focus();
  }
  if (get("copy").dataset.said) return;
  get("copy").dataset.said = "1";
  get("copy").replaceChildren(copied ? "Copied" : "Not copied");
  setTimeout(() => {
    delete get("copy").dataset.said;
    get("copy").replaceChildren(...before);
  }, 1500);
});

dialog.addEventListener("click", (event) => {
  const step = event.target.closest("[data-step]");
  if (step) stepPhoto(Number(step.dataset.step));
  // The target is the dialog itself only for clicks beside its content.
  if (event.target === dialog || event.target.closest("[data-close]")) dialog.close();
});

dialog.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
  if (step && !isZoomed()) stepPhoto(step);
});

// This event comes after the dialog has closed. If the URL closed it, drawnPhoto is empty; and the
// next image may be open already.
dialog.addEventListener("close", () => {
  setZoom(false);
  // The image shown last, not the one opened first.
  if (!dialog.open) cards.get(lastPhoto)?.firstChild.focus();
  if (drawnPhoto && !dialog.open) closePhoto();
});
