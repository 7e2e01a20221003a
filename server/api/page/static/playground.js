// The playground: which adapters are asked, and asking them all at once.

import { getJson } from "./api.js";
import { byId, element } from "./format.js";
import { Lane } from "./lane.js";

const MOST_LANES = 4;

export class Playground {
  /** onKey(): the server wants a key. onPick(): other adapters are in it. */
  constructor({ onKey, onPick }) {
    this.onKey = onKey;
    this.onPick = onPick;
    this.lanes = [];
    this.uids = new Map(); // name -> uid, of the adapters that were seen
    byId("ask").addEventListener("submit", (event) => {
      event.preventDefault();
      this.send();
    });
    byId("prompt").addEventListener("keydown", (event) => {
      if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) byId("ask").requestSubmit();
    });
    byId("stop").addEventListener("click", () => this.lanes.forEach((lane) => lane.stop()));
    byId("add").addEventListener("click", () => this.addTyped());
    byId("pick").addEventListener("focus", () => this.offer());
    byId("pick").addEventListener("keydown", (event) => {
      if (event.key !== "Enter") return;
      event.preventDefault();
      this.addTyped();
    });
    this.show();
  }

  /** The names in it, and whether no more fit. */
  get picked() {
    const names = new Set(this.lanes.map((lane) => lane.model));
    names.full = this.lanes.length >= MOST_LANES;
    return names;
  }

  /** Note the colours of adapters, and begin with a few where nobody has chosen yet. */
  know(adapters, base) {
    for (const { name, uid } of adapters) this.uids.set(name, uid);
    if (this.begun) return;
    this.begun = true;
    if (base !== null) this.add(base, null);
    for (const { name, uid } of adapters.slice(0, base === null ? 3 : 2)) this.add(name, uid);
  }

  add(model, uid) {
    const picked = this.picked;
    if (picked.full || picked.has(model)) return;
    const lane = new Lane(model, uid, { onRemove: (gone) => this.remove(gone), onKey: this.onKey });
    this.lanes.push(lane);
    byId("lanes").append(lane.node);
    this.show();
    this.onPick();
  }

  addTyped() {
    const model = byId("pick").value.trim();
    if (!model) return;
    this.add(model, this.uids.get(model) ?? null);
    byId("pick").value = "";
  }

  remove(lane) {
    lane.stop();
    lane.node.remove();
    this.lanes = this.lanes.filter((each) => each !== lane);
    this.show();
    this.onPick();
  }

  /** Fill the list of names that the field completes. */
  async offer() {
    try {
      const models = (await getJson("v1/models")).data;
      for (const { id, parent, permission } of models) {
        const uid = parent && /-(\d+)$/.exec(permission?.[0]?.id ?? "")?.[1];
        if (uid && !this.uids.has(id)) this.uids.set(id, Number(uid));
      }
      byId("models").replaceChildren(...models.map(({ id }) => element("option", { value: id })));
    } catch {
      // The field still takes what is typed, and the poll tells what is wrong.
    }
  }

  async send() {
    const fields = {
      messages: [{ role: "user", content: byId("prompt").value }],
      max_tokens: byId("max-tokens").valueAsNumber,
      temperature: byId("temperature").valueAsNumber,
    };
    const asked = this.lanes.map((lane) => lane.ask(fields));
    this.show();
    await Promise.all(asked);
    this.show();
  }

  show() {
    const running = this.lanes.some((lane) => lane.isRunning);
    const full = this.lanes.length >= MOST_LANES;
    byId("stop").disabled = !running;
    byId("send").disabled = !this.lanes.length;
    byId("add").disabled = byId("pick").disabled = full;
    byId("pick").placeholder = full ? "Four at most" : "Add an adapter";
    byId("lanes").dataset.count = this.lanes.length;
  }
}
