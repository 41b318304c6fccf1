/** The API reference: openapi.json, readable. Text is only ever set as text. */

const root = document.documentElement.dataset.root;
const METHODS = ["get", "post", "put", "delete"];
const byId = (id) => document.getElementById(id);

function h(tag, props = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(props)) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children.flat().filter((child) => child !== null && child !== undefined));
  return node;
}

/** Paragraphs, lists and `code` of a description. */
function prose(text) {
  return (text ?? "").split(/\n\s*\n/).filter(Boolean).map((block) => {
    const lines = block.split("\n");
    if (lines.every((line) => line.startsWith("- "))) return h("ul", {}, lines.map((line) => h("li", {}, inline(line.slice(2)))));
    return h("p", {}, inline(block));
  });
}

function inline(text) {
  return text.split(/(`[^`]+`)/).map((part) => (part.startsWith("`") ? h("code", {}, part.slice(1, -1)) : part));
}

// --- schemas

let spec;

function resolved(node) {
  if (!node?.$ref) return node ?? {};
  return node.$ref.slice(2).split("/").reduce((at, name) => at[name], spec);
}

const nameOf = (node) => (node?.$ref ? node.$ref.split("/").pop() : null);

function kind(node) {
  if (node.$ref) return nameOf(node);
  if (node.const !== undefined) return JSON.stringify(node.const);
  if (node.enum) return node.enum.map((one) => JSON.stringify(one)).join(" | ");
  const either = node.anyOf ?? node.oneOf;
  if (either) return either.map(kind).join(" or ");
  if (node.allOf) return node.allOf.map((one) => nameOf(one)).filter(Boolean).join(", with ");
  if (node.type === "array") return `list of ${kind(node.items ?? {})}`;
  if (node.additionalProperties?.$ref || node.additionalProperties?.type) return `object, name to ${kind(node.additionalProperties)}`;
  const types = [node.type ?? "anything"].flat();
  return types.join(" or ") + (node.format ? ` (${node.format})` : "");
}

function bounds(node) {
  const said = [];
  if (node.minimum !== undefined && node.maximum !== undefined) said.push(`${node.minimum} to ${node.maximum}`);
  else if (node.minimum !== undefined) said.push(`${node.minimum} or more`);
  else if (node.maximum !== undefined) said.push(`${node.maximum} at most`);
  if (node.exclusiveMinimum !== undefined) said.push(`more than ${node.exclusiveMinimum}`);
  if (node.maxLength !== undefined) said.push(`${node.maxLength} characters at most`);
  if (node.maxItems !== undefined) said.push(`${node.maxItems} at most`);
  if (node.default !== undefined) said.push(`default ${JSON.stringify(node.default)}`);
  return said.join(", ");
}

/** What lies inside: objects' fields, lists' items, the sides of a choice. */
function insides(node) {
  const real = resolved(node);
  if (real.properties) return [real];
  if (real.items) return insides(real.items);
  const several = real.anyOf ?? real.oneOf ?? real.allOf;
  if (several) return several.flatMap(insides);
  if (typeof real.additionalProperties === "object") return insides(real.additionalProperties);
  return [];
}

function fields(schema, above = []) {
  const lists = insides(schema).map((object) =>
    h("ul", { class: "fields" }, Object.entries(object.properties).map(([name, one]) => {
      const real = resolved(one);
      const label = [
        h("code", {}, name), " ", h("span", { class: "kind" }, kind(one.$ref ? (insides(one).length ? one : real) : one)),
        (object.required ?? []).includes(name) ? h("span", { class: "must" }, " required") : null,
      ];
      const about = [one.description ?? real.description, bounds(real)].filter(Boolean).join(" · ");
      const deeper = insides(one).length > 0 && !above.includes(real) && above.length < 6;
      const body = deeper ? later(label, () => fields(one, [...above, real])) : h("span", {}, label);
      return h("li", {}, body, about ? h("p", { class: "soft" }, inline(about)) : null);
    })),
  );
  return lists.length ? lists : [h("p", { class: "kind" }, kind(schema))];
}

/** Details that are made when they are first opened. */
function later(label, make) {
  const node = h("details", {}, h("summary", {}, label));
  node.addEventListener("toggle", () => { if (node.open && node.children.length === 1) node.append(...make()); });
  return node;
}

// --- operations

function scopeOf(operation) {
  const scopes = (operation.security ?? []).flatMap((one) => Object.values(one).flat());
  if (!scopes.length) return "no key";
  const open = operation.security.some((one) => !Object.keys(one).length);
  return `scope ${scopes[0]}${open ? ", if METRICS_AUTH_ENABLED" : ""}`;
}

function exampleOf(operation) {
  const content = Object.values(operation.requestBody?.content ?? {})[0];
  return Object.values(content?.examples ?? {})[0]?.value;
}

function curl(method, path, operation) {
  const words = ["curl"];
  if (method !== "get" && method !== "post") words.push("-X", method.toUpperCase());
  if (method === "post" && exampleOf(operation) === undefined) words.push("-X POST");
  words.push(`${location.origin}${path.replaceAll("{", "").replaceAll("}", "")}`);
  const lines = [words.join(" ")];
  if (operation.security?.length) lines.push('-H "Authorization: Bearer $KEY"');
  if (exampleOf(operation) !== undefined) {
    lines.push("-H 'Content-Type: application/json'", `-d '${JSON.stringify(exampleOf(operation)).replaceAll("'", "'\\''")}'`);
  }
  return lines.join(" \\\n    ");
}

function parametersOf(operation) {
  const rows = (operation.parameters ?? []).map(resolved).map((one) =>
    h("tr", {},
      h("td", {}, h("code", {}, one.name), one.required ? h("span", { class: "must" }, " required") : null),
      h("td", { class: "kind" }, one.in),
      h("td", {}, h("span", { class: "kind" }, [kind(one.schema), bounds(one.schema)].filter(Boolean).join(", ")),
        one.description ? h("div", {}, inline(one.description)) : null),
    ),
  );
  return rows.length ? [h("h4", {}, "Parameters and headers"), h("table", {}, h("tbody", {}, rows))] : [];
}

function bodyOf(operation) {
  return Object.entries(operation.requestBody?.content ?? {}).flatMap(([type, content]) => [
    h("h4", {}, "Body ", h("span", { class: "kind" }, type)),
    ...(exampleOf(operation) !== undefined ? [h("pre", { tabindex: 0 }, JSON.stringify(exampleOf(operation), null, 2))] : []),
    ...fields(content.schema),
  ]);
}

function answerOf(status, given) {
  const answer = resolved(given);
  const label = [h("span", { class: `status ${status < 400 ? "good" : "bad"}` }, status), " ",
    ...(answer["x-codes"] ?? []).flatMap((code) => [h("code", {}, code), " "]), ...(answer["x-codes"] ? [] : inline(answer.description))];
  return later(label, () => {
    const parts = answer["x-codes"] ? prose(answer.description) : [];
    const headers = Object.keys(answer.headers ?? {});
    if (headers.length) parts.push(h("p", { class: "soft" }, "Headers: ", headers.flatMap((name) => [h("code", {}, name), " "])));
    for (const [type, content] of Object.entries(answer.content ?? {})) {
      parts.push(h("p", { class: "kind" }, type));
      const example = content.schema && resolved(content.schema).example;
      if (example) parts.push(h("pre", { tabindex: 0 }, JSON.stringify(example, null, 2)));
      if (type === "text/event-stream") parts.push(...eventsOf(content.schema.anyOf));
      else parts.push(...fields(content.schema ?? {}));
    }
    return parts.length ? parts : [h("p", { class: "soft" }, "No body.")];
  });
}

function eventsOf(events) {
  return events.map((event) => {
    const { event: name, data } = event.properties;
    const label = [h("code", {}, event.title), " ", h("span", { class: "soft" }, inline(event.description)),
      name.const === event.title ? null : h("span", { class: "kind" }, " sent without a name")];
    return h("div", { class: "answer" }, later(label, () => (data.contentSchema ? fields(data.contentSchema) : [h("p", {}, h("code", {}, data.const))])));
  });
}

function operationOf(method, path, operation, names) {
  const node = h("details", { class: "operation", id: operation.operationId },
    h("summary", {}, h("h3", {},
      h("span", { class: `method ${method}` }, method.toUpperCase()), h("span", { class: "path" }, path),
      h("span", { class: "summary" }, inline(operation.summary)), h("span", { class: "scope" }, scopeOf(operation)))));
  node.addEventListener("toggle", () => {
    if (!node.open || node.children.length > 1) return;
    node.append(h("div", { class: "inside" },
      names.length ? h("p", { class: "soft" }, "Also ", names.flatMap((name) => [h("code", {}, name), " "])) : null,
      prose(operation.description), h("pre", { tabindex: 0 }, curl(method, path, operation)),
      parametersOf(operation), bodyOf(operation), h("h4", {}, "Answers"),
      Object.entries(operation.responses).map(([status, answer]) => h("div", { class: "answer" }, answerOf(status, answer)))));
  });
  return node;
}

// --- the page

/** What a search finds an operation by: names, texts, fields and codes. */
function haystack(path, operation, names) {
  const seen = new Set();
  const words = [path, ...names, operation.summary, operation.description ?? "", scopeOf(operation)];
  const walk = (node) => {
    if (!node || typeof node !== "object" || seen.has(node)) return;
    seen.add(node);
    if (node.$ref) return walk(resolved(node));
    for (const [key, value] of Object.entries(node)) {
      words.push(key);
      if (typeof value === "string") words.push(value);
      else walk(value);
    }
  };
  walk([operation.parameters, operation.requestBody, operation.responses]);
  return words.join(" ").toLowerCase();
}

function operations() {
  const all = Object.entries(spec.paths).flatMap(([path, item]) =>
    METHODS.filter((method) => item[method]).map((method) => ({ path, method, operation: item[method], names: [] })));
  const first = new Map(all.map((one) => [`${one.method.toUpperCase()} ${one.path}`, one]));
  return all.filter((one) => {
    const of = one.operation["x-alias-of"];
    if (of) first.get(of).names.push(one.path);
    return !of;
  });
}

function draw() {
  const found = operations();
  const sections = [];
  const links = [];
  for (const tag of spec.tags) {
    const own = found.filter((one) => one.operation.tags[0] === tag.name);
    const list = h("ul");
    for (const one of own) {
      one.node = operationOf(one.method, one.path, one.operation, one.names);
      one.link = h("li", {}, h("a", { href: `#${one.operation.operationId}`, onclick: () => open(one.node) },
        h("span", { class: `method ${one.method}` }, one.method.toUpperCase()), " ", one.path));
      one.words = haystack(one.path, one.operation, one.names);
      list.append(one.link);
    }
    const section = h("section", {}, h("h2", {}, tag.name), h("p", { class: "lead" }, inline(tag.description ?? "")), own.map((one) => one.node));
    const group = h("div", {}, h("h2", {}, tag.name), list);
    sections.push({ own, section, group });
  }
  byId("version").textContent = spec.info.version;
  const main = byId("main");
  const about = h("section", {}, prose(spec.info.description),
    h("p", {}, "The same for programs: ", h("a", { href: `${root}openapi.json` }, "openapi.json"), "."));
  const none = h("p", { id: "none", hidden: true }, "Nothing here has all of these words.");
  main.replaceChildren(byId("news"), about, none, ...sections.map((one) => one.section));
  byId("contents").replaceChildren(...sections.map((one) => one.group));
  byId("news").classList.add("hidden");
  const search = () => {
    const words = byId("search").value.toLowerCase().split(/\s+/).filter(Boolean);
    let shown = 0;
    for (const { own, section, group } of sections) {
      let some = 0;
      for (const one of own) {
        const hit = words.every((word) => one.words.includes(word));
        one.node.hidden = one.link.hidden = !hit;
        some += hit;
      }
      section.hidden = group.hidden = !some;
      shown += some;
    }
    about.hidden = words.length > 0;
    none.hidden = shown > 0;
    byId("news").textContent = words.length ? `${shown} routes` : "";
  };
  byId("search").addEventListener("input", search);
  byId("news").textContent = "";
  if (location.hash) open(byId(decodeURIComponent(location.hash.slice(1))));
}

function open(node) {
  if (!node) return;
  node.open = true;
  requestAnimationFrame(() => node.scrollIntoView({ block: "start" }));
}

function theme() {
  const button = byId("theme");
  const dark = () => {
    const set = document.documentElement.dataset.theme;
    return set ? set === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  };
  const label = () => { button.textContent = dark() ? "Light" : "Dark"; };
  button.addEventListener("click", () => {
    document.documentElement.dataset.theme = dark() ? "light" : "dark";
    try { localStorage.setItem("corral.theme", document.documentElement.dataset.theme); } catch { /* then it is for this page */ }
    label();
  });
  label();
}

theme();
addEventListener("hashchange", () => open(byId(decodeURIComponent(location.hash.slice(1)))));
addEventListener("keydown", (event) => {
  if (event.key === "/" && document.activeElement !== byId("search")) { event.preventDefault(); byId("search").focus(); }
});
try {
  const answer = await fetch(`${root}openapi.json`);
  if (!answer.ok) throw new Error(`status ${answer.status}`);
  spec = await answer.json();
  draw();
} catch (error) {
  byId("news").textContent = `The reference could not be loaded: ${error.message}`;
}
