/** The last requests, each as a small waterfall: queued, loading, prefill, decode. */

import { $, Rows, choice, h, say, show, style } from "./dom.js";
import { clock, count, milliseconds, quantile, rate, roundUp } from "./format.js";
import { fetchFailed } from "./live.js";
import { known, on } from "./store.js";

export const PHASES = [
  ["queued", "queued"],
  ["loading", "loading"],
  ["prefill", "prefill"],
  ["decode", "decode"],
];

const FEW = 15;

let all = false;
let failedOnly = false;
let failed = [];

export function setUpRequests() {
  const rows = new Rows($("requests-list"), (row) => row.id, make);
  const draw = () => drawRequests(rows);
  $("phases").append(...PHASES.map(([kind, text]) => h("li", {}, h("i", { class: `swatch ${kind}` }), text)));
  choice($("requests-kind"), [[false, "All"], [true, "Failed"]], false, (value) => {
    failedOnly = value;
    draw();
    refresh(draw);
  });
  $("requests-more").addEventListener("click", () => {
    all = !all;
    draw();
  });
  on(["requests", "who"], () => (failedOnly ? refresh(draw) : draw()));
}

async function refresh(draw) {
  if (!failedOnly || !known.me?.admin) return;
  failed = await fetchFailed().catch(() => failed);
  draw();
}

function drawRequests(rows) {
  const wanted = failedOnly ? failed : known.requests;
  const shown = all ? wanted : wanted.slice(0, FEW);
  // Nine in ten fit; a single long one must not make all others invisible.
  const end = roundUp(quantile(shown.map((row) => row.duration_ms ?? 0), 0.9) ?? 1000);
  rows.set(shown.map((row) => ({ ...row, end })));
  drawAxis(end);
  show($("axis"), shown.length > 0);
  show($("requests-empty"), !shown.length);
  show($("requests-more"), wanted.length > FEW);
  say($("requests-more"), all ? "Show fewer" : `Show ${wanted.length - FEW} more`);
  $("requests-more").setAttribute("aria-expanded", String(all));
  const none = "No request yet. Ask something in the chat, or send one with the key.";
  say($("requests-empty"), failedOnly ? "No request has failed." : none);
}

function drawAxis(end) {
  const axis = $("axis");
  if (axis.dataset.end === String(end)) return;
  axis.dataset.end = end;
  axis.replaceChildren(...["0", milliseconds(end / 2), milliseconds(end)].map((text) => h("span", { text })));
}

/** Milliseconds of each phase. A request that had no first token has spent the rest before it. */
export function phasesOf(row) {
  const all = row.duration_ms ?? 0;
  const queued = Math.min(row.queue_ms ?? 0, all);
  const loading = Math.min(row.load_ms ?? 0, all - queued);
  const first = row.ttft_ms === null ? all : Math.min(Math.max(row.ttft_ms, queued + loading), all);
  return { queued, loading, prefill: first - queued - loading, decode: all - first };
}

function make(row) {
  const phases = phasesOf(row);
  const ok = row.status < 400;
  const parts = PHASES.map(([kind]) => h("i", { class: kind }));
  const track = h("span", { class: "track" }, ...parts);
  const kind = ok ? "ok" : row.status === 499 ? "left" : "bad"; // 499: the client left
  const status = h("span", { class: `status ${kind}`, text: String(row.status) });
  const who = h("span", { class: "who", text: row.key_id || "no key" });
  const summary = h("summary", {},
    h("time", { text: clock(row.ts) }),
    status,
    h("span", { class: "what" }, h("b", { text: row.model || "no model" }), " ", who),
    h("span", { class: "lane" }, track, row.error ? h("em", { text: row.error }) : null),
    h("span", { class: "took", text: milliseconds(row.duration_ms) }),
    h("span", { class: "tokens", text: row.tokens_out ? `${count(row.tokens_out)} tok` : "" }));
  const node = h("li", {});
  const details = h("details", {}, summary);
  details.addEventListener("toggle", () => {
    if (details.open && details.childElementCount === 1) details.append(more(row, phases));
  });
  node.append(details);
  return {
    node,
    update: ({ end }) => {
      PHASES.forEach(([kind], at) => style(parts[at], "width", `${((100 * phases[kind]) / end).toFixed(2)}%`));
      track.classList.toggle("long", (row.duration_ms ?? 0) > end);
    },
  };
}

function more(row, phases) {
  const decoding = phases.decode > 0 && row.tokens_out > 1 ? ((row.tokens_out - 1) * 1000) / phases.decode : null;
  const facts = [
    ["Route", `${row.route}${row.stream ? ", streamed" : ""}`],
    ["Phases", PHASES.map(([kind, text]) => `${text} ${milliseconds(phases[kind])}`).join(" · ")],
    ["Tokens in", `${count(row.tokens_in)}, ${count(row.tokens_cached)} of them cached`],
    ["Tokens out", count(row.tokens_out)],
    ["Speed", decoding ? `${rate(decoding)} tokens a second` : null],
    ["Error", row.error],
    ["Request", row.request_id],
    ["Trace", row.trace_id],
  ].filter(([, value]) => value);
  const pairs = facts.flatMap(([name, value]) => [h("dt", { text: name }), h("dd", { text: value })]);
  return h("dl", { class: "facts" }, ...pairs);
}
