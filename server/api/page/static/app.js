// The page: asks the server once a second for what it shows, as long as somebody can see it.

import { forgetKey, getJson, hasKey, setKey } from "./api.js";
import { drawArea, Scale } from "./charts.js";
import { byId, bytes, count, element, setText, short } from "./format.js";
import { PageMap } from "./map.js";
import { Playground } from "./playground.js";
import { AdapterTable } from "./table.js";
import { showAliases } from "./versions.js";

const EVERY = 1000; // ms
const PATIENCE = 10000; // ms, until it does not answer
const SLOWEST = 8000; // ms, between tries while it does not
const RECENT = 3; // seconds that the rates are means of

const map = new PageMap((name) => table.light(name));
const playground = new Playground({ onKey: askForKey, onPick: () => poll() });
const table = new AdapterTable({
  onChange: () => poll(),
  onPoint: (name) => map.light(name),
  onTry: (name, uid) => playground.add(name, uid),
});
const firstScale = new Scale(byId("first-scale"), 0.005, 20);
const nextScale = new Scale(byId("next-scale"), 0.001, 2);

// -- asking ----------------------------------------------------------------------------------------------------------------

let timer = 0;
let control = null;
let failures = 0;

async function poll() {
  clearTimeout(timer);
  control?.abort();
  if (document.hidden) return;
  const mine = (control = new AbortController());
  try {
    const signal = AbortSignal.any([mine.signal, AbortSignal.timeout(PATIENCE)]);
    show(await getJson(`ui/overview?${table.query()}`, signal));
    failures = 0;
    tell(null);
  } catch (error) {
    if (mine !== control || error.name === "AbortError") return;
    failures += 1;
    failed(error);
    if (error.status === 401) return; // until there is a key
  }
  if (mine === control) timer = setTimeout(poll, Math.min(SLOWEST, EVERY * 2 ** Math.max(0, failures - 1)));
}

function failed(error) {
  const away = error.status === 0;
  setState(away ? "away" : "failed", away ? "not reachable" : "refused");
  if (error.status === 401) askForKey(hasKey() ? "This server does not know that key." : null);
  else tell(away ? "The server does not answer. This page tries again." : error.message);
}

// -- showing ---------------------------------------------------------------------------------------------------------------

function show(found) {
  const { server, minute, requests } = found;
  const states = { ready: "serving", draining: `stopping, ${Math.round(server.seconds_left)} s left`, dead: "the engine has crashed" };
  setState(server.state, states[server.state]);
  document.title = `${server.base} · loraplex`;
  const about = [server.base, `${server.device} ${server.formats}`, `context ${count(server.max_model_len)}`, server.tenant && `tenant ${server.tenant}`];
  setText(byId("about"), about.filter(Boolean).join(" · "));
  byId("key-button").hidden = !hasKey();

  const rate = (values) => values.slice(-RECENT).reduce((sum, n) => sum + n, 0) / RECENT;
  setText(byId("rate-out"), short(rate(minute.tokens)));
  setText(byId("rate-in"), short(rate(minute.prompt_tokens)));
  drawArea(byId("chart-out"), minute.tokens, 20);
  drawArea(byId("chart-in"), minute.prompt_tokens, 20);
  showLatency("first-median", firstScale, minute.first_token);
  showLatency("next-median", nextScale, minute.next_token);
  showRequests(requests);

  map.update(found.arena);
  showMemory(found.memory);
  playground.know(found.adapters.rows, server.may_use_base ? server.base : null);
  table.update(found.adapters, playground.picked);
  showAliases(found.aliases);
}

function showLatency(id, scale, found) {
  const ms = found ? found.p50 * 1000 : 0;
  const text = ms < 10 ? ms.toFixed(1) : ms < 1000 ? Math.round(ms).toString() : (ms / 1000).toFixed(1);
  if (found) byId(id).replaceChildren(text, " ", element("span", {}, ms < 1000 ? "ms" : "s"));
  else setText(byId(id), "–");
  scale.draw(found);
}

function showRequests(requests) {
  setText(byId("running"), count(requests.running));
  setText(byId("running-most"), `of ${count(requests.max_running)} running`);
  byId("running-meter").style.setProperty("width", `${(100 * requests.running) / requests.max_running}%`);
  const forAdapters = requests.waiting_for_adapters ? `, ${count(requests.waiting_for_adapters)} for an adapter alone` : "";
  setText(byId("waiting"), requests.waiting ? `${count(requests.waiting)} waiting${forAdapters}` : "nobody waits");
}

function showMemory(parts) {
  const total = parts.reduce((sum, part) => sum + part.bytes, 0);
  setText(byId("memory-total"), bytes(total));
  const bar = byId("memory-bar");
  const list = byId("memory-parts");
  if (bar.children.length !== parts.length) {
    bar.replaceChildren(...parts.map((part) => element("i", { "data-part": part.name })));
    list.replaceChildren(
      ...parts.map((part) => {
        const name = element("dt", {}, element("i", { "data-part": part.name }), part.name);
        return element("div", {}, name, element("dd"), element("dd", { class: "muted small remark" }, part.remark));
      }),
    );
  }
  parts.forEach((part, i) => {
    bar.children[i].style.setProperty("flex-grow", String(part.bytes));
    setText(list.children[i].children[1], bytes(part.bytes));
  });
}

function setState(state, words) {
  byId("state").dataset.state = state;
  setText(byId("state"), words);
}

function tell(words) {
  byId("notice").hidden = words === null;
  setText(byId("notice"), words ?? "");
}

// -- the key ---------------------------------------------------------------------------------------------------------------

/** wrong: what was said of the key that was tried; null: none was. */
function askForKey(wrong = null) {
  byId("key-button").hidden = false;
  byId("key-wrong").hidden = wrong === null;
  setText(byId("key-wrong"), wrong ?? "");
  byId("key-forget").hidden = !hasKey();
  if (!byId("key-dialog").open) byId("key-dialog").showModal();
}

byId("key-button").addEventListener("click", () => askForKey());
byId("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  setKey(byId("key-input").value.trim());
  byId("key-input").value = "";
  byId("key-dialog").close();
  poll();
});
byId("key-forget").addEventListener("click", () => {
  forgetKey();
  location.reload(); // and with the key goes all that it had shown
});
byId("key-dialog").addEventListener("cancel", () => tell("This server shows nothing without a key."));
document.addEventListener("visibilitychange", () => poll());

poll();
