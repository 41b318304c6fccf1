/** The figures at the top: is it up, is anyone waiting, how fast is it, is anything wrong. */

import { $, glyph, h, say, show, style, svg } from "./dom.js";
import { NONE, count, milliseconds, plural, quantile, rate, span } from "./format.js";
import { known, on } from "./store.js";

const POINTS = 60;
const FEWEST_POINTS = 6;
const SERVICE = {
  ready: "Ready", starting: "Starting", loading: "Loading", draining: "Draining", stopped: "Stopped", failed: "Failed",
};

export function setUpOverview() {
  const figures = [
    figure("Service", service),
    figure("Running", running),
    figure("Waiting", waiting),
    figure("Tokens a second", tokens, (one) => one.tokensPerSecond),
    figure("First token", firstToken, (one) => one.first?.p50),
    figure("Failed requests", failures),
  ];
  $("figures").append(...figures.map((one) => one.node));
  on(["models", "pulse", "who", "requests", "link"], () => figures.forEach((one) => one.draw()));
}

function service() {
  const status = known.server?.status;
  const loaded = [...known.models.values()].filter((row) => row.status === "ready").length;
  const models = known.server ? `${loaded} of ${plural(known.models.size, "model")} loaded` : "";
  return { value: SERVICE[status] ?? NONE, note: models, state: status };
}

function running() {
  const { pulse } = known;
  return { value: count(pulse?.running), note: pulse ? `of ${plural(pulse.places, "place")}` : "" };
}

function waiting() {
  const waits = known.pulse?.waiting;
  const note = waits === undefined ? "" : waits ? "for a place or a model" : "nobody has to wait";
  return { value: count(waits), note, level: waits ? "warn" : "" };
}

function tokens() {
  const { pulse } = known;
  if (!known.me?.admin) return { hidden: true };
  const note = pulse && pulse.requestsPerSecond !== null ? `${rate(pulse.requestsPerSecond)} requests a second` : "";
  return { value: rate(pulse?.tokensPerSecond), note };
}

/** Of the last minute; of the last requests where there was none in it. */
function firstToken() {
  if (!known.me?.admin) return { hidden: true };
  const first = known.pulse?.first;
  if (first?.count) return { value: milliseconds(first.p50), note: `95 % within ${milliseconds(first.p95)}` };
  const times = known.requests.map((row) => row.ttft_ms).filter((one) => one !== null);
  if (!times.length) return { value: NONE, note: "no stream yet" };
  return { value: milliseconds(quantile(times, 0.5)), note: `median of the last ${times.length}` };
}

function failures() {
  if (!known.me?.admin) return { hidden: true };
  const { pulse, history } = known;
  if (!pulse || pulse.failed === null) return { value: NONE, note: "" };
  const recent = pulse.failed - history[0].failed;
  const seconds = Math.round(pulse.at - history[0].at);
  const since = seconds >= 55 ? "last minute" : seconds ? `last ${span(seconds)}` : "just now";
  return { value: count(recent), note: `${since} · ${count(pulse.failed)} in all`, level: recent ? "warn" : "" };
}

function figure(title, look, series) {
  const value = h("dd", { class: "value" });
  const note = h("dd", { class: "note" });
  const line = series ? sparkline(series) : null;
  const node = h("dl", { class: "figure" }, h("dt", { text: title }), value, note, line?.node);
  let state;
  return {
    node,
    draw: () => {
      const seen = look();
      show(node, !seen.hidden);
      if (seen.hidden) return;
      if (seen.state !== state || !value.firstChild) {
        state = seen.state;
        value.replaceChildren(...(state ? [glyph(state)] : []), h("span"));
      }
      say(value.lastChild, seen.value);
      say(note, seen.note);
      node.dataset.level = seen.level ?? "";
      line?.draw();
    },
  };
}

/** The last minute, from 0 to its highest value; the number beside it says the rest. */
function sparkline(series) {
  const path = svg("path", { class: "line" });
  const area = svg("path", { class: "area" });
  const about = { class: "spark", viewBox: `0 0 ${POINTS} 20`, preserveAspectRatio: "none", "aria-hidden": "true" };
  const node = svg("svg", about, area, path);
  return {
    node,
    draw: () => {
      const { history, pulse } = known;
      const points = history.map((one) => [POINTS - (pulse.at - one.at), series(one)]);
      const seen = points.filter(([, y]) => y !== null && y !== undefined);
      style(node, "visibility", seen.length < FEWEST_POINTS ? "hidden" : "visible");
      if (seen.length < FEWEST_POINTS) return;
      const most = Math.max(...seen.map(([, y]) => y), 1e-9);
      const drawn = seen.map(([x, y]) => `${x.toFixed(2)} ${(19 - (17 * y) / most).toFixed(2)}`);
      path.setAttribute("d", `M${drawn.join("L")}`);
      area.setAttribute("d", `M${seen[0][0].toFixed(2)} 20L${drawn.join("L")}L${seen.at(-1)[0].toFixed(2)} 20Z`);
    },
  };
}
