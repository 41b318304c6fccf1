/** What an administrator does to models. What is refused is told in a dialog, in the gateway's own words. */

import { Lost, Refused, post } from "./api.js";
import { question } from "./dialog.js";
import { $, say } from "./dom.js";
import { plural } from "./format.js";
import { known } from "./store.js";

/** For screen readers: what has been begun, and what has come of it. */
export function announce(text) {
  say($("said"), text);
}

/** It is said first what has to go for it. */
export async function loadModel(id) {
  await attempt(`${id} cannot be loaded`, async () => {
    const plan = await post("v1/plan", { model: id });
    if (!plan.fits) return void (await question(`${id} does not fit`, plan.reason, []));
    const sure = !plan.evict.length && !plan.blocked_by.length;
    if (!sure && !(await question(`Load ${id}?`, consequences(plan), [["yes", "Load", "first"]]))) return;
    await post("v1/models/load", { model: id });
    announce(`${id} is asked for`);
  });
}

function consequences(plan) {
  const parts = [];
  if (plan.evict.length) parts.push(`${plan.evict.join(", ")} will be unloaded for it.`);
  if (plan.blocked_by.length) parts.push(`It has to wait until ${plan.blocked_by.join(", ")} is idle.`);
  return parts.join(" ");
}

export async function ejectModel(id) {
  const running = known.pulse?.models.get(id)?.active ?? 0;
  let force = false;
  if (running) {
    const chosen = await question(`Eject ${id}?`, `It serves ${plural(running, "request")} at this moment.`, [
      ["wait", "When they are done", "first"],
      ["now", "Now, and cut them off", "danger"],
    ]);
    if (!chosen) return;
    force = chosen === "now";
  }
  await attempt(`${id} cannot be ejected`, async () => {
    await post("v1/models/eject", { model: id, force });
    announce(`${id} is unloaded`);
  });
}

export async function resetModel(id) {
  await attempt(`${id} cannot be reset`, async () => {
    await post(`v1/models/${encodeURIComponent(id)}/reset`);
    announce(`${id} is reset: the next request loads it`);
  });
}

async function attempt(title, work) {
  try {
    await work();
  } catch (error) {
    if (!(error instanceof Refused || error instanceof Lost)) throw error;
    await question(title, error.message, []);
  }
}
