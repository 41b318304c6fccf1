/** Elements from data. Text is only ever set as text: what comes from a model or a client cannot become markup. */

const SVG = "http://www.w3.org/2000/svg";

export const $ = (id) => document.getElementById(id);

export function h(tag, props = {}, ...children) {
  return dressed(document.createElement(tag), props, children);
}

export function svg(tag, props = {}, ...children) {
  return dressed(document.createElementNS(SVG, tag), props, children);
}

function dressed(node, props, children) {
  for (const [name, value] of Object.entries(props)) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (name === "text") node.textContent = value;
    else node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children.filter((child) => child !== null && child !== undefined));
  return node;
}

/** Screen readers and the layout are left in peace where nothing has changed. */
export function say(node, text) {
  if (node.textContent !== text) node.textContent = text;
}

export function show(node, yes) {
  if (node.hidden === yes) node.hidden = !yes;
}

/** Widths and the like by the object model: a style attribute would need 'unsafe-inline'. */
export function style(node, property, value) {
  if (node.style.getPropertyValue(property) !== value) node.style.setProperty(property, value);
}

/**
 * A list kept in step with its rows: each row's element is made once, changed in place, and moved only where the order
 * has changed, so that focus and open details survive.
 */
export class Rows {
  constructor(list, idOf, make) {
    this.list = list;
    this.idOf = idOf;
    this.make = make; // (row) → { node, update(row) }
    this.known = new Map();
  }

  set(rows) {
    const left = new Set(this.known.keys());
    let at = this.list.firstElementChild;
    for (const row of rows) {
      const id = this.idOf(row);
      left.delete(id);
      let kept = this.known.get(id);
      if (!kept) this.known.set(id, (kept = this.make(row)));
      kept.update(row);
      if (kept.node === at) at = at.nextElementSibling;
      else this.list.insertBefore(kept.node, at);
    }
    for (const id of left) {
      this.known.get(id).node.remove();
      this.known.delete(id);
    }
  }
}

/** Buttons of which one is pressed. */
export function choice(group, options, chosen, picked) {
  const buttons = options.map(([value, text]) =>
    h("button", { type: "button", "aria-pressed": String(value === chosen), text, onclick: () => pick(value) }),
  );
  function pick(value) {
    options.forEach(([one], at) => buttons[at].setAttribute("aria-pressed", String(one === value)));
    picked(value);
  }
  group.replaceChildren(...buttons);
}

const SHAPES = {
  ready: [["circle", { cx: 8, cy: 8, r: 5.5, fill: "currentColor" }]],
  off: [["circle", { cx: 8, cy: 8, r: 4.75, fill: "none", stroke: "currentColor", "stroke-width": 1.5 }]],
  busy: [
    ["circle", { cx: 8, cy: 8, r: 4.75, fill: "none", stroke: "currentColor", "stroke-width": 1.5, opacity: 0.4 }],
    ["path", { d: "M8 3.25A4.75 4.75 0 0 1 12.75 8", fill: "none", stroke: "currentColor", "stroke-width": 2.5 }],
  ],
  trouble: [
    ["path", { d: "M8 1.8 15 14H1z", fill: "currentColor" }],
    ["path", { d: "M8 6v4m0 1.6v.4", stroke: "var(--card)", "stroke-width": 1.6 }],
  ],
};

const SHAPE_OF = {
  ready: "ready", off: "off", stopped: "off", crashed: "trouble", failed: "trouble",
};

/** A state as a shape and a colour; the word beside it is for everybody. */
export function glyph(state) {
  const shape = SHAPE_OF[state] ?? "busy";
  const parts = SHAPES[shape].map(([tag, props]) => svg(tag, props));
  const about = { class: `glyph ${shape}`, viewBox: "0 0 16 16", width: 16, height: 16, "aria-hidden": "true" };
  return svg("svg", about, ...parts);
}
