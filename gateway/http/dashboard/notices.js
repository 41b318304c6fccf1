/** What a person should know first: nothing here means that all is well. */

import { $, Rows, glyph, h, say } from "./dom.js";
import { resetModel } from "./commands.js";
import { tryNow } from "./live.js";
import { known, on } from "./store.js";

export function setUpNotices() {
  const rows = new Rows($("notices"), (notice) => notice.id, make);
  on(["link", "models", "who", "pulse"], () => rows.set(notices()));
  setInterval(() => known.link.state === "lost" && rows.set(notices()), 1000);
}

function notices() {
  if (!known.signedIn) return [];
  return [...ofTheLink(), ...ofTheService(), ...ofModels()];
}

function ofTheLink() {
  const found = [];
  if (known.link.state === "lost") {
    const seconds = Math.max(0, Math.ceil((known.link.retryAt - Date.now()) / 1000));
    const when = seconds ? ` Next try in ${seconds} s.` : " Trying again …";
    const text = `${known.link.reason} What you see is how it was.${when}`;
    found.push({ id: "link", level: "warn", title: "Not connected", text, action: ["Try now", tryNow] });
  }
  if (known.lostScope) {
    const text = "Requests, usage of other keys and the buttons of models are not shown any more.";
    found.push({ id: "scope", level: "warn", title: "This key has lost the scope admin", text });
  }
  return found;
}

const OF_STATE = {
  starting: ["info", "The service is starting", ""],
  loading: ["info", "The service is getting ready", "Requests that come now wait until a model is loaded."],
  draining: ["warn", "The service is shutting down", "Running requests are finished, new ones are refused."],
  stopped: ["warn", "The service has stopped", ""],
  failed: ["bad", "The service has failed", "None of the models that must be there could be loaded."],
};

function ofTheService() {
  const told = OF_STATE[known.server?.status];
  return told ? [{ id: "service", level: told[0], title: told[1], text: told[2] }] : [];
}

function ofModels() {
  return [...known.models]
    .filter(([, row]) => row.status === "failed" || row.status === "crashed")
    .map(([id, row]) => ({
      id: `model ${id}`,
      level: row.status === "failed" ? "bad" : "warn",
      title: row.status === "failed" ? `${id} has failed` : `${id} has crashed and is started again`,
      text: row.error_message ?? "",
      action: known.me?.admin && row.status === "failed" ? ["Reset", () => resetModel(id)] : null,
    }));
}

function make(first) {
  const title = h("b");
  const text = h("span");
  const button = first.action ? h("button", { type: "button", text: first.action[0] }) : null;
  const shape = first.level === "info" ? "loading" : "failed";
  const node = h("div", { class: `notice ${first.level}` }, glyph(shape), h("p", {}, title, " ", text), button);
  if (button) button.addEventListener("click", () => first.action[1]());
  return {
    node,
    update: (notice) => {
      say(title, `${notice.title}.`);
      say(text, notice.text);
      node.className = `notice ${notice.level}`;
    },
  };
}
