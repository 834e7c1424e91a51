// One request at a time, what the keyboard and the pointer do, and the beginning.
const SPOKEN_SHARE = 0.25; // of the steps, between words to a screen reader
let run = null; // the request under way

/** Show a picture of the gallery, and its parameters in the form. */
function choose(entry) {
  const { prompt, negative_prompt, width, height, num_inference_steps, guidance_scale, true_cfg_scale } = entry;
  const { scheduler, seed } = entry;
  const known = served.models.some((one) => one.name === entry.model);
  const name = known ? entry.model : byId("model").value;
  fail("");
  byId("model").value = name;
  drawModel();
  const asked = { prompt, negative_prompt, width, height, num_inference_steps, guidance_scale, true_cfg_scale };
  write({ ...asked, scheduler, seed, model: name, previews: byId("previews").value, n: "" });
  remember("form", written());
  if (!known) fail(say("gone", { model: entry.model }));
  if (!run) {
    const one = plate(width, height, prompt);
    setStage([one]);
    fill(one, null, entry);
    tell("");
    byId("stage").scrollIntoView({ block: "nearest" });
  }
  spoken(say("recalled"));
}

/** The server's events as they come: the JSON of each `data:` line. */
async function* eventsOf(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const blocks = (rest + value).split("\n\n");
    rest = blocks.pop();
    for (const block of blocks) yield JSON.parse(block.slice(block.indexOf("data: ") + 6));
  }
}

function blobOf(text) {
  return new Blob([Uint8Array.from(atob(text), (character) => character.charCodeAt(0))], { type: "image/png" });
}

/** What each event of the server does to the page. */
const HEARD = {
  taken({ n, width, height }) {
    setStage(Array.from({ length: n }, () => plate(width, height, run.body.prompt)));
    run.n = n;
  },
  standing({ state, ahead }) {
    const words = state === "waiting" ? (ahead ? say("waiting", { n: ahead }) : say("waiting_next")) : say(state);
    tell(words);
    spoken(words);
  },
  step({ picture, index, total, progress }) {
    const now = performance.now();
    run.first ??= { now, progress };
    const passed = progress - run.first.progress;
    const left = passed > 0 ? ((now - run.first.now) / passed) * (1 - progress) / 1000 : null;
    const parts = run.n > 1 ? [say("pictures_done", { done: run.done, n: run.n })] : [];
    parts.push(index + 1 < total ? say("step", { index: index + 1, total }) : say("decoding"));
    if (left !== null && left >= 1) parts.push(say("left", { seconds: Math.ceil(left) }));
    tell(parts.join(" · "), progress);
    stage[picture].node.style.setProperty("--done", (index + 1) / total);
    if (progress - (run.said ?? 0) < SPOKEN_SHARE) return;
    run.said = progress;
    spoken(say("part", { percent: Math.floor(progress * 100) }));
  },
  preview({ picture, data }) {
    if (!stage[picture].entry) fill(stage[picture], blobOf(data));
  },
  picture(event) {
    const { picture, data, type, ...made } = event;
    const { prompt, negative_prompt = "", true_cfg_scale = "" } = run.body;
    const entry = { ...made, prompt, negative_prompt, true_cfg_scale, model: run.model, blob: blobOf(data) };
    run.done += 1;
    fill(stage[picture], null, entry);
    return gallery.add(entry);
  },
  error({ error }) {
    fail(sayError(error), byId({ size: "width" }[error.param] ?? error.param));
  },
};

/** Ask for pictures, and show what comes until the last one. */
async function make() {
  if (run) return spoken(say("busy"));
  fail("");
  const asked = body();
  if (!asked) return;
  remember("form", written());
  run = { body: asked, model: model()?.name, done: 0, n: asked.n ?? 1, began: performance.now(), stop: new AbortController() };
  underWay(true);
  tell(say("sending"));
  const narrow = byId("stage").offsetTop > byId("make").offsetTop;
  if (narrow) byId("stage").scrollIntoView({ block: "start" });
  try {
    const headers = { "Content-Type": "application/json" };
    const request = { method: "POST", headers, body: JSON.stringify(asked), signal: run.stop.signal };
    await follow(await fetch(new URL("ui/pictures", HERE), request));
  } catch (error) {
    if (!run.stop.signal.aborted) fail(say(error instanceof TypeError && !run.heard ? "offline" : "cut"));
  }
  finish();
}

async function follow(response) {
  if (!response.ok) {
    const { error } = await response.json().catch(() => ({ error: { message: `HTTP ${response.status}` } })); // a proxy's
    const again = response.headers.get("Retry-After");
    const line = [sayError(error), ...(again ? [say("retry", { seconds: again })] : [])].join(" ");
    return fail(line, byId({ size: "width" }[error.param] ?? error.param));
  }
  for await (const event of eventsOf(response)) {
    run.heard = true;
    await HEARD[event.type](event);
    if (event.type === "error") return;
  }
  if (run.done < run.n) fail(say("cut"));
}

/** The request is over, well or not: what was not finished leaves the stage. */
function finish() {
  const { stop, done, n, began } = run;
  run = null;
  const took = seconds((performance.now() - began) / 1000);
  const words = done === n ? say("done", { seconds: took }) : stop.signal.aborted ? say("cancelled") : "";
  tell(words, done === n ? 1 : 0);
  spoken(words);
  underWay(false);
  if (done < n) setStage(stage.filter((one) => one.entry));
  loadModels();
}

function underWay(busy) {
  byId("make").setAttribute("aria-disabled", String(busy));
  if (!busy && document.activeElement === byId("cancel")) byId("make").focus();
  byId("cancel").hidden = !busy;
  byId("progress").classList.toggle("over", !busy);
  byId("stage").setAttribute("aria-busy", String(busy));
}

const cancel = () => run?.stop.abort();

// The beginning.

function listen() {
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    make();
  });
  form.addEventListener("input", (event) => {
    if (event.target.tagName === "TEXTAREA") grow();
    event.target.removeAttribute("aria-invalid");
    delete event.target.dataset.wanted;
    remember("form", written());
  });
  byId("model").addEventListener("change", drawModel);
  byId("cancel").addEventListener("click", cancel);
  byId("settings").addEventListener("toggle", () => remember("settings", byId("settings").open));
  byId("swap").addEventListener("click", () => {
    const [wide, high] = ["width", "height"].map((axis) => byId(axis).value || byId(axis).placeholder);
    [byId("width").value, byId("height").value] = [high, wide];
    remember("form", written());
  });
  byId("defaults").addEventListener("click", () => {
    const { prompt, negative_prompt, model: chosen } = written();
    write({ prompt, negative_prompt, model: chosen });
    remember("form", written());
  });
  byId("language").addEventListener("click", () => inLanguage(language === "en" ? "zh" : "en"));
  for (const field of NUMBERS) {
    field.addEventListener("keydown", (event) => {
      const steps = ["ArrowUp", "ArrowDown"].includes(event.key);
      if (steps && field.value === "" && !field.validity.badInput) field.value = field.placeholder; // from the model's own value
    });
  }
  document.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey) && !event.isComposing) {
      event.preventDefault();
      make();
    } else if (event.key === "Escape" && !event.isComposing) cancel();
  });
  addEventListener("resize", grow);
  addEventListener("focus", () => run || loadModels());
}

function inLanguage(chosen) {
  speak(chosen);
  remember("language", chosen);
  drawModel();
  gallery.nodes = new WeakMap();
  gallery.draw();
  stage.forEach(caption);
  if (!run) tell(""); // said in the other language
}

async function begin() {
  const own = navigator.language.toLowerCase().startsWith("zh") ? "zh" : "en";
  const kept = recall("language", own);
  speak(kept in WORDS ? kept : own);
  for (const node of document.querySelectorAll(".keys")) node.textContent = MAC ? "⌘ ⏎" : "Ctrl ⏎";
  byId("settings").open = recall("settings", innerWidth > 720);
  listen();
  gallery.chosen = choose;
  write(recall("form", {}));
  await Promise.all([loadModels(), gallery.begin()]);
  grow();
  document.body.dataset.ready = "true";
}

begin();
