/** Who has how much of the memory that models may use: as foretold, and as measured. */

import { $, Rows, h, say, style } from "./dom.js";
import { megabytes } from "./format.js";
import { known, on } from "./store.js";

export function setUpMemory() {
  const text = h("p", { class: "memory-text" });
  const bar = h("ul", { class: "memory-bar", "aria-label": "Memory by model" });
  const devices = h("p", { class: "soft memory-devices" });
  const head = h("div", { class: "memory-head" }, h("h3", { id: "memory-title", text: "Memory" }), text, legend());
  $("memory").append(head, bar, devices);
  const parts = new Rows(bar, (row) => row.id, makePart);
  on(["memory", "who"], () => draw(text, parts, devices));
}

function legend() {
  const entry = (kind, label) => h("li", {}, h("i", { class: `swatch ${kind}` }), label);
  const entries = [entry("measured", "measured"), entry("foretold", "predicted"), entry("free", "free")];
  return h("ul", { class: "legend" }, ...entries);
}

function draw(text, parts, devices) {
  const { memory } = known;
  if (!memory) return;
  const held = memory.models.filter((row) => booked(row) > 0);
  const all = Math.max(memory.budget_mb, memory.used_est_mb, 1);
  const measured = held.reduce((sum, row) => sum + (row.measured_mb ?? 0), 0);
  const percent = Math.round((100 * memory.used_est_mb) / all);
  const share = percent || !memory.used_est_mb ? percent : "less than 1";
  const told = [`${megabytes(memory.used_est_mb)} of ${megabytes(memory.budget_mb)} booked, ${share} %`];
  if (measured && Math.abs(measured - memory.used_est_mb) > 0.05 * all) told.push(`${megabytes(measured)} measured`);
  if (!memory.can_load_more) told.push("full: the next model makes another one go");
  say(text, told.join(" · "));
  parts.set(held.map((row) => ({ ...row, all })));
  const margin = memory.margin_mb ? [`${megabytes(memory.margin_mb)} are kept free`] : [];
  const inUse = ({ used_mb: used, total_mb: total }) => `${megabytes(used)} of ${megabytes(total)} in use`;
  const named = memory.devices.map((one) => `${one.name} ${inUse(one)}`);
  say(devices, [...named, ...margin].join(" · "));
}

const booked = (row) => Math.max(row.predicted_mb ?? 0, row.measured_mb ?? 0);

function makePart() {
  const fill = h("i", { class: "measured" });
  const name = h("span");
  const node = h("li", {}, fill, name);
  return {
    node,
    update: (row) => {
      const size = booked(row);
      style(node, "flex-basis", `${((100 * size) / row.all).toFixed(2)}%`);
      style(fill, "width", `${((100 * (row.measured_mb ?? 0)) / size).toFixed(1)}%`);
      const measured = row.measured_mb === null ? "not measured yet" : `${megabytes(row.measured_mb)} measured`;
      const told = `${row.id}: ${megabytes(row.predicted_mb)} predicted, ${measured}`;
      say(name, row.id);
      if (node.title !== told) {
        node.title = told;
        node.setAttribute("aria-label", told);
      }
    },
  };
}
