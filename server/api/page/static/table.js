// The table of adapters. The server filters, sorts and cuts it, so that a thousand adapters are as light as twelve.

import { byId, bytes, count, element, paint, setText } from "./format.js";
import { receiptText, versionText } from "./versions.js";

const ROWS = 12; // of a page of the table
const LEVELS = ["device", "host", "disk"];

// field of a row, heading, whether it is a number, what it means
const COLUMNS = [
  ["name", "Name", false, "What requests call it"],
  ["level", "Lives on", false, "The nearest place that has its bytes"],
  ["rank", "Rank", true, "The largest of its modules"],
  ["pages", "Pages", true, "That it takes on the device, at most"],
  ["bytes", "Size", true, "Of its weights as they are served"],
  ["in_use", "Open", true, "Requests that hold it now"],
  ["requests", "Requests", true, "Answers that have ended"],
  ["tokens", "Tokens", true, "Generated for these"],
  ["loads", "Loads", true, "Times it was copied to the device"],
];

export class AdapterTable {
  /** onChange(): other rows are wanted. onPoint(name or null): a row is pointed at. onTry(name, uid): its button. */
  constructor({ onChange, onPoint, onTry }) {
    this.onChange = onChange;
    this.onPoint = onPoint;
    this.onTry = onTry;
    this.view = { filter: "", level: "", sort: "level", order: "asc", offset: 0 };
    this.found = 0;
    this.makeHead();
    this.makeLevels();
    byId("filter").addEventListener("input", (event) => this.change({ filter: event.target.value.trim() }));
    byId("page-back").addEventListener("click", () => this.change({ offset: Math.max(0, this.view.offset - ROWS) }));
    byId("page-on").addEventListener("click", () => this.change({ offset: this.view.offset + ROWS }));
    byId("rows").addEventListener("pointerleave", () => this.onPoint(null));
  }

  /** For the server. */
  query() {
    return new URLSearchParams({ ...this.view, limit: ROWS }).toString();
  }

  update(adapters, picked) {
    this.found = adapters.found;
    if (this.view.offset && this.view.offset >= adapters.found) return this.change({ offset: 0 });
    const body = byId("rows");
    while (body.children.length > adapters.rows.length) body.lastChild.remove();
    while (body.children.length < adapters.rows.length) body.append(this.makeRow());
    adapters.rows.forEach((row, i) => this.fill(body.children[i], row, picked));
    this.tell(adapters);
  }

  /** Mark the row of an adapter that is pointed at elsewhere. */
  light(name) {
    for (const row of byId("rows").children) row.classList.toggle("lit", name !== null && row.dataset.name === name);
  }

  change(changes) {
    this.view = { ...this.view, offset: 0, ...changes };
    this.markHead();
    for (const button of byId("levels").children) button.setAttribute("aria-pressed", button.dataset.level === this.view.level);
    this.onChange();
  }

  // -- parts -------------------------------------------------------------------------------------------------------------

  makeHead() {
    for (const [field, title, number, meaning] of COLUMNS) {
      const button = element("button", { type: "button", title: meaning }, title);
      button.addEventListener("click", () => {
        const turned = this.view.order === "asc" ? "desc" : "asc";
        this.change({ sort: field, order: this.view.sort === field ? turned : number ? "desc" : "asc" });
      });
      byId("columns").append(element("th", { scope: "col", class: `${field}${number ? " number" : ""}`, "data-field": field }, button));
    }
    byId("columns").append(element("th", { class: "try" }, element("span", { class: "unseen" }, "Playground")));
    this.markHead();
  }

  markHead() {
    for (const head of byId("columns").children) {
      if (!head.dataset.field) continue;
      const order = this.view.order === "asc" ? "ascending" : "descending";
      if (head.dataset.field === this.view.sort) head.setAttribute("aria-sort", order);
      else head.removeAttribute("aria-sort");
    }
  }

  makeLevels() {
    for (const level of ["", ...LEVELS]) {
      const button = element(
        "button",
        { type: "button", "data-level": level, "aria-pressed": String(level === "") },
        level ? element("i", { class: `dot ${level}` }) : "",
        `${level || "all"} `,
        element("b", {}, "–"),
      );
      button.addEventListener("click", () => this.change({ level }));
      byId("levels").append(button);
    }
  }

  makeRow() {
    const row = element("tr");
    for (const [field, , number] of COLUMNS) row.append(element(field === "name" ? "th" : "td", { class: `${field}${number ? " number" : ""}` }));
    row.children[0].setAttribute("scope", "row");
    row.children[0].append(element("i", { class: "swatch" }), element("span"), element("em", { hidden: true }, "pinned"), element("small", { class: "version muted" }), element("small", { class: "receipt muted" }));
    row.children[1].append(element("i", { class: "dot" }), element("span"));
    const button = element("button", { type: "button", class: "quiet small" }, "Try");
    button.addEventListener("click", () => this.onTry(row.dataset.name, Number(row.dataset.uid)));
    row.append(element("td", { class: "try" }, button));
    row.addEventListener("pointerenter", () => this.onPoint(row.dataset.name));
    row.addEventListener("focusin", () => this.onPoint(row.dataset.name));
    row.addEventListener("focusout", () => this.onPoint(null));
    return row;
  }

  fill(row, adapter, picked) {
    [row.dataset.name, row.dataset.uid, row.dataset.level] = [adapter.name, adapter.uid, adapter.level];
    const [name, level, ...numbers] = row.children;
    const button = numbers.pop().firstChild;
    paint(row, adapter.uid);
    setText(name.children[1], adapter.name);
    name.children[2].hidden = !adapter.pinned;
    const [version, versions] = versionText(adapter.versions);
    setText(name.children[3], version);
    name.children[3].title = versions;
    const [receipt, words, doubted] = receiptText(adapter.proof);
    setText(name.children[4], receipt);
    name.children[4].title = words;
    name.children[4].classList.toggle("wrong", doubted);
    level.firstChild.className = `dot ${adapter.level}`;
    setText(level.lastChild, adapter.level);
    numbers.forEach((cell, i) => {
      const field = COLUMNS[i + 2][0];
      setText(cell, field === "bytes" ? bytes(adapter.bytes) : count(adapter[field]));
      cell.classList.toggle("none", !adapter[field]);
    });
    const isIn = picked.has(adapter.name);
    setText(button, isIn ? "Added" : "Try");
    button.disabled = isIn || picked.full;
    button.setAttribute("aria-label", isIn ? `${adapter.name} is in the playground` : `Try ${adapter.name} in the playground`);
  }

  tell(adapters) {
    for (const button of byId("levels").children) {
      setText(button.lastChild, count(button.dataset.level ? adapters.levels[button.dataset.level] : adapters.total));
    }
    const first = adapters.offset + 1;
    const last = adapters.offset + adapters.rows.length;
    const narrowed = adapters.found < adapters.total;
    setText(byId("page-about"), `${first}–${last} of ${count(adapters.found)}`);
    document.querySelector(".pager").hidden = adapters.found <= ROWS;
    byId("page-back").disabled = !adapters.offset;
    byId("page-on").disabled = last >= adapters.found;
    byId("no-rows").hidden = adapters.rows.length > 0;
    setText(byId("no-rows"), narrowed ? "No adapter fits." : "No adapters yet. POST /v1/load_lora_adapter, or --adapter-dir, brings some.");
  }
}
