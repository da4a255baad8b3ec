// The forecast on the button: when a picture would be ready that is asked for now.

import { find, setText } from "./dom.js";
import { t } from "./language.js";
import { estimate } from "./request.js";
import { duration } from "./words.js";

export class ButtonForecast {
  #request = null;
  #answer = null;
  #answeredAt = 0;

  /**
   * request(): of the form as it is now, or a text that is shown instead; on.answered(answer) and
   * on.failed(error) are called with what the server says.
   */
  constructor(request, on) {
    this.request = request;
    this.on = on;
  }

  /** Asks the server. Returns its answer, which show() shows; null: there is none, or the form has changed. */
  async ask() {
    this.forget();
    const { signal } = (this.#request = new AbortController());
    const request = this.request();
    if (typeof request === "string") return this.#say(request);
    try {
      return await estimate(request, signal);
    } catch (error) {
      if (signal.aborted) return null;
      this.on.failed(error);
      return this.#say("");
    }
  }

  /** The answer that is on its way is of a form that has changed. */
  forget() {
    this.#request?.abort();
  }

  show(answer) {
    this.on.answered(answer);
    [this.#answer, this.#answeredAt] = [answer, performance.now()];
    this.tick();
  }

  /** What is ahead ends so many seconds later than the answer said. */
  postpone(seconds) {
    this.#answeredAt += seconds * 1000;
  }

  /** The wait counts down like that of the tasks in the queue; then the picture itself takes its time. */
  tick() {
    if (!this.#answer) return;
    const { expected_time_seconds: time, expected_start_at: start, expected_end_at: end } = this.#answer;
    const own = end - start;
    this.#showTime(Math.max(time - own - (performance.now() - this.#answeredAt) / 1000, 0) + own);
  }

  #showTime(seconds) {
    const { confidence, task_length: others, wait_p90_s: p90 } = this.#answer;
    const ready = t(confidence === "none" ? "form.ready_roughly" : "form.ready_about", { time: duration(seconds) });
    const queue = others ? ` · ${t("form.tasks_in_queue", { n: others })}` : "";
    setText(find("forecast"), ready + queue);
    find("generate").title = t("form.within_p90", { time: duration(p90) });
  }

  #say(words) {
    this.#answer = null;
    setText(find("forecast"), words);
    find("generate").title = "";
    return null;
  }
}
