// The forecast on the button: when a picture would be ready that is asked for now.

import { find, setText } from "./dom.js";
import { t } from "./language.js";
import { estimate } from "./request.js";
import { duration } from "./words.js";

const PAUSE_MS = 350;

export class ButtonForecast {
  #timer = null;
  #request = null;
  #answer = null;
  #answeredAt = 0;

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

  /** The wait counts down like that of the tasks in the queue; then the picture itself takes its time. */
  tick() {
    if (!this.#answer) return;
    const { expected_time_seconds: time, expected_start_at: start, expected_end_at: end } = this.#answer;
    const own = end - start;
    this.#showTime(Math.max(time - own - (performance.now() - this.#answeredAt) / 1000, 0) + own);
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
      [this.#answer, this.#answeredAt] = [answer, performance.now()];
      this.tick();
    } catch (error) {
      if (aborter.signal.aborted) return;
      this.#show("");
      this.on.failed(error);
    }
  }

  #showTime(seconds) {
    const { confidence, task_length: others, wait_p90_s: p90 } = this.#answer;
    const ready = t(confidence === "none" ? "form.ready_roughly" : "form.ready_about", { time: duration(seconds) });
    const queue = others ? ` · ${t("form.tasks_in_queue", { n: others })}` : "";
    setText(find("forecast"), ready + queue);
    find("generate").title = t("form.within_p90", { time: duration(p90) });
  }

  #show(words, title = "") {
    this.#answer = null;
    setText(find("forecast"), words);
    find("generate").title = title;
  }
}
