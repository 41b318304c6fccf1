#!/usr/bin/env python3
"""A llama-server that misbehaves on command: a program taking llama-server's arguments, or an object in-process.

Commands are `name=value` (a bare name is true), separated by commas or spaces, or a JSON object. They hold for all
requests if they come from FAKE_LLAMA or the constructor, and for one request if its prompt contains
`{{fake: die=3 interval=0.01}}`.

  for the process only                                  for requests
  load=S, load=never  503 "Loading model" so long       tokens=N say=TEXT     how many tokens, and which
  exit=N, oom         end with N, 1 after the load      interval=S prefill=S  before each token, before the head
  reject=--flag       "invalid argument", exit 1        huge=BYTES            one token of that size
  crash_after=N       end at POST N+1                   wedge, hang=N         never answer; silence after N tokens
  deaf, deaf=N        no answers, no /health (after N)  die=N cut=N           after N tokens: RST; FIN, no last chunk
  ignore_sigterm      only SIGKILL helps                end=N exit_at=N       clean end; end of the process
  early=STATUS        answer before the body is read    error=N               error frame, then a clean end
  close_idle          close after answering             status=N empty=204    error answer; no body (204, 304)
  close_reuse         RST when a connection is reused   bad_head, garbage     no HTTP
  vram=MIB            in the log's lines at -lv 4       split=N, one_chunk    raw pieces of N; all events in one
                                                        trailers, info=1XX    a tail; a head before the head
                                                        close                 no framing: the FIN ends the body

GET /fake tells, without a key: pid, argv, environment, requests, connections, and how many clients left (aborted).
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any, NoReturn

if not __package__:
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tests.fake_wire import Commands, Exchange, Over, error_body, parse_commands

NEVER = 1e9
OOM = "ggml_backend_cuda_buffer_type_alloc_buffer: allocating 4096.00 MiB on device 0: cudaMalloc failed: out of memory"
BROKEN = "llama_model_load: error loading model: tensor 'blk.0.attn_q.weight' data is not within the file bounds"


class FakeLlama:
    """`async with FakeLlama("load=0.2") as fake:` serves on `fake.port`; `fake.seen` holds the requests.

    What ends a process only closes the listener and resets the connections here; `fake.ended` is the exit code.
    """

    def __init__(self, commands: Commands | str = "", argv: list[str] | None = None, api_key: str = "") -> None:
        self.commands = parse_commands(commands) if isinstance(commands, str) else commands
        self.argv, self.api_key = argv or [], api_key
        self.model = self.argument("-m", "--model")
        self.alias = self.argument("-a", "--alias") or "fake"
        self.parallel = int(self.argument("-np", "--parallel") or 4)
        self.context = int(self.argument("-c", "--ctx-size") or 4096) // self.parallel
        self.host, self.port = self.argument("--host") or "127.0.0.1", int(self.argument("--port") or 0)
        self.seen: list[dict[str, Any]] = []
        self.aborted = self.posts = self.busy = self.tokens = 0
        self.is_process = False
        self.ended: int | None = None
        self._slots = asyncio.Semaphore(self.parallel)
        self._open: dict[Exchange, asyncio.Task[Any] | None] = {}

    def argument(self, *names: str) -> str:
        return next((value for name, value in zip(self.argv, self.argv[1:], strict=False) if name in names), "")

    async def __aenter__(self) -> FakeLlama:
        self.load = NEVER if self.commands.get("load") == "never" else float(self.commands.get("load", 0))
        self._ready_at = time.monotonic() + self.load
        self._server = await asyncio.start_server(self._connection, self.host, self.port, limit=1 << 20, backlog=512)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        tasks = [task for task in self._open.values() if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def end_process(self, code: int) -> NoReturn:
        if self.is_process:
            os._exit(code)
        self.ended = code
        self._server.close()
        for exchange in self._open:
            with contextlib.suppress(Over):
                exchange.reset()
        raise Over

    async def _connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connection = Exchange(reader, writer, self.commands)
        self._open[connection] = asyncio.current_task()
        try:
            for turn in range(sys.maxsize):
                exchange = Exchange(reader, writer, self.commands)
                await exchange.read_head()
                if turn and "close_reuse" in self.commands:
                    exchange.reset()
                await self._answer(exchange)
                if {"close", "close_idle"} & exchange.commands.keys():
                    return
        except (Over, OSError, asyncio.IncompleteReadError, asyncio.LimitOverrunError, asyncio.CancelledError):
            pass  # however it ended, it ended
        finally:
            del self._open[connection]
            writer.close()

    async def _answer(self, x: Exchange) -> None:
        if early := int(x.number("early") if x.method == "POST" else 0):
            await x.reply(early, error_body(early, "answered before the body was read"))
        await x.read_body()
        self.seen.append({"method": x.method, "path": x.path, "headers": x.headers, "body": x.body})
        self.posts += x.method == "POST"
        route = x.path.partition("?")[0].removeprefix("/v1")
        if early or route == "/fake":
            about = {"pid": os.getpid(), "argv": self.argv, "environment": dict(os.environ), "requests": self.seen}
            about |= {"aborted": self.aborted, "connections": len(self._open)}
            return None if early else await x.reply(200, about)
        if self.posts > x.number("crash_after", NEVER):
            self.end_process(139)
        if "deaf" in x.commands and (x.commands["deaf"] is True or self.posts > x.commands["deaf"]):
            await asyncio.sleep(NEVER)
        key = x.headers.get("authorization", "").removeprefix("Bearer ") or x.headers.get("x-api-key", "")
        if route != "/health" and self.api_key and key != self.api_key:
            return await x.reply(401, error_body(401, "Invalid API Key"))
        if time.monotonic() < self._ready_at:
            return await x.reply(503, error_body(503, "Loading model"))
        if x.method == "GET":
            return await self._get(x, route)
        async with self._slots:
            self.busy += 1
            try:
                await self._post(x, route)
            finally:
                self.busy -= 1

    async def _get(self, x: Exchange, route: str) -> None:
        meta = {"vocab_type": 1, "n_vocab": 256, "n_ctx_train": 32768, "n_embd": 64, "n_params": 1000, "size": 2000}
        model = {"id": self.alias, "object": "model", "created": 1, "owned_by": "llamacpp", "meta": meta}
        props = {"default_generation_settings": {"n_ctx": self.context}, "total_slots": self.parallel}
        props |= {"model_alias": self.alias, "model_path": self.model, "modalities": {"vision": False, "audio": False}}
        counts = f"llamacpp:tokens_predicted_total {self.tokens}\nllamacpp:requests_processing {self.busy}\n"
        busy = [{"id": n, "n_ctx": self.context, "is_processing": n < self.busy} for n in range(self.parallel)]
        known: dict[str, object] = {"/health": {"status": "ok"}, "/models": {"object": "list", "data": [model]}}
        known |= {"/props": props, "/slots": busy, "/metrics": counts}
        if route == "/metrics" and "--metrics" not in self.argv:
            await x.reply(501, error_body(501, "This server does not support metrics endpoint."))
        elif route in known:
            await x.reply(200, known[route])
        else:
            await x.reply(404, error_body(404, "File Not Found"))

    async def _post(self, x: Exchange, route: str) -> None:
        if "wedge" in x.commands:
            await asyncio.sleep(NEVER)
        if {"bad_head", "garbage"} & x.commands.keys():
            await x.raw(b"HTTP/1.1 2OO banana\r\n\r\n" if "bad_head" in x.commands else bytes(range(256)) * 4)
            raise Over
        if status := int(x.number("status") or x.number("empty")):
            await x.reply(status, error_body(status, f"as commanded: {status}"))
        elif route == "/tokenize":
            await x.reply(200, {"tokens": [ord(letter) for letter in x.body.get("content", "")]})
        elif route == "/embeddings":
            row = {"object": "embedding", "index": 0, "embedding": [0.6, 0.8]}
            usage = {"prompt_tokens": 2, "total_tokens": 2}
            await x.reply(200, {"object": "list", "model": self.alias, "data": [row], "usage": usage})
        elif route in ("/chat/completions", "/completions"):
            await asyncio.sleep(x.number("prefill"))
            await (self._stream if x.body.get("stream") else self._whole)(x, route == "/chat/completions")
        else:
            await x.reply(404, error_body(404, "File Not Found"))

    def _plan(self, x: Exchange) -> tuple[list[str], str, dict[str, Any]]:
        """The tokens of the answer, why it ends, and the counts at its end."""
        bounds = [x.body[name] for name in ("n_predict", "max_completion_tokens", "max_tokens") if name in x.body]
        bound = int(bounds[0]) if bounds else 16  # the real one goes on to the end of the context
        words = [f"{x.commands.get('say', f't{n}')} " for n in range(int(x.number("tokens", bound)))]
        words = ["x" * int(x.number("huge"))] if "huge" in x.commands else words
        timings = {"cache_n": 1, "prompt_n": 4, "prompt_ms": 2.0, "predicted_n": len(words), "predicted_ms": 3.0}
        usage: dict[str, Any] = {"completion_tokens": len(words), "prompt_tokens": 5, "total_tokens": len(words) + 5}
        usage["prompt_tokens_details"] = {"cached_tokens": 1}
        return words, "length" if len(words) == bound else "stop", {"usage": usage, "timings": timings}

    def _frame(self, kind: str, **choice: Any) -> dict[str, Any]:
        frame = {"choices": [{"finish_reason": None, "index": 0} | choice], "created": int(time.time()), "object": kind}
        return frame | {"id": "chatcmpl-fake", "model": self.alias, "system_fingerprint": "b1-fake"}

    async def _whole(self, x: Exchange, chat: bool) -> None:
        words, reason, counts = self._plan(x)
        for _ in words:
            await self._token(x)
        text = "".join(words)
        said: dict[str, Any] = {"message": {"role": "assistant", "content": text}} if chat else {"text": text}
        kind = "chat.completion" if chat else "text_completion"
        answer = self._frame(kind, finish_reason=reason, **said) | counts
        if ordered := {"die", "cut", "exit_at"} & x.commands.keys():
            half = json.dumps(answer).encode()
            await x.head(200, "application/json; charset=utf-8", 2 * len(half))
            await x.raw(half)
            await self._stops(x, x.commands[ordered.pop()])
        await x.reply(200, answer)

    async def _stream(self, x: Exchange, chat: bool) -> None:
        words, reason, counts = self._plan(x)
        kind = "chat.completion.chunk" if chat else "text_completion"
        await x.head(200, "text/event-stream", None)
        if chat:
            await x.event(self._frame(kind, delta={"role": "assistant", "content": None}))
        for count, word in enumerate(words):
            if await self._stops(x, count):
                return
            await self._token(x)
            await x.event(self._frame(kind, **({"delta": {"content": word}} if chat else {"text": word})))
        if await self._stops(x, len(words)):
            return
        empty: dict[str, Any] = {"delta": {}} if chat else {"text": ""}
        await x.event(
            self._frame(kind, finish_reason=reason, **empty) | ({"timings": counts["timings"]} if chat else counts)
        )
        if chat and (x.body.get("stream_options") or {}).get("include_usage"):
            await x.event(self._frame(kind) | {"choices": []} | counts)
        await x.event("[DONE]")
        await x.end()

    async def _token(self, x: Exchange) -> None:
        """One token's time; here a client that has left is noticed."""
        self.tokens += 1
        await asyncio.sleep(x.number("interval"))
        if x.reader.at_eof() or x.reader.exception() or x.writer.is_closing():
            self.aborted += 1
            raise Over

    async def _stops(self, x: Exchange, count: int) -> bool:
        """Does what was ordered for after `count` tokens; true if that was a clean end."""
        ordered = {name for name, value in x.commands.items() if value == count and value is not True}
        if "hang" in ordered:
            await asyncio.sleep(NEVER)
        elif "die" in ordered:
            x.reset()
        elif "exit_at" in ordered:
            self.end_process(139)
        elif "cut" in ordered:
            raise Over
        if "error" in ordered:
            await x.event(error_body(500, "as commanded, in mid-stream"))
        if stops := bool({"error", "end"} & ordered):
            await x.end()
        return stops


def log(text: str) -> None:
    sys.stderr.write(text + "\n")


def install(folder: Path, commands: str = "") -> Path:
    """Makes an executable `llama-server` in `folder`. Each start reads `llama-server.commands` beside it, because the
    gateway gives its children a clean environment, and a test may want the second start to differ from the first."""
    path = folder / "llama-server"
    path.with_suffix(".commands").write_text(commands)
    commands_file = str(path.with_suffix(".commands"))
    script = f"import os, runpy\nos.environ.setdefault('FAKE_LLAMA', open({commands_file!r}).read())\n"
    path.write_text(f"#!{sys.executable}\n{script}runpy.run_path({__file__!r}, run_name='__main__')\n")
    path.chmod(0o755)
    return path


async def serve(argv: list[str]) -> int:
    fake = FakeLlama(os.environ.get("FAKE_LLAMA", ""), argv, os.environ.get("LLAMA_API_KEY", ""))
    fake.is_process = True
    if (flag := fake.commands.get("reject")) in argv:
        log(f"error: invalid argument: {flag}")
        return 1
    stopped = asyncio.Event()
    ignore = "ignore_sigterm" in fake.commands
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, (lambda: None) if ignore else stopped.set)
    async with fake:
        log(f"main: HTTP server is listening, hostname: {fake.host}, port: {fake.port}\nmain: loading model")
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(stopped.wait(), fake.load)
            return 0
        if {"exit", "oom"} & fake.commands.keys():
            log(OOM if "oom" in fake.commands else BROKEN)
            log(f"srv    load_model: failed to load model, '{fake.model}'\nmain: exiting due to model loading error")
            return int(fake.commands.get("exit", 1))
        if fake.argument("-lv", "--verbosity") == "4":
            for part, size in (("model", fake.commands.get("vram", 1)), ("KV", 16), ("compute", 8)):
                log(f"load_tensors:        CUDA0 {part} buffer size = {float(size):8.2f} MiB")
        log(f"main: model loaded\nmain: server is listening on http://{fake.host}:{fake.port} - starting the main loop")
        await stopped.wait()
    return 0


if __name__ == "__main__":
    sys.exit(asyncio.run(serve(sys.argv[1:])))
