// Versions of adapters, and the names that stand for them.

import { byId, count, element, setText } from "./format.js";

const DIGITS = 12; // of a digest, as requests may ask for it

/** [short text, all of it in words] of an adapter's versions, the one that serves first. */
export function versionText(versions) {
  if (!versions.length) return ["not read yet", "Its files are read with the first request"];
  const words = versions.map(({ digest, state, labels }) => [digest.slice(0, DIGITS), ...labels, state].join(" "));
  const [first] = versions;
  const more = versions.length > 1 ? `+${versions.length - 1}` : "";
  return [[first.digest.slice(0, DIGITS), ...first.labels, more].filter(Boolean).join(" "), words.join("\n")];
}

const percent = (part) => `${Number((100 * part).toPrecision(3))} %`;
const difference = (value) => (value === null ? "none" : Number(value.toPrecision(2)).toString());

/** [short text, all of it in words, whether it is in doubt] of what an adapter's receipt came to. */
export function receiptText(proof) {
  if (proof.status !== "made") {
    const text = { pending: "receipt under way", failed: "receipt failed", none: "no receipt" }[proof.status];
    return [text, "GET /v1/adapters/NAME?wait=30 has it made, and says what is wrong", proof.status === "failed"];
  }
  const words = [
    `effect: adds ${percent(proof.effect)} of the base's weights, by Frobenius norm`,
    `rounding: packing changes ${percent(proof.rounding)} of what it adds`,
    `probe: log-probabilities are ${difference(proof.probe)} from a plain computation at most, the base's ${difference(proof.probe_base)}`,
    proof.doubt && `in doubt: ${proof.doubt}`,
    proof.remark,
  ];
  const short = `effect ${percent(proof.effect)} · rounding ${percent(proof.rounding)} · probe ${difference(proof.probe)}`;
  return [proof.doubt ? `${short} · in doubt` : short, words.filter(Boolean).join("\n"), proof.doubt !== null];
}

function targetText({ kind, targets }) {
  const total = targets.reduce((sum, { weight }) => sum + weight, 0);
  const share = (weight) => (kind === "split" ? `${Number(((100 * weight) / total).toFixed(2))} %` : `× ${Number(weight.toPrecision(4))}`);
  return targets.map(({ adapter, weight }) => {
    const [name, digest] = adapter.split("@");
    return `${name}${digest ? `@${digest.slice(0, DIGITS)}` : ""} ${share(weight)}`;
  });
}

export function showAliases(aliases) {
  byId("aliases").hidden = aliases.length === 0;
  const body = byId("alias-rows");
  while (body.children.length > aliases.length) body.lastChild.remove();
  while (body.children.length < aliases.length) {
    const cells = ["kind", "targets", "revision number"].map((name) => element("td", { class: name }));
    body.append(element("tr", {}, element("th", { scope: "row", class: "name" }), ...cells));
  }
  aliases.forEach((alias, i) => {
    const [name, kind, targets, revision] = body.children[i].children;
    setText(name, alias.name);
    setText(kind, alias.requires ? `${alias.kind}, requires ${alias.requires}` : alias.kind);
    setText(targets, targetText(alias).join(", "));
    setText(revision, count(alias.revision));
  });
}
