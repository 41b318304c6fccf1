"""A small campaign of the fuzzer in each run of the suite; `./scripts/fuzz` makes large ones."""

from __future__ import annotations

import asyncio
import os
import re
import subprocess
import sys

import pytest

from tests.house import ROOT
from tests.real.fuzz_client import Wrong, read_answer

SEED, REQUESTS = 20_001, 4_000


@pytest.mark.real
@pytest.mark.slow
@pytest.mark.timeout(90)
def test_generated_requests() -> None:
    """In a process of its own: what hypothesis makes of a seed depends on the modules that it finds."""
    command = [sys.executable, "-m", "tests.real.fuzz_campaign", str(REQUESTS), "--seed", str(SEED)]
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=80
    )
    assert done.returncode == 0, done.stdout
    answered = {status: int(count) for status, count in re.findall(r"(\d{3}|closed): (\d+)", done.stdout)}
    assert answered["200"] > REQUESTS / 20, "most of it does not get to llama-server"
    assert answered["400"] > REQUESTS / 20


HEAD = b"HTTP/1.1 %s\r\nContent-Type: application/json\r\nx-request-id: a\r\nContent-Length: %d\r\n\r\n%s"
ERROR = b'{"error":{"message":"m","type":"t","param":null,"code":"%s"}}'


def answer(status: bytes, body: bytes) -> bytes:
    return HEAD % (status, len(body), body)


def stream(*chunks: bytes, end: bytes = b"0\r\n\r\n", kind: bytes = b"text/event-stream") -> bytes:
    head = b"HTTP/1.1 200 OK\r\nContent-Type: %s\r\nx-request-id: a\r\nTransfer-Encoding: chunked\r\n\r\n" % kind
    return head + b"".join(b"%x\r\n%s\r\n" % (len(chunk), chunk) for chunk in chunks) + end


def lines(*chunks: bytes, end: bytes = b"0\r\n\r\n") -> bytes:
    return stream(*chunks, end=end, kind=b"application/x-ndjson")


TOKEN = b'{"token":"a","done":false}\n'
DONE = b'{"done":true,"content":"a"}\n'
JUDGED: dict[str, tuple[bytes, str | None]] = {  # what came, and what the fuzzer says
    "an answer": (answer(b"200 OK", b"{}"), None),
    "a refusal": (answer(b"400 Bad Request", ERROR % b"invalid_request"), None),
    "no place": (answer(b"503 x", ERROR % b"queue_full"), None),
    "nothing": (b"", None),
    "no HTTP": (b"hello\r\n\r\n", "no HTTP"),
    "half a head": (b"HTTP/1.1 200 OK\r\nX:", "half a head"),
    "half a body": (answer(b"200 OK", b"{}")[:-1], "cut off"),
    "a header twice": (answer(b"200 OK", b"{}").replace(b"x-r", b"content-type: a\r\nx-r"), "bad header"),
    "no request id": (answer(b"200 OK", b"{}").replace(b"x-request-id", b"x"), "no request id"),
    "no JSON": (answer(b"200 OK", b"{"), "no JSON"),
    "another shape": (answer(b"404 x", b'{"detail":"x"}'), "not our shape"),
    "our fault": (answer(b"500 x", ERROR % b"internal_error"), "500"),
    "llama-server's fault": (answer(b"502 x", ERROR % b"backend_error"), "502"),
    "unavailable": (answer(b"503 x", ERROR % b"model_loading"), "503"),
    "a stream": (stream(b"data: a\n\n", b"data: [DONE]\n\n"), None),
    "a stream that is cut": (stream(b"data: a\n\n", end=b""), "cut off"),
    "a stream that failed": (stream(b"data: " + ERROR % b"backend_error", end=b""), "cut off"),
    "a refusal of infer": (answer(b"400 x", b'{"error":"m","code":"invalid_request"}'), None),
    "a refusal of infer without words": (answer(b"400 x", b'{"error":"","code":"c"}'), "not our shape"),
    "infer's fault": (answer(b"502 x", b'{"error":"m","code":"backend_error"}'), "502"),
    "lines": (lines(TOKEN, DONE), None),
    "lines that are cut": (lines(TOKEN, end=b""), "cut off"),
    "lines that failed": (lines(TOKEN, b'{"error":"m","code":"backend_error"}\n', end=b""), "cut off"),
    "lines that failed and ended": (lines(TOKEN, b'{"error":"m","code":"backend_error"}\n'), "without its end"),
    "lines without an end": (lines(TOKEN), "without its end"),
    "lines that are none": (lines(b"{", DONE), "no lines"),
    "lines of something else": (lines(b'{"tokens":"a"}\n', DONE), "no tokens"),
    "lines that say two things": (lines(TOKEN, TOKEN, DONE), "without its end"),
    "a stream that failed and ended": (stream(b"data: " + ERROR % b"backend_error"), "error in a stream"),
}


@pytest.mark.parametrize("case", JUDGED)
async def test_what_is_a_finding(case: str) -> None:
    came, expected = JUDGED[case]
    reader = asyncio.StreamReader()
    reader.feed_data(came)
    reader.feed_eof()
    if expected is None:
        assert (await read_answer(reader, "POST", cut=False) is None) == (not came)
        return
    with pytest.raises(Wrong, match=expected):
        await read_answer(reader, "POST", cut=False)
