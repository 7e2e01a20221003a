// The arena, a square a page. Runs of [owner, pages] come from the server; owners from OTHER + 1 on are adapters by name.

import { byId, bytes, count, element, hueOf, setText } from "./format.js";

const [FREE, KV, PREFIX, OTHER] = [0, 1, 2, 3];
const KINDS = [
  [KV, "kv", "KV cache"],
  [PREFIX, "prefix", "cached prefixes"],
  [OTHER, "other", "other adapters"],
  [FREE, "free", "free"],
];
const HEIGHT = 290; // that the map is laid out for, in CSS pixels; more pages than fit make it higher
const FLASH = 700; // ms that a page which has changed hands is lighter
const MOST_FLASHING = 6000; // pages that are drawn anew in each frame of it

/** [owner of page 0, owner of page 1, ...] */
export function decodeRuns(runs) {
  const owners = [];
  for (let i = 0; i < runs.length; i += 2) for (let n = runs[i + 1]; n > 0; n--) owners.push(runs[i]);
  return owners;
}

export class PageMap {
  /** onPoint(name or null): an adapter's page is pointed at. */
  constructor(onPoint) {
    this.canvas = byId("map");
    this.onPoint = onPoint;
    this.owners = [];
    this.names = [];
    this.uids = [];
    this.changed = new Map(); // page -> ms when it changed hands
    this.cursor = null; // the page pointed at
    this.lit = null; // the adapter whose pages stand out
    new ResizeObserver(() => this.draw()).observe(this.canvas);
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => this.draw());
    this.calm = matchMedia("(prefers-reduced-motion: reduce)");
    this.canvas.addEventListener("pointermove", (event) => this.point(this.pageAt(event)));
    this.canvas.addEventListener("pointerdown", (event) => this.point(this.pageAt(event)));
    this.canvas.addEventListener("pointerleave", () => this.point(null));
    this.canvas.addEventListener("blur", () => this.point(null));
    this.canvas.addEventListener("keydown", (event) => this.move(event));
  }

  update(arena) {
    const owners = decodeRuns(arena.runs).map((owner) => (owner > OTHER ? arena.names[owner - OTHER - 1] : owner));
    if (owners.length === this.owners.length && !this.calm.matches && owners.length <= MOST_FLASHING) {
      const now = performance.now();
      owners.forEach((owner, page) => owner !== this.owners[page] && this.changed.set(page, now));
    }
    [this.owners, this.names, this.uids] = [owners, arena.names, arena.uids];
    this.describe(arena);
    this.tell();
    this.draw();
  }

  /** Let the pages of one adapter stand out; null: of none. */
  light(name) {
    if (this.lit === name) return;
    this.lit = name;
    this.draw();
  }

  // -- pointing ----------------------------------------------------------------------------------------------------------

  pageAt(event) {
    const box = this.canvas.getBoundingClientRect();
    const column = Math.floor((event.clientX - box.left) / this.pitch);
    const page = Math.floor((event.clientY - box.top) / this.pitch) * this.columns + column;
    return column >= 0 && column < this.columns && page >= 0 && page < this.owners.length ? page : null;
  }

  point(page) {
    if (page === this.cursor) return;
    this.cursor = page;
    const owner = page === null ? null : this.owners[page];
    this.lit = typeof owner === "string" ? owner : null;
    this.onPoint(this.lit);
    this.tell();
    this.draw();
  }

  move(event) {
    const steps = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -this.columns, ArrowDown: this.columns };
    const step = steps[event.key];
    if (step === undefined || !this.owners.length) return;
    event.preventDefault();
    const next = this.cursor === null ? 0 : this.cursor + step;
    if (next >= 0 && next < this.owners.length) this.point(next);
  }

  // -- words -------------------------------------------------------------------------------------------------------------

  describe(arena) {
    const held = new Map();
    for (const owner of this.owners) held.set(owner, (held.get(owner) ?? 0) + 1);
    this.held = held;
    const named = this.names.reduce((sum, name) => sum + (held.get(name) ?? 0), 0);
    const items = [["adapter", "adapters", named], ...KINDS.map(([kind, style, text]) => [style, text, held.get(kind) ?? 0])];
    const shown = items.filter(([style, , pages]) => style !== "other" || pages);
    const legend = byId("legend");
    if (legend.children.length !== shown.length) {
      legend.replaceChildren(
        ...shown.map(([style, text]) => element("li", { "data-kind": style }, element("i", { class: style }), `${text} `, element("b"))),
      );
    }
    shown.forEach(([style, text, pages], i) => {
      const item = legend.children[i];
      if (item.dataset.kind !== style) item.replaceChildren(element("i", { class: style }), `${text} `, element("b"));
      item.dataset.kind = style;
      item.dataset.pages = pages;
      setText(item.lastChild, count(pages));
    });
    setText(byId("map-about"), `${count(arena.num_pages)} of ${bytes(arena.page_bytes)} · ${count(arena.slots)} of ${count(arena.max_slots)} slots`);
    this.canvas.setAttribute("aria-label", `The arena's pages: ${shown.map(([, text, pages]) => `${pages} ${text}`).join(", ")}`);
  }

  tell() {
    const owner = this.cursor === null ? null : this.owners[this.cursor];
    let text = "Point at a page, or walk over them with the arrow keys.";
    if (owner !== null && owner !== undefined) {
      const whose = typeof owner === "string" ? owner : KINDS.find(([kind]) => kind === owner)[2];
      text = `Page ${count(this.cursor)}: ${whose}, with ${count(this.held.get(owner) ?? 0)} in all`;
    }
    setText(byId("map-cell"), text);
  }

  // -- drawing -----------------------------------------------------------------------------------------------------------

  layOut(width) {
    const pages = Math.max(1, this.owners.length);
    this.pitch = Math.min(16, Math.max(3, Math.floor(Math.sqrt((width * HEIGHT) / pages))));
    this.columns = Math.max(1, Math.floor(width / this.pitch));
    return Math.ceil(pages / this.columns) * this.pitch;
  }

  colours() {
    const style = getComputedStyle(this.canvas);
    const read = (name) => style.getPropertyValue(name).trim();
    const [light, chroma] = [read("--adapter-l"), read("--adapter-c")];
    const colours = new Map(KINDS.map(([kind, name]) => [kind, read(`--page-${name}`)]));
    this.names.forEach((name, i) => colours.set(name, `oklch(${light} ${chroma} ${hueOf(this.uids[i]).toFixed(1)})`));
    return [colours, read("--text")];
  }

  draw() {
    const width = this.canvas.clientWidth;
    if (!width || !this.owners.length) return;
    const height = this.layOut(width);
    const scale = devicePixelRatio || 1;
    const [wide, high] = [Math.round(width * scale), Math.round(height * scale)];
    if (this.canvas.width !== wide || this.canvas.height !== high) {
      [this.canvas.width, this.canvas.height] = [wide, high];
      this.canvas.style.setProperty("height", `${height}px`);
    }
    const context = this.canvas.getContext("2d");
    context.setTransform(scale, 0, 0, scale, 0, 0);
    context.clearRect(0, 0, width, height);
    const [colours, ink] = this.colours();
    const paths = new Map();
    const size = this.pitch - (this.pitch > 9 ? 2 : this.pitch > 4 ? 1 : 0.5);
    const corner = this.pitch > 9 ? 2.5 : this.pitch > 6 ? 1 : 0;
    const add = (path, page) => path.roundRect((page % this.columns) * this.pitch, Math.floor(page / this.columns) * this.pitch, size, size, corner);
    this.owners.forEach((owner, page) => {
      if (!paths.has(owner)) paths.set(owner, new Path2D());
      add(paths.get(owner), page);
    });
    for (const [owner, path] of paths) {
      context.globalAlpha = this.lit === null || owner === this.lit ? 1 : 0.28;
      context.fillStyle = colours.get(owner) ?? colours.get(OTHER);
      context.fill(path);
    }
    this.flash(context, ink, add);
    if (this.cursor !== null) {
      const path = new Path2D();
      add(path, this.cursor);
      [context.globalAlpha, context.strokeStyle, context.lineWidth] = [1, ink, 1.5];
      context.stroke(path);
    }
  }

  flash(context, ink, add) {
    const now = performance.now();
    context.fillStyle = ink;
    for (const [page, since] of this.changed) {
      const left = 1 - (now - since) / FLASH;
      if (left <= 0 || page >= this.owners.length) {
        this.changed.delete(page);
        continue;
      }
      context.globalAlpha = 0.45 * left;
      const path = new Path2D();
      add(path, page);
      context.fill(path);
    }
    if (this.changed.size && !this.frame) {
      this.frame = requestAnimationFrame(() => {
        this.frame = 0;
        this.draw();
      });
    }
  }
}
