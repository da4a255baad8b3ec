// The pictures of this browser: the list, its search, favourites, and which ones have expired.

import { find, follow, setText } from "./dom.js";
import { endedCard, keyOf, pictureCard } from "./cards.js";
import { t } from "./language.js";
import { Selection } from "./selection.js";
import { isLive, stored } from "./tasks.js";
import { unfinishedCard } from "./unfinished.js";

const PAGE_SIZE = 48;
/** How often the cards show what time has changed. */
const AGE_MS = 60_000;

export class Gallery {
  #grid = find("grid");
  #limit = PAGE_SIZE;
  #due = false;
  #agedAt = 0;

  /** act: functions by the name of the action, each (item); also open, cancel, endAfter, lost, star, remove. */
  constructor(tasks, act) {
    this.tasks = tasks;
    this.act = act;
    this.download = undefined; // the running download, from /health
    this.selection = new Selection(act, () => this.show());
    find("search").addEventListener("input", () => this.#restart());
    for (const name of ["favourites", "expired"]) find(name).addEventListener("click", () => this.#toggle(name));
    find("clear-ended").addEventListener("click", () => this.act.remove(this.#ends()));
    find("more").addEventListener("click", () => this.#showMore());
    new IntersectionObserver((entries) => entries.some((one) => one.isIntersecting) && this.#showMore(), {
      rootMargin: "600px",
    }).observe(find("more"));
  }

  /** Finished pictures, the latest first. */
  pictures() {
    return this.#items().filter((item) => item.index !== null);
  }

  /** Shows the list as it is now. Many changes of one moment are shown once. */
  show() {
    if (this.#due) return;
    this.#due = true;
    const draw = () => {
      this.#due = false;
      this.#show();
    };
    if (document.hidden) setTimeout(draw);
    else requestAnimationFrame(draw);
  }

  tick() {
    for (const card of this.#grid.querySelectorAll(".unfinished")) card.tick();
    if (performance.now() - this.#agedAt > AGE_MS) this.show();
  }

  /** Loads the pictures again that failed while the server could not be reached. */
  loadAgain() {
    for (const card of this.#grid.querySelectorAll(".picture:not(.loaded)")) card.load();
  }

  #toggle(name) {
    const on = find(name).getAttribute("aria-pressed") !== "true";
    find(name).setAttribute("aria-pressed", String(on));
    this.#restart();
  }

  #isOn(name) {
    return find(name).getAttribute("aria-pressed") === "true";
  }

  #restart() {
    this.#limit = PAGE_SIZE;
    this.show();
  }

  #showMore() {
    this.#limit += PAGE_SIZE;
    this.show();
  }

  /** Tasks that have ended without a picture. */
  #ends() {
    const ended = this.tasks.list().filter((task) => !isLive(task) && stored(task) === 0);
    return ended.map((task) => ({ task, index: null }));
  }

  /** Whether the words that are searched for are in the prompt or in a tag. */
  #search() {
    const words = find("search").value.toLowerCase().split(/\s+/).filter(Boolean);
    if (!words.length) return () => true;
    return ({ params: { prompt, prompts, tags } }) => {
      const text = [prompt, ...(prompts ?? []), ...(tags ?? [])].join(" ").toLowerCase();
      return words.every((word) => text.includes(word));
    };
  }

  #items() {
    const [stars, expired] = [this.#isOn("favourites"), this.#isOn("expired")];
    return this.tasks
      .list()
      .filter(this.#search())
      .filter((task) => expired || task.status !== "gone")
      .flatMap(itemsOf)
      .filter(({ task, index }) => !stars || task.stars?.includes(index));
  }

  #show() {
    const items = this.#items();
    this.#agedAt = performance.now();
    const focused = document.activeElement?.closest?.(".card")?.dataset.key;
    follow(
      this.#grid,
      items.slice(0, this.#limit),
      keyOf,
      (item) => this.#newCard(item),
      (node, item) => node.refresh?.(item),
    );
    if (focused && document.activeElement === document.body) this.#keepFocus(focused);
    find("more").hidden = items.length <= this.#limit;
    this.selection.show(items.filter((item) => !isLive(item.task)));
    this.#showWords(items);
  }

  #showWords(items) {
    const all = this.tasks.list();
    const gone = all.filter((task) => task.status === "gone").length;
    find("empty").hidden = all.length > 0;
    find("tools").hidden = all.length === 0;
    find("clear-ended").hidden = this.#ends().length === 0;
    find("favourites").hidden = !this.#isOn("favourites") && !all.some((task) => task.stars?.length);
    find("expired").hidden = gone === 0;
    setText(find("expired-words"), t("gallery.expired", { n: gone }));
    const finished = items.filter((item) => item.index !== null).length;
    const unfinished = items.filter((item) => item.index === null && isLive(item.task)).length;
    const words = [];
    if (unfinished) words.push(t("gallery.in_progress", { n: unfinished }));
    if (finished) words.push(t("gallery.finished", { n: finished }));
    if (!items.length && find("search").value.trim()) words.push(t("gallery.nothing_found"));
    setText(find("yours-words"), words.join(", "));
  }

  /** Moves the focus from a replaced card to the picture that replaced it, or else to the list. */
  #keepFocus(key) {
    const id = key.split(" ")[0];
    const successor = [...this.#grid.children].find((card) => card.dataset.key.startsWith(id));
    (successor?.querySelector("button, a") ?? find("yours")).focus({ preventScroll: true });
  }

  /** Those of this visit come with an animation. */
  #newCard(item) {
    const card = this.#card(item);
    card.classList.toggle("new", item.task.created > performance.timeOrigin);
    return card;
  }

  #card(item) {
    if (item.index !== null) return pictureCard(item, this.act, this.selection);
    return isLive(item.task) ? unfinishedCard(item, this) : endedCard(item, this.act, this.selection);
  }
}

/** What is shown of a task: its pictures, and a card of its own unless it ended with some. */
function itemsOf(task) {
  const pictures = Array.from({ length: stored(task) }, (_, index) => ({ task, index }));
  const shown = pictures.filter(({ index }) => !task.hidden?.includes(index));
  const whole = task.status === "done" || (task.status === "cancelled" && pictures.length > 0);
  return whole ? shown : [{ task, index: null }, ...shown];
}
