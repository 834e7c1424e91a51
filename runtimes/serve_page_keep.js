// What this browser keeps: the form and the language in localStorage, pictures with their parameters in IndexedDB.

/** A small value under a name; where the browser allows none, nothing is kept and `fallback` comes back. */
function recall(name, fallback) {
  try {
    return JSON.parse(localStorage.getItem(`intaglio.${name}`)) ?? fallback;
  } catch {
    return fallback;
  }
}

function remember(name, value) {
  try {
    localStorage.setItem(`intaglio.${name}`, JSON.stringify(value));
  } catch {
    // A private window: the form is as it was only until the page is closed.
  }
}

/** Pictures by `id`, the order they were made in. Without IndexedDB they are kept until the page is closed. */
class Album {
  constructor() {
    this.lasting = true;
    this.entries = [];
  }

  async open() {
    try {
      this.base = await new Promise((resolve, reject) => {
        const request = indexedDB.open("intaglio", 1);
        request.onupgradeneeded = () => request.result.createObjectStore("pictures", { keyPath: "id" });
        request.onsuccess = () => resolve(request.result);
        request.onerror = request.onblocked = () => reject(request.error);
      });
      this.entries = await this.do("readonly", (store) => store.getAll());
    } catch {
      this.lasting = false;
    }
  }

  /** One transaction, and what its last request gave. */
  do(mode, work) {
    return new Promise((resolve, reject) => {
      const transaction = this.base.transaction("pictures", mode);
      const request = work(transaction.objectStore("pictures"));
      transaction.oncomplete = () => resolve(request?.result);
      transaction.onerror = transaction.onabort = () => reject(transaction.error ?? request?.error);
    });
  }

  /** Keep pictures; throws where the browser refuses, and has them until the page is closed then. */
  async add(...entries) {
    for (const entry of entries) entry.id ??= Math.max(Date.now(), ...this.entries.map((e) => e.id + 1));
    this.entries = [...this.entries, ...entries].sort((a, b) => a.id - b.id);
    if (this.lasting) await this.do("readwrite", (store) => entries.map((entry) => store.put(entry)).at(-1));
  }

  async remove(...entries) {
    this.entries = this.entries.filter((entry) => !entries.includes(entry));
    if (this.lasting) await this.do("readwrite", (store) => entries.map((entry) => store.delete(entry.id)).at(-1));
  }
}
