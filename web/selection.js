// Selecting pictures of the gallery: to download them as one archive, keep, compare or remove them.

import { zipUrl } from "./api.js";
import { keyOf } from "./cards.js";
import { el, find, icon, setText } from "./dom.js";
import { t } from "./language.js";

/** Most pictures in one archive. */
const MOST_IN_ZIP = 300;

export class Selection {
  on = false;
  #chosen = new Map(); // items by key
  #items = [];
  #last = null;

  /** act: star, compare, remove, each (items); changed() is called when the selection changes. */
  constructor(act, changed) {
    this.changed = changed;
    const click = (id, run) => find(id).addEventListener("click", run);
    click("select", () => this.#switch(!this.on));
    click("select-all", () => this.#all());
    click("select-star", () => act.starAll(this.#take()));
    click("select-compare", () => act.compare(...this.#take()));
    click("select-remove", () => act.remove(this.#take()));
    click("select-done", () => this.#switch(false));
    click("select-download", () => setTimeout(() => this.#switch(false))); // after the link was followed
    addEventListener("keydown", (event) => {
      if (event.key === "Escape" && this.on && !document.querySelector("dialog[open]")) this.#switch(false);
    });
  }

  /** The mark on a card; CSS shows it while pictures are selected. */
  mark() {
    return el("span", { class: "mark", "aria-hidden": "true" }, icon("check"));
  }

  /** Selects a picture or not; with `range` all from the one that was clicked before. */
  toggle(item, range = false) {
    const key = keyOf(item);
    const chosen = !this.#chosen.has(key);
    const keys = this.#items.map(keyOf);
    const [from, to] = [keys.indexOf(this.#last), keys.indexOf(key)].sort((one, other) => one - other);
    const items = range && from >= 0 ? this.#items.slice(from, to + 1) : [item];
    for (const one of items) {
      if (chosen) this.#chosen.set(keyOf(one), one);
      else this.#chosen.delete(keyOf(one));
    }
    this.#last = key;
    this.changed();
  }

  refresh(card, button, item) {
    const chosen = this.#chosen.has(keyOf(item));
    card.classList.toggle("chosen", this.on && chosen);
    if (this.on) button.setAttribute("aria-pressed", String(chosen));
    else button.removeAttribute("aria-pressed");
  }

  /** items: of the gallery as it is now. */
  show(items) {
    this.#items = items.filter((item) => item.index !== null);
    const there = new Map(this.#items.map((item) => [keyOf(item), item]));
    for (const key of this.#chosen.keys()) {
      if (there.has(key)) this.#chosen.set(key, there.get(key));
      else this.#chosen.delete(key);
    }
    const count = this.#chosen.size;
    document.body.classList.toggle("selecting", this.on);
    find("select").hidden = this.#items.length === 0;
    find("select").setAttribute("aria-pressed", String(this.on));
    find("selection").hidden = !this.on;
    setText(find("selection-words"), count > MOST_IN_ZIP ? t("selection.too_many", { n: MOST_IN_ZIP }) : t("selection.count", { n: count }));
    for (const id of ["select-star", "select-remove"]) find(id).disabled = count === 0;
    find("select-compare").disabled = count !== 2;
    const link = find("select-download");
    if (count && count <= MOST_IN_ZIP) link.href = zipUrl([...this.#chosen.values()]);
    else link.removeAttribute("href");
    link.setAttribute("aria-disabled", String(!link.hasAttribute("href")));
  }

  #switch(on) {
    this.on = on;
    this.#chosen.clear();
    this.#last = null;
    this.changed();
    if (!on) find("select").focus({ preventScroll: true });
  }

  #all() {
    const all = this.#chosen.size === this.#items.length;
    this.#chosen = new Map(all ? [] : this.#items.map((item) => [keyOf(item), item]));
    this.changed();
  }

  /** The selected items; the selection ends. */
  #take() {
    const items = [...this.#chosen.values()];
    this.#switch(false);
    return items;
  }
}
