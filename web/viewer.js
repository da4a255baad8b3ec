// The large view of a picture and its parameters.

import { imageUrl } from "./api.js";
import { el, find, iconButton } from "./dom.js";
import { ACTIONS, downloadLink, seedOf, titleOf } from "./gallery.js";
import { drawnSize } from "./words.js";

export class Viewer {
  #dialog = find("viewer");
  #image = find("viewer-picture");
  #item = null;

  /** pictures(): the finished pictures of the gallery, the latest first; act: as in Gallery. */
  constructor(pictures, act) {
    this.pictures = pictures;
    this.act = act;
    find("viewer-close").addEventListener("click", () => this.#dialog.close());
    find("viewer-left").addEventListener("click", () => this.#turn(-1));
    find("viewer-right").addEventListener("click", () => this.#turn(1));
    this.#dialog.addEventListener("click", (event) => {
      if (event.target === this.#dialog) this.#dialog.close();
    });
    this.#dialog.addEventListener("keydown", (event) => {
      if (event.key === "ArrowLeft") this.#turn(-1);
      if (event.key === "ArrowRight") this.#turn(1);
    });
    // Back closes the large view: it is an entry of the history while it is open.
    if (history.state?.viewer) history.replaceState(null, "");
    addEventListener("popstate", () => this.#dialog.close());
    this.#dialog.addEventListener("close", () => {
      if (history.state?.viewer) history.back();
      this.#image.removeAttribute("src");
      this.#item = null;
    });
    this.#image.addEventListener("error", () => {
      if (this.#item) this.act.lost(this.#item);
      this.#dialog.close();
    });
  }

  open(item) {
    this.#show(item);
    if (!this.#dialog.open) {
      this.#dialog.showModal();
      history.pushState({ viewer: true }, "");
    }
    find("viewer-close").focus();
  }

  #turn(by) {
    const all = this.pictures();
    const next = all[all.findIndex((item) => item.key === this.#item?.key) + by];
    if (next) this.#show(next);
  }

  #show(item) {
    const { task, index } = item;
    this.#item = item;
    const { params } = task;
    this.#image.src = imageUrl(task.id, index);
    this.#image.alt = titleOf(task, index);
    find("viewer-words").textContent = titleOf(task, index);
    const facts = [
      ["Model", params.model],
      ["Size", drawnSize(params)],
      ["Steps", params.steps],
      ["Seed", seedOf(task, index)],
      ["Guidance", params.guidance],
      ["Negative prompt", params.negative_prompt],
      ["Image strength", params.init_image && params.image_strength],
      ["Upscale", params.upscale && `${params.upscale} times`],
      ["LoRAs", params.loras?.map((lora) => `${lora.name} ${lora.scale}`).join(", ")],
      ["Format", params.format],
      ["Tags", params.tags?.join(", ")],
    ].filter(([, value]) => value !== undefined && value !== null && value !== "");
    find("viewer-params").replaceChildren(
      ...facts.map(([name, value]) => el("div", {}, el("dt", {}, name), el("dd", {}, String(value)))),
    );
    const actions = ACTIONS.map(([name, words, act]) =>
      iconButton(name, words, () => {
        this.#dialog.close();
        this.act[act](item);
      }),
    );
    find("viewer-actions").replaceChildren(downloadLink(item), ...actions);
    const all = this.pictures();
    const at = all.findIndex((one) => one.key === item.key);
    find("viewer-left").disabled = at <= 0;
    find("viewer-right").disabled = at < 0 || at >= all.length - 1;
  }
}
