// The forecast on the button: when a picture would be ready that is asked for now.

import { find, setText } from "./dom.js";
import { t } from "./language.js";
import { estimate } from "./request.js";
import { duration } from "./words.js";

const PAUSE_MS = 350;

export class ButtonForecast {
  #timer = null;
  #request = null;

  /**
   * ask(): the request of the form as it is now, or a text that is shown instead; on.answered(answer)
   * and on.failed(error) are called with what the server says.
   */
  constructor(ask, on) {
    this.ask = ask;
    this.on = on;
  }

  soon() {
    clearTimeout(this.#timer);
    this.#timer = setTimeout(() => this.#now(), PAUSE_MS);
  }

  async #now() {
    this.#request?.abort();
    const aborter = (this.#request = new AbortController());
    const request = this.ask();
    if (typeof request === "string") return this.#show(request);
    try {
      const answer = await estimate(request, aborter.signal);
      if (aborter.signal.aborted) return;
      this.on.answered(answer);
      const time = duration(answer.expected_time_seconds);
      const ready = t(answer.confidence === "none" ? "form.ready_roughly" : "form.ready_about", { time });
      const others = answer.task_length ? ` · ${t("form.tasks_in_queue", { n: answer.task_length })}` : "";
      this.#show(ready + others, t("form.within_p90", { time: duration(answer.wait_p90_s) }));
    } catch (error) {
      if (aborter.signal.aborted) return;
      this.#show("");
      this.on.failed(error);
    }
  }

  #show(words, title = "") {
    setText(find("forecast"), words);
    find("generate").title = title;
  }
}
