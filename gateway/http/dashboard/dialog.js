/** One question at a time. */

import { $, h, say } from "./dom.js";

/** The value of the choice that was made; null where there was none. `choices`: [value, text, class]. */
export function question(title, text, choices) {
  const dialog = $("dialog");
  say($("dialog-title"), title);
  say($("dialog-text"), text);
  return new Promise((resolve) => {
    let chosen = null;
    const button = ([value, label, kind]) =>
      h("button", { type: "button", class: kind, text: label, onclick: () => { chosen = value; dialog.close(); } });
    const last = [null, choices.length ? "Cancel" : "Close", "quiet"];
    $("dialog-buttons").replaceChildren(...[...choices, last].map(button));
    dialog.addEventListener("close", () => resolve(chosen), { once: true });
    dialog.showModal();
  });
}
