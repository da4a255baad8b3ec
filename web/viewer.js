// The large view of a picture: its parameters, its actions, and comparing it with another one.

import { imageUrl } from "./api.js";
import { ACTIONS, downloadLink, expiry, keyOf, seedOf, starButton, titleOf } from "./cards.js";
import { el, find, iconButton, setText } from "./dom.js";
import { t } from "./language.js";
import { canShare, copyLink, copyParameters, copyPrompt, inputPicture, share } from "./sharing.js";
import { Zoom } from "./viewer_zoom.js";
import { drawnSize } from "./words.js";

export class Viewer {
  #dialog = find("viewer");
  #image = find("viewer-picture");
  #item = null;
  #star = null;

  /** pictures(): the finished pictures of the gallery, the latest first; act: as in Gallery. */
  constructor(pictures, act) {
    this.pictures = pictures;
    this.act = act;
    this.zoom = new Zoom(find("stage"), this.#image, (by) => this.#turn(by));
    find("viewer-close").addEventListener("click", () => this.#dialog.close());
    find("viewer-left").addEventListener("click", () => this.#turn(-1));
    find("viewer-right").addEventListener("click", () => this.#turn(1));
    find("compare-split").addEventListener("input", () => this.#split());
    this.#dialog.addEventListener("click", (event) => {
      if (event.target === this.#dialog) this.#dialog.close();
    });
    this.#dialog.addEventListener("keydown", (event) => this.#key(event));
    // Back closes the large view: it is an entry of the history while it is open.
    if (history.state?.viewer) history.replaceState(null, "");
    addEventListener("popstate", () => this.#dialog.close());
    this.#dialog.addEventListener("close", () => {
      if (history.state?.viewer) history.back();
      this.#image.removeAttribute("src");
      this.#endComparing();
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

  /** Two pictures of the gallery, one over the other: the older one to the left. */
  compare(one, other) {
    const [newer, older] = [one, other].sort((a, b) => b.task.created - a.task.created || b.index - a.index);
    this.open(newer);
    this.#compare({ url: imageUrl(older.task.id, older.index), title: titleOf(older.task, older.index) });
  }

  /** A picture has changed: its star, and when it expires. */
  refresh(task) {
    if (this.#item?.task.id !== task.id) return;
    this.#item.task = task;
    this.#star.refresh(this.#item);
    this.#showParams();
  }

  #key(event) {
    if (event.target === find("compare-split") || event.ctrlKey || event.metaKey || event.altKey) return;
    const rtl = document.dir === "rtl" ? -1 : 1;
    if (event.key === "ArrowLeft") this.#turn(-rtl);
    if (event.key === "ArrowRight") this.#turn(rtl);
    this.zoom.key(event.key);
  }

  #turn(by) {
    const all = this.pictures();
    const next = all[all.findIndex((item) => keyOf(item) === keyOf(this.#item)) + by];
    if (next) this.#show(next);
  }

  #show(item) {
    const { task, index } = item;
    this.#endComparing();
    this.#item = { ...item };
    this.zoom.reset();
    this.#image.src = imageUrl(task.id, index);
    this.#image.alt = titleOf(task, index);
    setText(find("viewer-words"), titleOf(task, index));
    this.#showParams();
    this.#showActions(item);
    const all = this.pictures();
    const at = all.findIndex((one) => keyOf(one) === keyOf(item));
    setText(find("viewer-counter"), at < 0 ? "" : t("viewer.counter", { n: at + 1, all: all.length }));
    find("viewer-left").disabled = at <= 0;
    find("viewer-right").disabled = at < 0 || at >= all.length - 1;
  }

  #showParams() {
    const { task, index } = this.#item;
    const { params } = task;
    const facts = [
      [t("form.model"), params.model],
      [t("form.size"), drawnSize(params)],
      [t("form.steps"), params.steps],
      [t("form.seed"), seedOf(task, index)],
      [t("form.guidance"), params.guidance],
      [t("form.negative_prompt"), params.negative_prompt],
      [t("viewer.image_strength"), params.init_image && params.image_strength],
      [t("form.upscale"), params.upscale && t("form.upscale_times", { n: params.upscale })],
      [t("form.loras"), params.loras?.map((lora) => `${lora.name} ${lora.scale}`).join(", ")],
      [t("form.format"), params.format],
      [t("form.tags"), params.tags?.join(", ")],
      [t(task.kept ? "viewer.kept" : "viewer.expires"), task.kept && !task.expires_at ? t("viewer.kept_value") : expiry(task)[0]],
    ].filter(([, value]) => value !== undefined && value !== null && value !== "");
    find("viewer-params").replaceChildren(
      ...facts.map(([name, value]) => el("div", {}, el("dt", {}, name), el("dd", {}, String(value)))),
    );
  }

  #showActions(item) {
    const buttons = ACTIONS.map(([name, action]) =>
      iconButton(name, t(`gallery.${action}`), () => {
        this.#dialog.close();
        this.act[action](item);
      }),
    );
    this.#star = starButton(item, this.act);
    find("viewer-actions").replaceChildren(this.#star, downloadLink(item), ...buttons);
    const more = [
      ["copy", "viewer.copy_prompt", () => copyPrompt(item), Boolean(item.task.params.prompt)],
      ["list", "viewer.copy_parameters", () => copyParameters(item), true],
      ["link", "viewer.copy_link", () => copyLink(item), true],
      ["share", "viewer.share", () => share(item), canShare()],
      ["compare", "viewer.before_after", () => this.#beforeAfter(item), Boolean(inputPicture(item))],
    ];
    const shown = more.filter(([, , , possible]) => possible);
    find("viewer-more").replaceChildren(...shown.map(([name, words, run]) => iconButton(name, t(words), run)));
  }

  // Comparing

  async #beforeAfter(item) {
    if (!find("compare").hidden) return this.#endComparing();
    const url = await inputPicture(item)();
    if (url && this.#item && keyOf(this.#item) === keyOf(item)) this.#compare({ url, title: t("viewer.before") });
  }

  /** before: {url, title} of what is seen to the left of the line. */
  #compare({ url, title }) {
    this.zoom.reset();
    find("compare-picture").src = url;
    find("compare-picture").alt = title;
    find("compare").hidden = false;
    find("compare-split").value = 50;
    this.#split();
    find("compare-split").focus();
  }

  #split() {
    find("compare").style.setProperty("--split", `${find("compare-split").value}%`);
  }

  #endComparing() {
    const image = find("compare-picture");
    find("compare").hidden = true;
    if (image.src.startsWith("blob:")) URL.revokeObjectURL(image.src);
    image.removeAttribute("src");
  }
}
