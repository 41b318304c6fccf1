/** Who has used how much: by key for administrators, by model for the others. */

import { $, choice, h, style } from "./dom.js";
import { count } from "./format.js";
import { showUsageOf } from "./live.js";
import { known, on } from "./store.js";

const MOST_ROWS = 12;

export function setUpUsage() {
  choice($("usage-days"), [[1, "Today"], [7, "7 days"], [30, "30 days"]], 1, showUsageOf);
  on(["usage", "who"], draw);
}

function draw() {
  const body = $("usage-body");
  const { usage, me } = known;
  if (!usage || !me) return;
  const by = me.admin ? "key" : "model";
  const sums = summed(usage.data, by, me.admin ? "no key" : "no model");
  if (!sums.length) {
    body.replaceChildren(h("p", { class: "empty", text: "Nothing was used in these days." }));
    return;
  }
  const most = sums[0].tokens || 1;
  const rows = sums.slice(0, MOST_ROWS).map((row) => rowOf(row, most));
  const heads = [me.admin ? "Key" : "Model", "Requests", "Tokens in", "Tokens out"];
  const head = h("tr", {}, ...heads.map((text, at) => h("th", { scope: "col", class: at ? "number" : "", text })));
  const caption = h("caption", { class: "unseen", text: me.admin ? "Usage by key" : "Your usage by model" });
  const rest = sums.length - rows.length;
  body.replaceChildren(
    h("table", {}, caption, h("thead", {}, head), h("tbody", {}, ...rows)),
    ...(rest > 0 ? [h("p", { class: "soft", text: `and ${rest} more` })] : []),
  );
}

function rowOf(row, most) {
  const bar = h("i", { class: "share", "aria-hidden": "true" });
  style(bar, "width", `${((100 * row.tokens) / most).toFixed(1)}%`);
  return h("tr", {},
    h("th", { scope: "row" }, h("span", { text: row.name }), bar),
    ...[row.requests, row.tokens_in, row.tokens_out].map((value) => h("td", { class: "number", text: count(value) })));
}

function summed(lines, by, nameless) {
  const sums = new Map();
  for (const line of lines) {
    const name = line[by] || nameless;
    const sum = sums.get(name) ?? { name, requests: 0, tokens_in: 0, tokens_out: 0, tokens: 0 };
    sum.requests += line.requests;
    sum.tokens_in += line.tokens_in;
    sum.tokens_out += line.tokens_out;
    sum.tokens += line.tokens_in + line.tokens_out;
    sums.set(name, sum);
  }
  return [...sums.values()].sort((a, b) => b.tokens - a.tokens || b.requests - a.requests);
}
