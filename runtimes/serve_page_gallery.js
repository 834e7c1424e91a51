// The pictures that are kept, the newest first.
const PAGE = 48; // pictures shown before "more" is asked for
const UNDO_MS = 20_000;
const album = new Album();
const addresses = new WeakMap(); // entry -> its object URL

/** The address of a picture; it lasts as long as the page. */
function addressOf(entry) {
  if (!addresses.has(entry)) addresses.set(entry, URL.createObjectURL(entry.blob));
  return addresses.get(entry);
}

const seconds = (value) => value.toFixed(value < 10 ? 1 : 0);
const factsOf = (entry) => say("facts", { seed: entry.seed, seconds: seconds(entry.seconds) });
const fileOf = (entry) => `${entry.model.replace(/[^\w.-]+/g, "_")}-${entry.seed}.png`;

/** Make a link download a picture. */
function downloads(link, entry) {
  link.href = addressOf(entry);
  link.download = fileOf(entry);
  link.title = say("download");
  link.setAttribute("aria-label", say("download_of", { what: entry.prompt }));
}

const gallery = {
  shown: PAGE,
  nodes: new WeakMap(), // of entries
  deleted: [],
  timer: 0,
  chosen: () => {}, // told which picture was clicked

  /** Show what is kept. */
  draw() {
    const newest = album.entries.toReversed().slice(0, this.shown);
    byId("gallery").hidden = !album.entries.length && !this.deleted.length;
    byId("kept").textContent = String(album.entries.length);
    byId("kept-note").textContent = say(album.lasting ? "kept_note" : "kept_memory");
    byId("delete-all").hidden = !album.entries.length;
    byId("more").hidden = album.entries.length <= this.shown;
    byId("undo-bar").hidden = !this.deleted.length;
    byId("deleted").textContent = say("deleted", { n: this.deleted.length });
    const focused = document.activeElement;
    byId("pictures").replaceChildren(...newest.map((entry) => this.node(entry)));
    if (focused.isConnected) focused.focus({ preventScroll: true });
  },

  node(entry) {
    if (!this.nodes.has(entry)) this.nodes.set(entry, this.item(entry));
    return this.nodes.get(entry);
  },

  item(entry) {
    const node = byId("item").content.firstElementChild.cloneNode(true);
    const what = { what: entry.prompt };
    const [thumb, image] = [node.querySelector(".thumb"), node.querySelector("img")];
    image.src = addressOf(entry);
    thumb.setAttribute("aria-label", say("show_of", what));
    thumb.addEventListener("click", () => this.chosen(entry));
    node.querySelector(".caption").textContent = entry.prompt;
    node.querySelector(".caption").title = entry.prompt;
    node.querySelector(".facts").textContent = entry.seed;
    downloads(node.querySelector(".download"), entry);
    const remove = node.querySelector(".delete");
    remove.setAttribute("aria-label", say("delete_of", what));
    remove.addEventListener("click", () => this.remove(entry));
    return node;
  },

  /** Keep pictures; says why where the browser refuses. */
  async add(...entries) {
    try {
      await album.add(...entries);
    } catch (error) {
      fail(say("not_kept", { why: error?.name ?? "?" }));
    }
    this.draw();
  },

  async remove(...entries) {
    const place = [...byId("pictures").children].findIndex((node) => node.contains(document.activeElement));
    this.deleted = entries;
    clearTimeout(this.timer);
    this.timer = setTimeout(() => this.forget(), UNDO_MS);
    await album.remove(...entries).catch((error) => fail(say("not_deleted", { why: error?.name ?? "?" })));
    this.draw();
    const next = byId("pictures").children[Math.min(place, byId("pictures").children.length - 1)];
    (next?.querySelector(".delete") ?? byId("undo")).focus(); // where the keyboard was, not the page's beginning
    spoken(say("deleted", { n: entries.length }));
  },

  async undo() {
    const entries = this.deleted;
    this.forget();
    await this.add(...entries);
  },

  forget() {
    clearTimeout(this.timer);
    this.deleted = [];
    this.draw();
  },

  async begin() {
    byId("undo").addEventListener("click", () => this.undo());
    byId("delete-all").addEventListener("click", () => this.remove(...album.entries));
    byId("more").addEventListener("click", () => {
      this.shown += PAGE;
      this.draw();
    });
    await album.open();
    this.draw();
  },
};
