// A minute as an area, and three quantiles on a logarithmic scale.

import { duration, element, setText, svgElement } from "./format.js";

const WIDTH = 240;
const HEIGHT = 56;

/** Draw one value a second; the height is that of the largest, and never less than `least`. */
export function drawArea(svg, values, least = 1) {
  const most = Math.max(least, ...values);
  const step = WIDTH / (values.length - 1);
  const points = values.map((value, i) => [i * step, HEIGHT - 2 - (value / most) * (HEIGHT - 8)]);
  const line = points.map(([x, y], i) => `${i ? "L" : "M"}${x.toFixed(1)} ${y.toFixed(1)}`).join("");
  if (!svg.firstChild) {
    svg.setAttribute("viewBox", `0 0 ${WIDTH} ${HEIGHT}`);
    svg.setAttribute("preserveAspectRatio", "none");
    svg.append(svgElement("path", { class: "area" }), svgElement("path", { class: "line" }));
  }
  svg.children[0].setAttribute("d", `${line}L${WIDTH} ${HEIGHT}L0 ${HEIGHT}Z`);
  svg.children[1].setAttribute("d", line);
}

/** A track from `from` to `to` seconds with p50, p95 and p99 on it; null: nothing happened in that minute. */
export class Scale {
  constructor(node, from, to) {
    this.place = (value) => Math.min(1, Math.max(0, Math.log(value / from) / Math.log(to / from)));
    this.marks = ["p50", "p95", "p99"].map((name) => element("i", { class: name }));
    this.span = element("b");
    this.text = element("p", { class: "muted small" });
    node.append(element("div", { class: "track", "aria-hidden": "true" }, this.span, ...this.marks), this.text);
  }

  draw(found) {
    for (const node of [this.span, ...this.marks]) node.hidden = found === null;
    setText(this.text, found ? `p95 ${duration(found.p95)} · p99 ${duration(found.p99)}` : "none in the last minute");
    if (!found) return;
    const places = [found.p50, found.p95, found.p99].map(this.place);
    this.marks.forEach((mark, i) => mark.style.setProperty("left", `${places[i] * 100}%`));
    this.span.style.setProperty("left", `${places[0] * 100}%`);
    this.span.style.setProperty("width", `${(places[2] - places[0]) * 100}%`);
  }
}
