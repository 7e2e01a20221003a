// Numbers for people, colours for adapters, and elements. Names and answers are strangers' text: they only ever become
// text nodes, and the page's policy makes everything that parses HTML throw.

export const byId = (id) => document.getElementById(id);

/** An element with attributes and children; strings become text nodes. */
export function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value === true) made.setAttribute(name, "");
    else if (value !== false && value !== null) made.setAttribute(name, value);
  }
  made.append(...children);
  return made;
}

export function svgElement(tag, attributes = {}) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  return made;
}

/** Set text only where it differs: what somebody has selected stays selected. */
export function setText(node, text) {
  if (node.textContent !== text) node.textContent = text;
}

export const count = (n) => (n === null ? "–" : n.toLocaleString("en"));

/** 950, 1.2k, 34k, 5.6M */
export function short(n) {
  if (n < 1000) return n < 10 && n % 1 ? n.toFixed(1) : Math.round(n).toString();
  const [unit, size] = n < 1e6 ? ["k", 1e3] : n < 1e9 ? ["M", 1e6] : ["G", 1e9];
  const scaled = n / size;
  return (scaled < 10 ? scaled.toFixed(1) : Math.round(scaled)) + unit;
}

export function bytes(n) {
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  let power = 0;
  while (n >= 1024 && power < units.length - 1) [n, power] = [n / 1024, power + 1];
  return `${n < 10 && power ? n.toFixed(1) : Math.round(n)} ${units[power]}`;
}

/** Seconds as 8.4 ms, 120 ms, 3.2 s */
export function duration(seconds) {
  const ms = seconds * 1000;
  if (ms < 10) return `${ms.toFixed(1)} ms`;
  if (ms < 1000) return `${Math.round(ms)} ms`;
  return `${seconds < 10 ? seconds.toFixed(1) : Math.round(seconds)} s`;
}

/** Degrees on the colour wheel. Neighbours by registration are the golden angle apart, so that few look alike. */
export const hueOf = (uid) => (uid * 137.508 + 12) % 360;

/** Give an element the colour of an adapter, or none: CSS makes it from --hue. */
export function paint(node, uid) {
  node.classList.toggle("base", uid === null);
  if (uid !== null) node.style.setProperty("--hue", hueOf(uid).toFixed(1));
}
