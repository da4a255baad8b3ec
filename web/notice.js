// What shows that a picture is ready while the page is not looked at: tab title, notification, sound.

import { find } from "./dom.js";
import { t } from "./language.js";
import { read, write } from "./store.js";
import { remaining, stored } from "./tasks.js";
import { toast } from "./toasts.js";
import { countdown } from "./words.js";

const TITLE = document.title;
const TONES_HZ = [660, 880];
const TONE_S = 0.18;

export class Notice {
  #button = find("notify");
  #icon = document.querySelector("link[rel=icon]");
  #on = read("notify") === true;
  #audio = null;
  #ready = 0;

  constructor(tasks) {
    this.tasks = tasks;
    this.#button.addEventListener("click", () => this.#switch(!this.#on));
    document.addEventListener("pointerdown", () => this.#on && this.#wakeAudio(), { once: true });
    addEventListener("focus", () => {
      this.#ready = 0;
      this.tick();
    });
    this.#show();
  }

  /** Shows the countdown of the next own picture in the tab, or how many are ready, also in its icon. */
  tick() {
    const lefts = this.tasks.live().map(remaining);
    const words = lefts.length ? `${countdown(Math.min(...lefts))} · ${TITLE}` : TITLE;
    const title = this.#ready ? `(${t("notice.ready", { n: this.#ready })}) ${words}` : words;
    if (document.title !== title) document.title = title;
    const icon = this.#ready ? "web/ready.svg" : "web/icon.svg";
    if (this.#icon.getAttribute("href") !== icon) this.#icon.setAttribute("href", icon);
  }

  /** A task has ended. */
  ended(task) {
    if (document.hasFocus() || task.status === "cancelled") return;
    this.#ready += stored(task);
    this.tick();
    if (!this.#on) return;
    this.#play();
    if (globalThis.Notification?.permission !== "granted") return;
    const words = t(task.status === "failed" ? "notice.failed" : "notice.done");
    const shown = new Notification(words, { body: task.params.prompt, tag: task.id, icon: "web/icon.svg" });
    shown.addEventListener("click", () => {
      focus();
      shown.close();
    });
  }

  async #switch(on) {
    this.#on = on;
    write("notify", on || null);
    this.#show();
    if (!on) return;
    this.#wakeAudio();
    const permission = (await globalThis.Notification?.requestPermission()) ?? "denied";
    toast(t(permission === "granted" ? "notice.on" : "notice.sound_only"));
  }

  #show() {
    this.#button.setAttribute("aria-pressed", String(this.#on));
  }

  /** Browsers play sounds only after a click or a key. */
  #wakeAudio() {
    this.#audio ??= new AudioContext();
    this.#audio.resume();
  }

  #play() {
    if (this.#audio?.state !== "running") return;
    TONES_HZ.forEach((frequency, index) => {
      const tone = new OscillatorNode(this.#audio, { frequency });
      const volume = new GainNode(this.#audio, { gain: 0.08 });
      tone.connect(volume).connect(this.#audio.destination);
      tone.start(this.#audio.currentTime + index * TONE_S);
      tone.stop(this.#audio.currentTime + (index + 1) * TONE_S);
    });
  }
}
