// The stage: plates that show previews and pictures, and how far the request is.
let stage = []; // plates

/** A place for one picture of `width` and `height` pixels. */
function plate(width, height, prompt) {
  const node = byId("plate").content.firstElementChild.cloneNode(true);
  node.style.setProperty("--width", width);
  node.style.setProperty("--height", height);
  return { node, prompt, entry: null, preview: "" };
}

/** Show a picture in a plate: a preview's bytes, or an entry of the gallery. */
function fill(one, blob, entry = null) {
  const image = one.node.querySelector("img");
  URL.revokeObjectURL(one.preview);
  one.preview = entry ? "" : URL.createObjectURL(blob);
  one.entry = entry;
  image.src = entry ? addressOf(entry) : one.preview;
  one.node.classList.toggle("final", Boolean(entry));
  caption(one);
}

/** The words of a plate, in the language of now. */
function caption(one) {
  const made = one.entry;
  const shown = made || one.preview;
  one.node.querySelector("img").alt = shown ? say(made ? "picture_of" : "preview_of", { what: one.prompt }) : "";
  one.node.querySelector(".facts").textContent = made ? factsOf(made) : "";
  const warning = one.node.querySelector(".warning");
  warning.hidden = !made?.warnings.length;
  warning.textContent = made ? made.warnings.join(" · ") : "";
  const link = one.node.querySelector("a");
  link.hidden = !made;
  if (!made) return;
  downloads(link, made);
  link.textContent = say("download");
}

function setStage(plates) {
  for (const one of stage) URL.revokeObjectURL(one.preview);
  stage = plates;
  byId("plates").replaceChildren(...stage.map((one) => one.node));
  byId("plates").classList.toggle("many", stage.length > 1);
  byId("empty").hidden = stage.length > 0;
}

/** Show where the request stands: words, and a share of the steps where there is one. */
function tell(words, share = null) {
  byId("status").textContent = words;
  const bar = byId("progress");
  byId("going").hidden = !words;
  if (share === null) bar.removeAttribute("value");
  else bar.value = share;
  const percent = Math.floor((share ?? 0) * 100);
  document.title = run ? (share ? `${say("part", { percent })} · Intaglio` : `${words} · Intaglio`) : "Intaglio";
}
