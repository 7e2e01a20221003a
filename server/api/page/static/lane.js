// One adapter of the playground: a request of its own, its tokens as they come, and how fast they came.

import { ApiError, streamChat } from "./api.js";
import { count, duration, element, paint, setText } from "./format.js";

const ENDINGS = { stop: "finished", length: "cut off" };

export class Lane {
  /** model: what the request names; uid: of the adapter, null where it has no colour. onRemove(lane), onKey(). */
  constructor(model, uid, { onRemove, onKey }) {
    this.model = model;
    this.onKey = onKey;
    this.control = null; // of the request that runs
    this.text = document.createTextNode("");
    this.answer = element("div", { class: "answer", tabindex: "0", role: "log", "aria-label": `Answer of ${model}`, "aria-live": "off" }, this.text);
    this.wrong = element("p", { class: "wrong", role: "alert", hidden: true });
    this.facts = ["first token", "tokens/s", "tokens"].map((name) => [element("dd", {}, "–"), element("dt", {}, name)]);
    const remove = element("button", { type: "button", class: "quiet small", "aria-label": `Remove ${model}` }, "✕");
    remove.addEventListener("click", () => onRemove(this));
    this.ending = element("span", { class: "ending muted small" });
    this.node = element(
      "article",
      { class: "lane", "data-model": model, "data-state": "idle" },
      element("header", {}, element("i", { class: "swatch" }), element("h3", { title: model }, model), this.ending, remove),
      this.answer,
      this.wrong,
      element("dl", {}, ...this.facts.map(([value, name]) => element("div", {}, value, name))),
    );
    paint(this.node, uid);
  }

  get isRunning() {
    return this.control !== null;
  }

  stop() {
    this.control?.abort();
  }

  /** Ask, and show the answer as it comes. Resolves when it has ended, in whatever way. */
  async ask(fields) {
    this.stop();
    const control = (this.control = new AbortController());
    this.begin();
    const began = performance.now();
    const seen = { tokens: 0, first: 0, last: 0 };
    try {
      for await (const chunk of streamChat({ ...fields, model: this.model }, control.signal)) this.take(chunk, seen, began);
      this.end("done", ENDINGS[this.reason] ?? this.reason ?? "");
    } catch (error) {
      if (control.signal.aborted) this.end("stopped", "stopped");
      else this.fail(error);
    }
    if (this.control === control) this.control = null;
  }

  begin() {
    this.reason = null;
    this.text.data = "";
    this.wrong.hidden = true;
    this.node.dataset.state = "running";
    setText(this.ending, "");
    for (const [value] of this.facts) setText(value, "–");
  }

  take(chunk, seen, began) {
    const choice = chunk.choices?.[0];
    const text = choice?.delta?.content ?? choice?.delta?.reasoning_content ?? "";
    const now = performance.now();
    if (text) {
      if (!seen.tokens) seen.first = now;
      seen.tokens += 1;
      seen.last = now;
      const atEnd = this.answer.scrollTop + this.answer.clientHeight >= this.answer.scrollHeight - 4;
      this.text.appendData(text);
      if (atEnd) this.answer.scrollTop = this.answer.scrollHeight;
    }
    this.reason = choice?.finish_reason ?? this.reason;
    if (chunk.usage) seen.tokens = chunk.usage.completion_tokens; // a chunk may hold several
    if (seen.first) this.measure(seen, began);
  }

  measure(seen, began) {
    const seconds = (seen.last - seen.first) / 1000;
    const [[first], [rate], [tokens]] = this.facts;
    setText(first, duration((seen.first - began) / 1000));
    setText(rate, seconds > 0 && seen.tokens > 1 ? ((seen.tokens - 1) / seconds).toFixed(1) : "–");
    setText(tokens, count(seen.tokens));
  }

  end(state, words) {
    this.node.dataset.state = state;
    setText(this.ending, words);
  }

  fail(error) {
    this.end("failed", "");
    const id = error instanceof ApiError && error.requestId ? ` (request ${error.requestId})` : "";
    setText(this.wrong, `${error.message}${id}`);
    this.wrong.hidden = false;
    if (error.status === 401) this.onKey();
  }
}
