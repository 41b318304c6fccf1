/** Talking to the gateway. Paths are relative to the page, so that it works behind a proxy's prefix too. */

const KEY = "corral.key";
let key = null;

/** The gateway has answered, and said no. */
export class Refused extends Error {
  constructor(status, code, message) {
    super(message);
    this.status = status;
    this.code = code;
  }
}

/** There was no answer, or it broke off. */
export class Lost extends Error {}

export function remembered() {
  try {
    return sessionStorage.getItem(KEY);
  } catch {
    return null;
  }
}

export function useKey(secret, { remember = true } = {}) {
  key = secret;
  try {
    if (secret && remember) sessionStorage.setItem(KEY, secret);
    else sessionStorage.removeItem(KEY);
  } catch {
    // storage is forbidden here: the key lasts as long as the page
  }
}

/** The answer to a request as fetch has it. Raises Refused, Lost; an AbortError passes. */
export async function ask(path, { method = "GET", body, signal } = {}) {
  const headers = key ? { Authorization: `Bearer ${key}` } : {};
  if (body !== undefined) headers["Content-Type"] = "application/json";
  let answer;
  try {
    answer = await fetch(new URL(path, document.baseURI), {
      method,
      headers,
      body: body === undefined ? undefined : JSON.stringify(body),
      signal,
      cache: "no-store",
      credentials: "omit",
      referrerPolicy: "no-referrer",
    });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Lost("The gateway cannot be reached.");
  }
  if (answer.ok) return answer;
  throw await refusal(answer);
}

async function refusal(answer) {
  let told = {};
  try {
    told = (await answer.json()).error ?? {};
  } catch {
    // not ours: a proxy's page, say
  }
  return new Refused(answer.status, told.code ?? "", told.message ?? `The answer was ${answer.status}.`);
}

export async function json(path, how) {
  const answer = await ask(path, how);
  try {
    return await answer.json();
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Lost("The answer broke off.");
  }
}

export const post = (path, body, how) => json(path, { method: "POST", body, ...how });

/**
 * The events of a stream, as { name, data }, and { name: "ping" } for a comment. EventSource cannot send a key.
 * After `silence` milliseconds without a byte the stream counts as lost. Raises as `ask` does.
 */
export async function* events(path, { silence = Infinity, ...how } = {}) {
  const answer = await ask(path, how);
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  try {
    for (;;) {
      const { done, value } = await within(silence, reader.read());
      if (done) return;
      held += value;
      let end;
      while ((end = held.search(/\r?\n\r?\n/)) >= 0) {
        const block = held.slice(0, end);
        held = held.slice(end).replace(/^\r?\n\r?\n/, "");
        yield parsed(block);
      }
    }
  } catch (error) {
    if (error.name === "AbortError" || error instanceof Lost) throw error;
    throw new Lost("The connection broke off.");
  } finally {
    reader.cancel().catch(() => {});
  }
}

function parsed(block) {
  const event = { name: "message", data: "" };
  const lines = block.split(/\r?\n/);
  if (lines.every((line) => line.startsWith(":"))) return { name: "ping", data: "" };
  const data = [];
  for (const line of lines) {
    if (line.startsWith("event:")) event.name = line.slice(6).trim();
    else if (line.startsWith("data:")) data.push(line.slice(5).trimStart());
  }
  event.data = data.join("\n");
  return event;
}

function within(milliseconds, promise) {
  if (milliseconds === Infinity) return promise;
  let timer;
  const late = new Promise((_, reject) => {
    timer = setTimeout(() => reject(new Lost("The connection has gone silent.")), milliseconds);
  });
  return Promise.race([promise, late]).finally(() => clearTimeout(timer));
}
