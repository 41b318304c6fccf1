"""The fake must do what it is told, or the tests that use it prove nothing."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import os
import signal
import subprocess
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.fake_llama import FakeLlama, install
from tests.fake_wire import parse_commands
from tests.health.support import free_port
from tests.house import eventually, soon

CHAT = "/v1/chat/completions"


def request(path: str, body: dict[str, Any] | None = None, *headers: str) -> bytes:
    data = b"" if body is None else json.dumps(body).encode()
    lines = [
        f"{'GET' if body is None else 'POST'} {path} HTTP/1.1",
        "Host: x",
        f"Content-Length: {len(data)}",
        *headers,
    ]
    return "\r\n".join([*lines, "", ""]).encode() + data


def chat(prompt: str = "hi", **fields: Any) -> bytes:
    return request(CHAT, {"messages": [{"role": "user", "content": prompt}]} | fields)


async def talk(fake: FakeLlama, *requests: bytes, until: bytes | None = None) -> bytes:
    """All bytes up to the end of the connection, or up to `until`. Raises ConnectionResetError."""
    reader, writer = await asyncio.open_connection("127.0.0.1", fake.port)
    try:
        for one in requests:
            writer.write(one)
        return await (reader.readuntil(until) if until else reader.read())
    finally:
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()


async def answer(fake: FakeLlama, raw: bytes) -> tuple[int, Any]:
    """Of a fake that closes its connections."""
    head, _, body = (await talk(fake, raw)).partition(b"\r\n\r\n")
    return int(head.split(b" ")[1]), json.loads(body)


def frames(raw: bytes) -> list[Any]:
    found = [line[6:] for line in raw.split(b"\n") if line.startswith(b"data: ")]
    return [frame.decode() if frame.startswith(b"[") else json.loads(frame) for frame in found]


def test_commands() -> None:
    assert parse_commands("") == {}
    assert parse_commands("die=3, oom split=1 say=x load=0.5") == {
        "die": 3,
        "oom": True,
        "split": 1,
        "say": "x",
        "load": 0.5,
    }
    assert parse_commands('{"say": "a b"}') == {"say": "a b"}


async def test_a_well_behaved_answer() -> None:
    async with FakeLlama("close_idle", ["--alias", "tiny", "-np", "2", "-c", "100", "--metrics"], "secret") as fake:
        status, body = await answer(fake, request("/v1/models"))
        assert (status, body["error"]["type"]) == (401, "authentication_error")
        fake.api_key = ""
        assert await answer(fake, request("/health")) == (200, {"status": "ok"})
        assert (await answer(fake, request("/v1/models")))[1]["data"][0]["id"] == "tiny"
        assert (await answer(fake, request("/props")))[1]["default_generation_settings"] == {"n_ctx": 50}
        assert [slot["is_processing"] for slot in (await answer(fake, request("/slots")))[1]] == [False, False]
        assert b"llamacpp:tokens_predicted_total" in await talk(fake, request("/metrics"))
        assert (await answer(fake, request("/nope")))[0] == 404
        status, body = await answer(fake, chat(max_tokens=3))
        assert (status, body["model"], body["usage"]["completion_tokens"]) == (200, "tiny", 3)
        assert body["choices"][0]["message"]["content"] == "t0 t1 t2 "
        assert fake.seen[-1]["body"]["max_tokens"] == 3


async def test_a_well_behaved_stream() -> None:
    async with FakeLlama("close_idle") as fake:
        raw = await talk(fake, chat(stream=True, max_tokens=2, stream_options={"include_usage": True}))
        assert raw.endswith(b"0\r\n\r\n")
        first, *words, last, usage, done = frames(raw)
        assert first["choices"][0]["delta"] == {"role": "assistant", "content": None}
        assert [word["choices"][0]["delta"]["content"] for word in words] == ["t0 ", "t1 "]
        assert last["choices"][0]["finish_reason"] == "length" and last["timings"]["predicted_n"] == 2
        assert usage["choices"] == [] and usage["usage"]["total_tokens"] == 7
        assert done == "[DONE]"


@pytest.mark.parametrize(
    ("order", "begins", "holds", "ends"),
    [
        ("end=1", b"HTTP/1.1 200", b"t0", b"0\r\n\r\n"),
        ("cut=1", b"HTTP/1.1 200", b"t0", b"}\n\n\r\n"),
        ("error=1", b"HTTP/1.1 200", b'"code": 500', b"0\r\n\r\n"),
        ("trailers", b"HTTP/1.1 200", b"[DONE]", b"0\r\nX-Trailer: yes\r\n\r\n"),
        ("info=103", b"HTTP/1.1 103 ", b"\r\n\r\nHTTP/1.1 200", b"0\r\n\r\n"),
        ("close", b"HTTP/1.1 200", b"Connection: close\r\n\r\ndata: ", b"data: [DONE]\n\n"),
        ("split=7", b"HTTP/1.1 200", b"t0", b"0\r\n\r\n"),
        ("one_chunk", b"HTTP/1.1 200", b"\n\ndata: [DONE]", b"0\r\n\r\n"),
        ("huge=70000", b"HTTP/1.1 200", b"x" * 70_000, b"0\r\n\r\n"),
        ("status=500", b"HTTP/1.1 500", b'"type": "server_error"', b"}}"),
        ("empty=204", b"HTTP/1.1 204 No Content", b"Content-Length: ", b"\r\n\r\n"),
        ("empty=304", b"HTTP/1.1 304 Not Modified", b"Content-Length: ", b"\r\n\r\n"),
        ("bad_head", b"HTTP/1.1 2OO banana\r\n\r\n", b"", b""),
        ("garbage", b"\x00\x01\x02", b"", b""),
    ],
)
async def test_trouble_in_one_request(order: str, begins: bytes, holds: bytes, ends: bytes) -> None:
    async with FakeLlama() as fake:
        order = f"{{{{fake: close_idle tokens=2 {order}}}}}"
        raw = await talk(fake, chat(order, stream=True))
        assert raw.startswith(begins) and holds in raw and raw.endswith(ends)
        assert b"t0" in await talk(fake, chat("{{fake: close_idle}}"))  # the next one is not hurt


async def test_death_and_silence() -> None:
    async with FakeLlama() as fake:
        for stream in (True, False):
            with pytest.raises(ConnectionResetError):
                await talk(fake, chat("{{fake: die=1}}", stream=stream))
        assert len(await talk(fake, chat("{{fake: cut=1}}"))) > 100
        for order in ("wedge", "hang=0"):
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(talk(fake, chat(f"{{{{fake: {order}}}}}", stream=True)), 0.05)
        assert fake.busy == 2


async def test_a_client_that_leaves_is_noticed() -> None:
    async with FakeLlama("interval=0.01 tokens=100000") as fake:
        await talk(fake, chat(stream=True), until=b"t3")
        await soon(lambda: fake.aborted == 1)
        assert fake.busy == 0


async def test_loading() -> None:
    async with FakeLlama("load=never close_idle") as fake:
        loading = {"error": {"code": 503, "message": "Loading model", "type": "unavailable_error"}}
        assert await answer(fake, request("/health")) == (503, loading)
        assert await answer(fake, chat()) == (503, loading)
    async with FakeLlama("load=0.05 close_idle") as fake:
        assert (await answer(fake, request("/health")))[0] == 503
        await asyncio.sleep(0.06)
        assert (await answer(fake, request("/health")))[0] == 200


async def test_reused_connections() -> None:
    async with FakeLlama("close_reuse") as fake:
        with pytest.raises(ConnectionResetError):
            await talk(fake, request("/health"), request("/health"))
    async with FakeLlama() as fake:
        both = await talk(fake, chat(), chat("{{fake: close_idle}}"))
        assert both.count(b"HTTP/1.1 200 OK") == 2


async def test_an_answer_before_the_body() -> None:
    async with FakeLlama("early=413") as fake:
        raw = (
            request(CHAT, None, "Content-Length: 1000").replace(b"GET", b"POST").replace(b"Content-Length: 0\r\n", b"")
        )
        assert await talk(fake, raw, until=b"}}")


async def test_crashes_and_deafness() -> None:
    async with FakeLlama("crash_after=1") as fake:
        await talk(fake, chat(), until=b"}}")
        with pytest.raises(ConnectionResetError):
            await talk(fake, chat())
        assert fake.ended == 139
        with pytest.raises(ConnectionRefusedError):
            await talk(fake, chat())


async def test_deafness() -> None:
    async with FakeLlama("deaf=1") as fake:
        await talk(fake, request("/health"), chat(), until=b"timings")
        for raw in (chat(), request("/health")):
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(talk(fake, raw), 0.05)


# -- as a program --


class Program:
    def __init__(self, folder: Path, commands: str, *arguments: str, api_key: str = "") -> None:
        self.port = free_port()
        line = [str(install(folder, commands)), "--host", "127.0.0.1", "--port", str(self.port), *arguments]
        env = {"PATH": os.environ["PATH"], "LLAMA_API_KEY": api_key}
        self.process = subprocess.Popen(line, env=env, stderr=subprocess.PIPE, text=True)

    def open(self, path: str, body: bytes | None = None, key: str = "") -> http.client.HTTPResponse:
        url, headers = f"http://127.0.0.1:{self.port}{path}", {"Authorization": f"Bearer {key}"}
        reply = urllib.request.urlopen(urllib.request.Request(url, body, headers), timeout=5)
        assert isinstance(reply, http.client.HTTPResponse)
        return reply

    def get(self, path: str, key: str = "") -> tuple[int, Any]:
        try:
            with self.open(path, key=key) as reply:
                return reply.status, json.load(reply)
        except urllib.error.HTTPError as error:
            with error:
                return error.code, json.load(error)

    def finish(self) -> tuple[int, str]:
        _, err = self.process.communicate(timeout=5)
        return self.process.returncode, err


@pytest.fixture
def programs() -> Iterator[list[Program]]:
    started: list[Program] = []
    yield started
    for program in started:
        program.process.kill()
        program.finish()


def test_the_program(tmp_path: Path, programs: list[Program]) -> None:
    arguments = ["-m", "/m/x.gguf", "--alias", "tiny", "--fit", "off", "-lv", "4"]
    program = Program(tmp_path, "vram=123", *arguments, api_key="k")
    programs.append(program)
    assert eventually(lambda: program.get("/health")) == (200, {"status": "ok"})
    assert program.get("/v1/models")[0] == 401
    assert program.get("/props", "k")[1]["model_path"] == "/m/x.gguf"
    about = program.get("/fake")[1]
    assert about["pid"] == program.process.pid and about["argv"][4:] == arguments
    program.process.send_signal(signal.SIGTERM)
    code, err = program.finish()
    assert code == 0
    assert "CUDA0 model buffer size =   123.00 MiB" in err and "server is listening" in err


@pytest.mark.parametrize(
    ("commands", "code", "log"),
    [
        ("exit=3 load=0.05", 3, "error loading model"),
        ("oom", 1, "cudaMalloc failed: out of memory"),
        ("reject=--fit", 1, "error: invalid argument: --fit"),
    ],
)
def test_a_program_that_fails_to_start(tmp_path: Path, commands: str, code: int, log: str) -> None:
    done = Program(tmp_path, commands, "--fit", "off").finish()
    assert done[0] == code and log in done[1]


def test_a_program_that_ignores_sigterm(tmp_path: Path, programs: list[Program]) -> None:
    program = Program(tmp_path, "ignore_sigterm")
    programs.append(program)
    eventually(lambda: program.get("/health"))
    program.process.send_signal(signal.SIGTERM)
    with pytest.raises(subprocess.TimeoutExpired):
        program.process.wait(0.2)
    assert program.get("/health")[0] == 200


def test_a_program_that_ends_in_mid_stream(tmp_path: Path, programs: list[Program]) -> None:
    program = Program(tmp_path, "exit_at=2")
    programs.append(program)
    eventually(lambda: program.get("/health"))
    body = json.dumps({"prompt": "x", "stream": True}).encode()
    with pytest.raises((OSError, http.client.HTTPException)), program.open("/v1/completions", body) as reply:
        reply.read()
    assert program.finish()[0] == 139
