// The models that are served, and the form that asks them.
const form = byId("form");
const FIELDS = [...form.querySelectorAll("[name]")];
const NUMBERS = FIELDS.filter((field) => field.type === "number");
const HERE = new URL("./", location.origin + location.pathname); // an address with a user's name cannot be fetched
let served = { models: [], limits: {} };
let unreachable = false;

function spoken(text) {
  byId("spoken").textContent = text;
}

/** Say in one line what is wrong, at the field it is about. */
function fail(text, field = null) {
  const line = byId("error");
  line.textContent = text;
  line.hidden = !text;
  for (const other of FIELDS) {
    other.toggleAttribute("aria-invalid", false);
    if (other === field) other.setAttribute("aria-invalid", "true");
  }
  if (!field) return;
  const folded = field.closest("details");
  if (folded) folded.open = true;
  field.focus();
}

const model = () => served.models.find((one) => one.name === byId("model").value) ?? served.models[0];

/** The formats of a model's parts, `int8 unet, text_encoder`; parts of one format together. */
function precision(one) {
  const parts = Map.groupBy(Object.entries(one.formats), ([, format]) => format);
  const named = (format) => (format === "none" ? say("unquantized") : format);
  if (parts.size === 1) return named([...parts.keys()][0]);
  return [...parts].map(([format, rows]) => `${named(format)}: ${rows.map(([part]) => part).join(", ")}`).join(" · ");
}

function option(value, text) {
  const node = document.createElement("option");
  node.value = value;
  node.textContent = text;
  return node;
}

/** Show a model's facts, and its own values where the form says nothing. */
function drawModel() {
  const one = model();
  if (!one) return;
  const { name, backend, device } = one;
  const line = [say("runs_on", { backend, device }), say("weights", { formats: precision(one) })];
  byId("served-name").textContent = name;
  byId("served-facts").textContent = ["", ...line, ...(one.loaded ? [] : [say("unloaded")])].join(" · ");
  byId("served").title = Object.entries(one.formats).map((pair) => pair.join(": ")).join("\n");
  document.body.dataset.backend = one.backend;
  for (const axis of ["width", "height"]) {
    const { min, max, multiple, default: own } = one.sizes[axis];
    Object.assign(byId(axis), { min, max, step: multiple, placeholder: own });
  }
  Object.assign(byId("num_inference_steps"), { max: served.limits.steps, placeholder: one.steps });
  byId("guidance_scale").placeholder = one.guidance;
  byId("n").max = served.limits.pictures;
  byId("true-cfg").hidden = !one.true_cfg;
  byId("previews-note").hidden = one.preview_vae;
  for (const field of NUMBERS) field.title = rule(field);
  const names = one.schedulers.filter((each) => each.name === one.scheduler).map((each) => each.shown);
  const own = names.length ? say("own_scheduler", { name: names[0] }) : say("no_own_scheduler");
  const list = byId("scheduler");
  const chosen = list.value || list.dataset.wanted || "";
  list.replaceChildren(option("", own), ...one.schedulers.map((each) => option(each.name, each.shown)));
  list.value = one.schedulers.some((each) => each.name === chosen) ? chosen : "";
}

async function loadModels() {
  try {
    const response = await fetch(new URL("ui/models", HERE));
    if (response.status === 401) return fail(say("no_key"));
    served = await response.json();
  } catch {
    unreachable = true;
    return fail(say("offline"));
  }
  if (unreachable) fail("");
  unreachable = false;
  const list = byId("model");
  const chosen = list.value || list.dataset.wanted;
  list.replaceChildren(...served.models.map((one) => option(one.name, one.name)));
  if (served.models.some((one) => one.name === chosen)) list.value = chosen;
  byId("models").hidden = served.models.length < 2;
  drawModel();
}

/** What the form says, by field; empty fields are left out. */
const written = () => Object.fromEntries(FIELDS.map((field) => [field.name, field.value]).filter(([, value]) => value !== ""));

function write(values) {
  for (const field of FIELDS) {
    field.value = values[field.name] ?? "";
    if (field.tagName === "SELECT" && field.value !== values[field.name]) {
      field.dataset.wanted = values[field.name] ?? ""; // until its options are there
      field.selectedIndex = Math.max(0, [...field.options].findIndex((each) => each.defaultSelected));
    }
  }
  grow();
}

/** Text fields are as high as their text. */
function grow() {
  for (const area of form.querySelectorAll("textarea")) {
    area.style.height = "";
    area.style.height = `${Math.min(area.scrollHeight + 2, innerHeight / 3)}px`;
  }
}

/** What a number must be, in words. */
function rule(field) {
  const { min, max, step } = field;
  if (min && max && step && step !== "any" && step !== "1") return say("rule_range", { min, max, step });
  return min && max ? say("rule_to", { min, max }) : min ? say("rule_from", { min }) : say("rule_number");
}

const labelOf = (field) => field.labels[0]?.textContent ?? field.getAttribute("aria-label");

/** The body of a request, or nothing where a field is wrong, which is said. */
function body() {
  const values = written();
  if (!values.prompt?.trim()) return fail(say("no_prompt"), byId("prompt"));
  for (const field of FIELDS) {
    if (field.validity.valid || field.closest("[hidden]")) continue;
    const words = field.id === "seed" ? say("rule_seed") : rule(field);
    return fail(say("bad_number", { name: labelOf(field), rule: words }), field);
  }
  for (const field of [...NUMBERS, byId("previews")]) if (field.name in values) values[field.name] = Number(field.value);
  if (byId("true-cfg").hidden) delete values.true_cfg_scale;
  return values;
}
