// Favourites, which the server keeps, and removing pictures, which can be undone for some seconds.

import * as api from "./api.js";
import { isStarred } from "./cards.js";
import { find } from "./dom.js";
import { t } from "./language.js";
import { isLive, stored } from "./tasks.js";
import { toast } from "./toasts.js";
import { plain } from "./words.js";

export class Keeping {
  constructor(tasks) {
    this.tasks = tasks;
  }

  /** Makes a picture a favourite, or no favourite any more. The server keeps its task as long as one of its pictures is. */
  async star(item) {
    await this.#star(item, !isStarred(item)).catch((error) => toast(plain(error), { bad: true }));
  }

  async starAll(items) {
    const all = items.every(isStarred);
    let count = 0;
    try {
      for (const item of items.filter((one) => isStarred(one) === all)) {
        await this.#star(item, !all);
        count += 1;
      }
    } catch (error) {
      toast(plain(error), { bad: true });
    }
    if (count) toast(t(all ? "gallery.released" : "gallery.starred", { n: count }));
  }

  async #star({ task: { id }, index }, on) {
    const stars = (this.tasks.get(id)?.stars ?? []).filter((one) => one !== index);
    if (on) stars.push(index);
    const answer = stars.length ? await api.keep(id) : await api.release(id);
    this.tasks.set(id, { stars, kept: answer.kept, expires_at: answer.expires_at });
  }

  /** Takes over what another browser of this client has kept, or released. */
  async follow() {
    const { task_ids: ids } = await api.kept();
    for (const { id } of this.tasks.all().filter(({ id, kept }) => kept && !ids.includes(id))) {
      this.tasks.set(id, { kept: false, stars: [] });
    }
    const known = (id) => this.tasks.get(id)?.kept || this.tasks.get(id)?.removed;
    for (const id of ids.filter((one) => !known(one))) this.tasks.adopt(id, await api.status(id));
  }

  /** Hides pictures and ended tasks at once, and removes them on the server when the undo message is gone. */
  remove(items) {
    const before = new Map(items.map(({ task }) => [task.id, this.tasks.get(task.id)]));
    const undo = [...before].map(([id, { hidden = [] }]) => [id, { removed: false, hidden }]);
    for (const { task, index } of items) {
      const now = this.tasks.get(task.id);
      const hidden = index === null ? (now.hidden ?? []) : [...(now.hidden ?? []), index];
      const left = Array.from({ length: stored(now) }, (_, one) => one).filter((one) => !hidden.includes(one));
      const whole = index === null || (left.length === 0 && !isLive(now));
      this.tasks.set(task.id, whole ? { removed: true } : { hidden });
    }
    find("yours").focus({ preventScroll: true });
    toast(items.length === 1 ? t("app.removed") : t("gallery.removed", { n: items.length }), {
      action: { words: t("app.undo"), run: () => undo.forEach(([id, change]) => this.tasks.set(id, change)) },
      onGone: () => this.#removeAll(items),
    });
  }

  #removeAll(items) {
    const whole = new Set(items.map(({ task }) => task.id).filter((id) => this.tasks.get(id)?.removed));
    for (const id of whole) this.removeForGood(this.tasks.get(id));
    for (const { task, index } of items) if (!whole.has(task.id)) this.#removeOne(task.id, index);
  }

  /** A favourite that nobody sees any more would keep its task for ever. */
  async #removeOne(id, index) {
    const item = { task: this.tasks.get(id), index };
    try {
      if (item.task && isStarred(item)) await this.#star(item, false);
      await api.removeOne(id, index);
    } catch {
      // it stays on the server until it expires
    }
  }

  async removeForGood(task) {
    try {
      if (task.status !== "gone") await api.remove(task.id);
    } catch (error) {
      if (error instanceof api.Unreachable) return; // tried again when the page is opened next
    }
    this.tasks.forget(task.id);
  }
}
