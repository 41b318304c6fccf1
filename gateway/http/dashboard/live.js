/** What keeps the page up to date: two streams, few polls, and nothing at all while nobody looks. */

import { Lost, Refused, events, json, useKey } from "./api.js";
import { fromQueues, fromSnapshot } from "./pulse.js";
import { changed, known } from "./store.js";

const SILENCE = 40_000; // the status stream has a heartbeat every 15 s
const DELAYS = [0.5, 1, 2, 4, 8, 15]; // seconds between tries
const LINGER = 2_000; // a tab that was hidden only for a moment keeps its streams
const SHOWN_REQUESTS = 50;
const HISTORY = 60;

let session = null; // an AbortController: all that runs ends with it
let signedOut = () => {};
let wake = () => {};

/** `left(reason)` is called when the key is refused. */
export function whenSignedOut(left) {
  signedOut = left;
}

/** Raises Refused, Lost. */
export async function signIn(secret, how) {
  useKey(secret, how);
  try {
    await checkMe();
  } catch (error) {
    if (isFinal(error)) useKey(null);
    throw error;
  }
  known.signedIn = true;
  known.lostScope = false;
  start();
}

export function signOut(reason = "") {
  stop("off");
  useKey(null);
  Object.assign(known, { signedIn: false, me: null, server: null, memory: null, usage: null });
  Object.assign(known, { pulse: null, history: [], requests: [] });
  for (const map of [known.models, known.about, known.usedAt]) map.clear();
  signedOut(reason);
  changed("who");
}

export function tryNow() {
  wake();
}

document.addEventListener("visibilitychange", () => {
  if (!known.signedIn) return;
  if (!document.hidden) start();
  else setTimeout(() => document.hidden && known.signedIn && stop("paused"), LINGER);
});
window.addEventListener("online", () => wake());

function start() {
  if (session) return;
  session = new AbortController();
  const ends = session.signal;
  link({ state: "connecting" });
  run(followStatus(ends));
  run(every(60, ends, checkMe, { atOnce: false, share: 3 }));
  run(every(60, ends, fetchMemory, { share: 3 })); // and when a model has changed
  run(every(60, ends, fetchUsage, { share: 3 }));
  if (known.me.admin) {
    run(followPulse(ends));
    run(every(3, ends, fetchRequests, { share: 0.5 }));
  } else {
    run(every(4, ends, fetchQueues));
  }
}

function stop(state) {
  session?.abort();
  session = null;
  lastId = null;
  link({ state });
}

function link(now) {
  known.link = now;
  changed("link");
}

/** Only what ends a session for good comes out of its parts. */
async function run(part) {
  const mine = session;
  try {
    await part;
  } catch (error) {
    if (mine !== session || error.name === "AbortError") return;
    if (!(error instanceof Refused)) throw error;
    if (error.status === 401) signOut(error.message);
    else await checkMe().catch((why) => isFinal(why) && signOut(why.message));
  }
}

/** Asking again with this key is no use. */
export function isFinal(error) {
  return error instanceof Refused && (error.status === 401 || error.status === 403);
}

/** Who the key belongs to and what it may; a key that has lost or won a scope gets another page. */
async function checkMe(signal) {
  const told = await json("status", { signal });
  const { id, scopes, expires_unix: expires } = told.key;
  const admin = scopes.includes("admin");
  const before = known.me;
  known.me = { id, admin, expires };
  if (before && before.admin !== admin) {
    known.lostScope = !admin;
    if (!admin) Object.assign(known, { requests: [], usage: null, pulse: null, history: [] });
    stop("connecting");
    start();
  }
  changed("who");
}

// --- streams

async function followStatus(ends) {
  await follow("v1/models/status/stream", ends, {
    opened: () => {
      link({ state: "live" });
      lastId = null; // what came before may have been another gateway
    },
    heard: heardStatus,
    lost: (reason, retryAt) => link({ state: "lost", reason, retryAt }),
    silence: SILENCE,
  });
}

function heardStatus({ name, data }) {
  if (name === "ping") return;
  const told = JSON.parse(data);
  if (name === "full_status") {
    known.server = told.server;
    known.models = new Map(Object.entries(told.models));
    lookSoon();
  } else if (name === "model_update") {
    const { id, ...row } = told;
    const before = known.models.get(id);
    known.models.set(id, row);
    if (row.status !== before?.status || row.vram_used_mb !== before?.vram_used_mb) lookSoon();
  } else if (name === "server_update") {
    known.server = told;
  }
  changed("models");
}

async function followPulse(ends) {
  const there = await follow("metrics/stream", ends, {
    heard: ({ name, data }) => {
      if (name === "snapshot") pulse(fromSnapshot(JSON.parse(data)));
    },
    silence: 15_000,
  });
  if (!there) await every(4, ends, fetchQueues);
}

function pulse(now) {
  known.pulse = now;
  for (const [id, { active }] of now.models) if (active) known.usedAt.set(id, now.at);
  known.history = [...known.history, now].filter((one) => one.at > now.at - HISTORY);
  changed("pulse");
}

/**
 * Reads a stream for ever; false where there is none. Raises Refused where the key may not, AbortError at the session's
 * end.
 */
async function follow(path, ends, { opened = () => {}, heard, lost = () => {}, silence }) {
  for (let failures = 0; ; failures += 1) {
    let reason = "The gateway has closed the connection.";
    try {
      for await (const event of events(path, { signal: ends, silence })) {
        if (failures >= 0) opened();
        failures = -1; // alive: the next loss is the first again
        heard(event);
      }
    } catch (error) {
      if (error instanceof Refused) {
        if (isFinal(error)) throw error;
        if (error.status === 404) return false;
      } else if (!(error instanceof Lost)) throw error;
      reason = error.message;
    }
    ends.throwIfAborted();
    const delay = DELAYS[Math.min(Math.max(failures, 0), DELAYS.length - 1)] * (0.8 + 0.4 * Math.random()) * 1000;
    lost(reason, Date.now() + delay);
    await pause(delay, ends, true);
  }
}

// --- polls

/** Again each `seconds`; more seldom where many watch: of all of them together one asks each `share` seconds. */
async function every(seconds, ends, work, { atOnce = true, share = 0 } = {}) {
  if (!atOnce) await pause(seconds * 1000, ends);
  for (;;) {
    try {
      if (known.link.state !== "lost") await work(ends);
    } catch (error) {
      if (isFinal(error) || error.name === "AbortError") throw error;
      // else the next time; the status stream tells when the gateway is gone
    }
    const due = Math.max(seconds, share * (known.pulse?.watchers ?? 1));
    await pause(due * (900 + 200 * Math.random()), ends);
  }
}

async function fetchMemory(ends) {
  known.memory = await json("vram", { signal: ends });
  changed("memory");
}

let looking = null;

/** What goes with a model's new state: its memory, its places, its context. */
function lookSoon() {
  const ends = session?.signal;
  looking ??= setTimeout(() => {
    looking = null;
    if (!ends || ends.aborted) return;
    fetchMemory(ends).catch(() => {}); // the next time, then
    fetchAbout(ends).catch(() => {});
  }, 200 + 600 * Math.random()); // or all that are open would ask in the same moment
}

async function fetchAbout(ends) {
  const { data } = await json("v1/models", { signal: ends });
  known.about = new Map(data.map((row) => [row.id, row.meta]));
  changed("about");
}

async function fetchQueues(ends) {
  pulse(fromQueues(await json("v1/queue/stats", { signal: ends })));
}

const newest = `logs?limit=${SHOWN_REQUESTS}`;
let lastId = null;
let total = null;
let grownAt = 0;
let fetchedAt = 0;

/** The newest records; later only those behind the last one, and only while something happens. */
async function fetchRequests(ends) {
  const now = performance.now();
  const grown = (known.pulse?.total ?? 0) - total;
  if (lastId !== null && !grown && fetchedAt - grownAt > 2000) return; // a record is written within a second or so
  fetchedAt = now;
  if (grown) [total, grownAt] = [known.pulse?.total ?? 0, now];
  const few = lastId !== null && grown < SHOWN_REQUESTS;
  let { logs } = await json(few ? `${newest}&after=${lastId}` : newest, { signal: ends });
  if (few && logs.length === SHOWN_REQUESTS) ({ logs } = await json(newest, { signal: ends }));
  else if (few) logs = [...logs.reverse(), ...known.requests];
  lastId = logs[0]?.id ?? 0;
  known.requests = logs.slice(0, SHOWN_REQUESTS).map(({ prompt, response, ...row }) => row);
  changed("requests");
}

/** Failed ones only, from further back than the list reaches. */
export async function fetchFailed() {
  const [theirs, ours] = await Promise.all([json(`${newest}&status=4xx`), json(`${newest}&status=5xx`)]);
  return [...theirs.logs, ...ours.logs].sort((a, b) => b.id - a.id).slice(0, SHOWN_REQUESTS);
}

let usageDays = 1;
export function showUsageOf(days) {
  usageDays = days;
  if (session) run(fetchUsage(session.signal).catch((error) => { if (!(error instanceof Lost)) throw error; }));
}

let usageOf = null; // what it was fetched for

async function fetchUsage(ends) {
  const now = `${known.me.id} ${usageDays} ${known.pulse?.total ?? ends}`;
  if (known.usage && usageOf === now) return;
  usageOf = now;
  const since = new Date(Date.now() - (usageDays - 1) * 86_400_000).toISOString().slice(0, 10);
  known.usage = await json(`v1/usage?since=${since}`, { signal: ends });
  changed("usage");
}

function pause(milliseconds, ends, wakeable = false) {
  return new Promise((resolve, reject) => {
    const end = () => {
      clearTimeout(timer);
      reject(ends.reason);
    };
    const done = () => {
      clearTimeout(timer);
      ends.removeEventListener("abort", end);
      resolve();
    };
    const timer = setTimeout(done, milliseconds);
    ends.addEventListener("abort", end, { once: true });
    if (wakeable) {
      const others = wake;
      wake = () => {
        wake = () => {};
        done();
        others();
      };
    }
  });
}
