/** What the page knows, and who wants to hear of it. Only live.js writes here. */

export const known = {
  signedIn: false,
  link: { state: "off" }, // off, connecting, live, lost { retryAt, reason }, paused
  me: null, // { id, admin, expires }
  server: null, // { status, started_at, … }
  models: new Map(), // id → row of the status stream
  about: new Map(), // id → { slots, n_ctx, task, aliases }
  memory: null, // /vram
  usedAt: new Map(), // id → unix seconds, as seen here: a model's use alone is no news of the status stream
  pulse: null, // the newest snapshot, see pulse.js
  history: [], // the last minute of them
  requests: [], // newest first
  usage: null,
  lostScope: false,
};

const listeners = new Map();

/** `heard` is called after each change of any of the topics. */
export function on(topics, heard) {
  for (const topic of topics) listeners.set(topic, [...(listeners.get(topic) ?? []), heard]);
}

const pending = new Set();

/** Changes that come together are drawn together, once a frame; a hidden tab draws nothing. */
export function changed(topic) {
  if (!pending.size) schedule(flush);
  pending.add(topic);
}

const schedule = (work) => (document.hidden ? setTimeout(work, 100) : requestAnimationFrame(work));

function flush() {
  const heard = new Set([...pending].flatMap((topic) => listeners.get(topic) ?? []));
  pending.clear();
  heard.forEach((one) => one());
}
