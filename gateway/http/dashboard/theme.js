/** Light, dark, or as the system has it. */

import { say } from "./dom.js";

const NEXT = { system: "light", light: "dark", dark: "system" };
const NAME = { system: "Auto", light: "Light", dark: "Dark" };

export function setUpTheme(button) {
  const root = document.documentElement;
  const draw = () => {
    const now = root.dataset.theme ?? "system";
    say(button, NAME[now]);
    button.setAttribute("aria-label", `Colours: ${NAME[now]}. Change to ${NAME[NEXT[now]]}`);
  };
  button.addEventListener("click", () => {
    const next = NEXT[root.dataset.theme ?? "system"];
    if (next === "system") delete root.dataset.theme;
    else root.dataset.theme = next;
    try {
      if (next === "system") localStorage.removeItem("corral.theme");
      else localStorage.setItem("corral.theme", next);
    } catch {
      // storage is forbidden here: the choice lasts as long as the page
    }
    draw();
  });
  draw();
}
