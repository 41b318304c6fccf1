"""llama-server's own parser as a judge of grammars, in a throw-away process that may crash, hang and eat memory.

The process is a llama-server on a model of 70 KB (`tiny`), for a single grammar: 0.1 s. It generates a little as well,
because what grows without end may do so only then. Seen on build 11669: 60,000 brackets end it by SIGSEGV, `"a"{5,2}`
takes all the memory it may have, 8,000 optional items in a row take all its time.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import re
import secrets
import signal
import tempfile
from collections import OrderedDict
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from pathlib import Path
from weakref import WeakValueDictionary

import msgspec

from gateway.backend import Backend
from gateway.errors import BackendError, BackendTimeout, BadRequest, CorralError
from gateway.models.gguf.tiny import CONTEXT, tiny_model, token_of
from gateway.models.ports import Ports, Stranger, answers
from gateway.models.process import Process

CPU_SECONDS = 5  # what takes longer would keep the serving llama-server from everything else for as long
MEMORY_MB = 1024
READY_SECONDS, ANSWER_SECONDS = 30.0, 20.0
TOKENS = 64
FAVOURITES = 32  # characters, each of which is preferred for once
REMEMBERED = 512
AT_ONCE = 3  # tests, of different callers: each may take seconds
_OUTPUT_BYTES = 256 * 1024
_POLL_SECONDS = 0.01
_STOP_SECONDS = 2.0

# The kernel shall take this process first when memory ends, and no core is written. Limits that are there already stay:
# a shell that cannot set one ends. Of the two limits of time the lower one tells by its signal what it was.
_LIMITED = (
    f"ulimit -c 0; most=$(ulimit -H -d); [ $most != unlimited ] || ulimit -d {MEMORY_MB * 1024}; "
    f"most=$(ulimit -H -t); [ $most != unlimited ] || ulimit -S -t {CPU_SECONDS}; "
    'echo 1000 2>/dev/null >/proc/self/oom_score_adj; exec nice -n 10 "$0" "$@"'
)
# It must not take memory on a GPU that models have booked.
_NO_GPU = {"CUDA_VISIBLE_DEVICES": "-1", "HIP_VISIBLE_DEVICES": "-1", "ROCR_VISIBLE_DEVICES": ""}
# Strings, character classes and comments are skipped.
_GBNF = re.compile(r'"(?:\\.|[^"\\])*"|\[(?:\\.|[^\]\\])*\]|#[^\r\n]*|(?P<token>!?<[^<>\s]*>)', re.DOTALL)
_LITERAL = re.compile(r'"((?:\\.|[^"\\])*)"|\[(?:\\.|[^\]\\])*\]|#[^\r\n]*', re.DOTALL)
_ROOT = re.compile(r"^[ \t]*root[ \t]*::=", re.MULTILINE)
_ESCAPED = {"\\n": "\n", "\\r": "\r", "\\t": "\t", '\\"': '"', "\\\\": "\\"}
_COMPLAINTS = (b"error parsing grammar: ", b"unsupported grammar, ")
_LINE = re.compile(rb"[^\r\n]*")


class Untested(CorralError):
    """The parser could not be asked; this says nothing of the grammar."""


class _Complaint(msgspec.Struct):
    error: dict[str, msgspec.Raw] = {}


class GrammarParser:
    """Tests grammars, those of one caller one after the other, so that one who sends many that take long does not keep
    others waiting. What was tested before is remembered by its text. Belongs to the loop."""

    def __init__(self, binary: Path | None, environment: Mapping[str, str], ports: Ports | None = None) -> None:
        self._binary = binary
        self._environment = {**environment, **_NO_GPU}
        self._ports = ports or Ports()
        self._places = asyncio.Semaphore(AT_ONCE)
        self._turns: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        self._known: OrderedDict[bytes, str | None] = OrderedDict()

    def identity(self) -> str | None:
        """Another one after the binary was replaced; None where there is none to ask. Blocking, but short."""
        try:
            found = self._binary and self._binary.stat()
        except OSError:
            return None
        return f"{found.st_size:x}-{found.st_mtime_ns:x}" if found else None

    async def test(self, text: str, caller: str = "") -> None:
        """Raises BadRequest with the parser's message for a grammar that must not be used, Untested.

        Whoever waits is `caller`. Without a binary everything passes: the models are those of others, who have
        parsers of their own.
        """
        identity = self.identity()
        if identity is None or self._binary is None:
            return
        known = hashlib.sha256(f"{identity}\n{text}".encode(errors="surrogatepass")).digest()
        if known not in self._known:
            turn = self._turns.setdefault(caller, asyncio.Lock())
            async with turn, self._places:
                if known not in self._known:
                    self._known[known] = await self._judge(self._binary, text)
            if len(self._known) > REMEMBERED:
                self._known.popitem(last=False)
        self._known.move_to_end(known)
        if (complaint := self._known[known]) is not None:
            raise BadRequest(complaint, param="content")

    async def _judge(self, binary: Path, text: str) -> str | None:
        """None for a good grammar, else what is wrong with it, in one sentence. Raises Untested."""
        async with self._server(binary) as (process, backend, output):
            try:
                async with asyncio.timeout(ANSWER_SECONDS):
                    for request in _requests(text):
                        reply = await backend.request("POST", "/v1/completions", request)
                        body = await reply.read(_OUTPUT_BYTES)
                        if reply.status != 200:
                            break
                    else:
                        return None
            except TimeoutError:
                return f"llama-server's parser did not get through with it in {ANSWER_SECONDS:g} s"
            except (BackendError, BackendTimeout) as error:
                if await process.ended_within(_STOP_SECONDS):
                    return why_ended(process.status)
                raise Untested(f"the grammar could not be tested: {error.message}") from None
            backend.close()
            await process.stop(_STOP_SECONDS)  # and so its last words are read
            return explain(text, body, bytes(output))

    @contextlib.asynccontextmanager
    async def _server(self, binary: Path) -> AsyncIterator[tuple[Process, Backend, bytearray]]:
        """Raises Untested where it does not come up."""
        try:
            port = self._ports.take()
        except OSError as error:
            raise Untested(f"the grammar could not be tested: {error}") from None
        key, output = secrets.token_hex(16), bytearray()

        def take(data: bytes) -> None:
            output.extend(data[: max(0, _OUTPUT_BYTES - len(output))])

        try:
            with tempfile.NamedTemporaryFile(prefix="corral-", suffix=".gguf", dir=_memory_folder()) as model:
                model.write(tiny_model())
                model.flush()
                argv = ["/bin/sh", "-c", _LIMITED, str(binary), *_arguments(model.name, port)]
                process = await Process.spawn(argv, {**self._environment, "LLAMA_API_KEY": key}, take)
                backend = Backend(f"http://127.0.0.1:{port}", key=key)
                try:
                    await _until_ready(process, backend)
                    yield process, backend, output
                finally:
                    backend.close()
                    process.kill()
                    await process.stop()
        except OSError as error:
            raise Untested(f"the grammar could not be tested: {error.strerror or error}") from None
        finally:
            self._ports.give_back(port)


async def _until_ready(process: Process, backend: Backend) -> None:
    deadline = asyncio.get_running_loop().time() + READY_SECONDS
    while process.running and asyncio.get_running_loop().time() < deadline:
        try:
            if await answers(backend, process.pid):
                return
        except Stranger as stranger:
            raise Untested(f"the grammar could not be tested: {stranger}") from None
        await process.ended_within(_POLL_SECONDS)
    why = f"llama-server was not ready after {READY_SECONDS:g} s"
    if not process.running:
        why = process.explain(await process.stop())
    raise Untested(f"the grammar could not be tested: {why}")


def _memory_folder() -> str | None:
    """Where no disk is written, and none need be writable; None: where temporary files usually lie."""
    return "/dev/shm" if os.access("/dev/shm", os.W_OK) else None


def _arguments(model: str, port: int) -> Sequence[str]:
    """Only what every build knows. With a thread for each core, their stacks alone could fill what memory it has."""
    fixed = "-np 1 -t 1 --threads-http 2 -ngl 0 --host 127.0.0.1"
    return ["-m", model, "-c", str(CONTEXT), "--port", str(port), *fixed.split()]


def _requests(text: str) -> Iterator[bytes]:
    """Without samplers every token that the grammar allows is as likely as the others; the seed is fixed, so that the
    answer to the same text is always the same.

    By chance alone one that nests would soon take its way out (`r ::= "a" r "b" | "a" r "c" | "d"`). So each character
    with which a literal begins is preferred for once.
    """
    asked = {"prompt": [1], "max_tokens": TOKENS, "seed": 1, "temperature": 1.0, "samplers": []}
    asked |= {"grammar": without_tokens(text)}
    yield msgspec.json.encode(asked)
    for character in _favourites(text):
        bias = [[token_of(byte), 100] for byte in character.encode(errors="replace")]
        yield msgspec.json.encode(asked | {"logit_bias": bias})


def _favourites(text: str) -> list[str]:
    literals = [match[1] for match in _LITERAL.finditer(text) if match[1]]
    firsts = dict.fromkeys(_ESCAPED.get(literal[:2], literal[0]) for literal in literals)
    return list(firsts)[:FAVOURITES]


def without_tokens(text: str) -> str:
    """References to a vocabulary's tokens (`<think>`, `<[128009]>`) as any character: this vocabulary has none."""
    return _GBNF.sub(lambda match: "." if match["token"] else match[0], text)


def explain(text: str, body: bytes, output: bytes) -> str:
    """What the parser said, from its answer and, since that says little, from what it wrote to its output."""
    for complaint in _COMPLAINTS:
        _, found, rest = output.partition(complaint)
        if found:
            said = _LINE.match(rest)
            what = said[0].decode(errors="replace").strip() if said else ""
            what = f"{what} the end" if what.endswith(" at") else what
            what = "it needs too much memory" if "bad_alloc" in what else what
            return f"llama-server cannot parse the grammar: {what[:300]}"
    if not _ROOT.search(text):
        return "llama-server cannot parse the grammar: it has no rule named root"
    message = ""
    with contextlib.suppress(msgspec.DecodeError):
        raw = msgspec.json.decode(body, type=_Complaint).error.get("message")
        message = msgspec.json.decode(raw, type=str) if raw is not None else ""
    if "bad_alloc" in message:
        return f"the grammar needs more than {MEMORY_MB} MB of llama-server's memory"
    if "empty grammar stack" in message:
        return "the grammar comes to a place where nothing at all may follow, such as [z-a]"
    return f"llama-server refuses the grammar: {message[:300] or 'it does not say why'}"


def why_ended(status: int) -> str:
    """Of the process, while it had the grammar."""
    if status in (-signal.SIGXCPU, -signal.SIGKILL):
        return f"the grammar keeps llama-server busy for more than {CPU_SECONDS} s, or needs more memory than there is"
    how = f"by {signal.Signals(-status).name}" if -status in set(signal.Signals) else f"with status {status}"
    return f"the grammar makes llama-server crash: it ended {how}"
