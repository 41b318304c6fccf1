/** A chat to try a model with. It streams; the text is drawn once a frame, however fast the tokens come. */

import { Lost, Refused, events } from "./api.js";
import { announce } from "./commands.js";
import { $, h, say, show } from "./dom.js";
import { milliseconds, plural, rate } from "./format.js";
import { isFinal, signOut } from "./live.js";
import { known, on } from "./store.js";

let turns = []; // what the model is told: { role, content }
let running = null; // an AbortController

export function setUpChat() {
  on(["models", "about"], drawModels);
  on(["who"], () => known.signedIn || startAnew());
  $("chat-form").addEventListener("submit", (event) => {
    event.preventDefault();
    send();
  });
  $("chat-text").addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    send();
  });
  $("chat-stop").addEventListener("click", () => running?.abort());
  $("chat-clear").addEventListener("click", startAnew);
  drawHint();
}

function drawModels() {
  const select = $("chat-model");
  const able = [...known.models.keys()].filter((id) => (known.about.get(id)?.task ?? "generate") === "generate");
  able.sort((a, b) => a.localeCompare(b, "en", { numeric: true }));
  const label = (id) => (known.models.get(id).status === "ready" ? id : `${id} (${known.models.get(id).status})`);
  const key = able.map(label).join("\n");
  if (select.dataset.key === key) return;
  const loaded = able.find((id) => known.models.get(id).status === "ready");
  const chosen = able.includes(select.value) ? select.value : (loaded ?? able[0]);
  select.dataset.key = key;
  select.replaceChildren(...able.map((id) => h("option", { value: id, text: label(id) })));
  if (chosen) select.value = chosen;
  $("chat-send").disabled = !able.length;
}

function startAnew() {
  running?.abort();
  turns = [];
  drawHint();
  show($("chat-clear"), false);
}

function drawHint() {
  const hint = "Try a model: pick one, ask something. One that is not loaded is loaded for it.";
  $("chat-log").replaceChildren(h("p", { class: "empty", text: hint }));
}

async function send() {
  const text = $("chat-text").value.trim();
  if (!text || running || $("chat-send").disabled) return;
  if (!turns.length) $("chat-log").replaceChildren();
  $("chat-text").value = "";
  turns.push({ role: "user", content: text });
  $("chat-log").append(h("p", { class: "turn mine", text }));
  show($("chat-clear"), true);
  const answer = new Answer($("chat-model").value);
  running = new AbortController();
  working(true);
  try {
    await answer.stream(running.signal);
  } finally {
    running = null;
    working(false);
    if (answer.text) turns.push({ role: "assistant", content: answer.text });
    else turns = turns.slice(0, -1); // it was not answered: the next one stands in its place
  }
}

function working(yes) {
  show($("chat-send"), !yes);
  show($("chat-stop"), yes);
  if (document.activeElement === document.body || document.activeElement === null) $("chat-text").focus();
}

class Answer {
  constructor(model) {
    this.model = model;
    this.text = "";
    this.thought = "";
    this.began = performance.now();
    this.firstAt = null;
    this.tokens = 0;
    this.words = h("p", { class: "turn theirs" });
    this.thinking = h("details", { class: "thinking", hidden: true }, h("summary", { text: "Thoughts" }), h("p"));
    this.note = h("p", { class: "turn-note", text: "…" });
    $("chat-log").append(this.thinking, this.words, this.note);
    this.scroll(true);
  }

  async stream(signal) {
    const waits = setInterval(() => this.firstAt === null && this.drawWaiting(), 300);
    const most = Number($("chat-most").value) || 256;
    const body = { model: this.model, messages: turns, stream: true, max_tokens: most };
    try {
      let whole = false;
      for await (const { name, data } of events("v1/chat/completions", { method: "POST", body, signal })) {
        if (data === "[DONE]") whole = true;
        else if (name !== "ping") this.heard(JSON.parse(data));
      }
      if (!whole) throw new Lost("The answer broke off.");
      this.done("");
    } catch (error) {
      this.failed(error, signal);
    } finally {
      clearInterval(waits);
    }
  }

  heard(told) {
    if (told.error) throw new Refused(told.error.status ?? 0, told.error.code, told.error.message);
    const { content, reasoning_content: thought } = told.choices?.[0]?.delta ?? {};
    if (told.timings) this.timings = told.timings;
    if (!content && !thought) return;
    this.firstAt ??= performance.now();
    this.tokens += 1;
    this.text += content ?? "";
    this.thought += thought ?? "";
    this.drawing ??= requestAnimationFrame(() => this.draw());
  }

  draw() {
    this.drawing = null;
    const below = this.isBelow();
    say(this.words, this.text.trimStart());
    show(this.thinking, this.thought !== "");
    say(this.thinking.lastChild, this.thought);
    if (running) say(this.note, `${this.model} · ${rate(this.speed())} tokens a second`);
    this.scroll(below);
  }

  drawWaiting() {
    const status = known.models.get(this.model)?.status;
    const progress = known.models.get(this.model)?.load_progress;
    const seconds = Math.round((performance.now() - this.began) / 1000);
    const why = status === "ready" || !status ? "waiting for the first token" : `the model is ${status}`;
    say(this.note, `${why}${progress ? ` ${Math.round(progress * 100)} %` : ""} · ${seconds} s`);
  }

  speed() {
    const seconds = (performance.now() - this.firstAt) / 1000;
    return this.timings?.predicted_per_second ?? (seconds > 0 ? this.tokens / seconds : 0);
  }

  done(word) {
    cancelAnimationFrame(this.drawing);
    this.draw();
    const first = this.firstAt === null ? null : `first token ${milliseconds(this.firstAt - this.began)}`;
    const tokens = plural(this.timings?.predicted_n ?? this.tokens, "token");
    const made = this.tokens ? `${tokens}, ${rate(this.speed())} a second` : null;
    say(this.note, [word, this.model, made, first].filter(Boolean).join(" · "));
    this.scroll(this.isBelow());
    announce(`${this.model} has answered. ${this.text.slice(0, 2000)}`);
  }

  failed(error, signal) {
    if (signal.aborted) return this.done("stopped");
    if (!(error instanceof Refused || error instanceof Lost)) throw error;
    this.done("");
    this.note.classList.add("bad");
    say(this.note, error.code ? `${error.message} (${error.code})` : error.message);
    announce(error.message);
    if (isFinal(error) && error.status === 401) signOut(error.message);
  }

  isBelow() {
    const log = $("chat-log");
    return log.scrollHeight - log.scrollTop - log.clientHeight < 40;
  }

  scroll(below) {
    if (below) $("chat-log").scrollTop = $("chat-log").scrollHeight;
  }
}
