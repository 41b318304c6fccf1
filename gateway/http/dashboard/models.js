/** The models: what each does, who uses it, and what an administrator can do about it. */

import { ejectModel, loadModel, resetModel } from "./commands.js";
import { $, Rows, glyph, h, say, show, style } from "./dom.js";
import { ago, megabytes, rate } from "./format.js";
import { known, on } from "./store.js";

const STATE = {
  off: "Off", downloading: "Downloading", starting: "Starting", loading: "Loading", ready: "Ready",
  stopping: "Stopping", crashed: "Crashed", failed: "Failed",
};
const LOADED = ["failed", "crashed", "ready", "loading", "starting", "downloading", "stopping", "off"];
const COMING = ["downloading", "starting", "loading"];
const MOST_PIPS = 12;
const FILTER_FROM = 9;
const FEW = 12;

let order = [];
let all = false;

export function setUpModels() {
  const rows = new Rows($("models-list"), (row) => row.id, make);
  const draw = () => drawModels(rows);
  on(["models", "pulse", "about", "memory", "who"], draw);
  $("models-filter").addEventListener("input", draw);
  $("models-more").addEventListener("click", () => {
    all = !all;
    draw();
  });
  setInterval(() => document.hidden || draw(), 5000); // "used 2 min ago"
}

function drawModels(rows) {
  const { models, server } = known;
  sortOnce(models);
  const wanted = $("models-filter").value.trim().toLowerCase();
  const found = order.filter((id) => id.toLowerCase().includes(wanted));
  const shown = all || wanted ? found : found.filter((id, at) => at < FEW || models.get(id).status !== "off");
  rows.set(shown.map(rowOf));
  show($("models-more"), !wanted && found.length > FEW);
  say($("models-more"), all ? "Show fewer" : `Show ${found.length - shown.length} more`);
  $("models-more").setAttribute("aria-expanded", String(all));
  show($("models-filter"), models.size >= FILTER_FROM);
  const loaded = [...models.values()].filter((row) => row.status === "ready").length;
  say($("models-count"), server ? `${loaded} of ${models.size} loaded` : "");
  show($("models-empty"), Boolean(server) && !shown.length);
  const none = "There is no model yet. Put a GGUF file into the models folder, or name one in the models file.";
  say($("models-empty"), wanted ? `No model is called like “${wanted}”.` : none);
}

/** Loaded ones first. The order stays as it is while models come and go: nothing jumps away under the pointer. */
function sortOnce(models) {
  if (order.length === models.size && order.every((id) => models.has(id))) return;
  const rank = (id) => LOADED.indexOf(models.get(id).status);
  order = [...models.keys()].sort((a, b) => rank(a) - rank(b) || a.localeCompare(b, "en", { numeric: true }));
}

function rowOf(id) {
  const memory = known.memory?.models.find((row) => row.id === id);
  return { id, ...known.models.get(id), about: known.about.get(id), now: known.pulse?.models.get(id), memory };
}

function make({ id }) {
  const mark = h("span", { class: "mark" });
  const state = h("span", { class: "state" });
  const detail = h("span", { class: "detail" });
  const places = h("p", { class: "places" });
  const size = h("p", { class: "size" });
  const button = h("button", { type: "button" });
  const bar = h("progress", { max: 1, "aria-label": `Load progress of ${id}` });
  const about = h("span", { class: "about" });
  const node = h("li", { class: "model" },
    mark,
    h("div", { class: "name" }, h("h3", { text: id }), about, h("p", {}, state, detail)),
    places, size, h("div", { class: "act" }, button), bar);
  let seen;
  let command = () => {};
  button.addEventListener("click", () => command());
  return {
    node,
    update: (row) => {
      if (row.status !== seen) {
        seen = row.status;
        mark.replaceChildren(glyph(seen));
        node.dataset.state = seen;
        [command] = drawButton(button, row);
      }
      show(button, Boolean(known.me?.admin) && button.textContent !== "");
      say(about, aboutOf(row));
      say(state, STATE[row.status] ?? row.status);
      say(detail, detailOf(row));
      drawPlaces(places, row);
      say(size, sizeOf(row));
      drawProgress(bar, row);
    },
  };
}

function drawButton(button, { id, status }) {
  const [label, command] = commandOf(id, status);
  say(button, label);
  button.setAttribute("aria-label", `${label} ${id}`);
  button.className = label === "Load" ? "second" : "";
  return [command];
}

function commandOf(id, status) {
  if (status === "off") return ["Load", () => loadModel(id)];
  if (status === "failed") return ["Reset", () => resetModel(id)];
  if (status === "ready" || status === "crashed" || COMING.includes(status)) return ["Eject", () => ejectModel(id)];
  return ["", () => {}];
}

function aboutOf({ about }) {
  if (!about) return "";
  const parts = [...about.aliases];
  if (about.task && about.task !== "generate") parts.push(about.task === "embed" ? "embeddings" : about.task);
  if (about.n_ctx) parts.push(`${contextOf(about.n_ctx)} context`);
  return parts.join(" · ");
}

function contextOf(tokens) {
  return tokens < 1024 ? String(tokens) : `${Math.round(tokens / 102.4) / 10}k`;
}

function detailOf(row) {
  if (row.error_message) return ` · ${row.error_message}`;
  if (COMING.includes(row.status)) {
    const progress = row.load_progress === null ? "" : ` ${Math.round(row.load_progress * 100)} %`;
    return `${progress}${row.detail ? ` · ${row.detail}` : ""}`;
  }
  if (row.now?.active && !row.now.tokensPerSecond) return " · in use";
  if (row.status === "ready" && row.now?.tokensPerSecond) return ` · ${rate(row.now.tokensPerSecond)} tokens a second`;
  if (row.detail) return ` · ${row.detail}`;
  const told = row.last_used_at ? Date.parse(row.last_used_at) / 1000 : 0;
  const used = Math.max(told, row.memory?.last_used_unix ?? 0, known.usedAt.get(row.id) ?? 0);
  return used ? ` · used ${ago(Date.now() / 1000 - used)}` : "";
}

/** One small box a place: filled while it is taken. */
function drawPlaces(node, { now, status }) {
  const busy = now && (status === "ready" || now.active || now.waiting);
  const waits = busy && now.waiting ? `${now.waiting} waiting` : "";
  const key = busy ? `${now.active} ${now.places} ${now.waiting}` : "";
  if (node.dataset.key === key) return;
  node.dataset.key = key;
  node.replaceChildren();
  if (!busy) return;
  if (now.places <= MOST_PIPS) {
    const pips = Array.from({ length: now.places }, (_, at) => h("i", { class: at < now.active ? "taken" : "" }));
    node.append(h("span", { class: "pips", "aria-hidden": "true" }, ...pips));
  }
  const unit = h("span", { class: "unseen", text: now.places === 1 ? " place" : " places" });
  node.append(h("span", { text: `${now.active} of ${now.places}` }, unit));
  if (waits) node.append(h("b", { class: "waits", text: waits }));
}

function sizeOf({ memory, vram_used_mb: used }) {
  const size = memory?.measured_mb ?? used ?? memory?.predicted_mb;
  return size ? megabytes(size) : "";
}

function drawProgress(bar, { status, load_progress: progress }) {
  style(bar, "visibility", COMING.includes(status) ? "visible" : "hidden");
  if (progress === null || progress === undefined) bar.removeAttribute("value");
  else bar.value = progress;
}
