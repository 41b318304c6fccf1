"""`corral models` against running gateways: as a script reads it, and as a person at a terminal sees it."""

from __future__ import annotations

import contextlib
import errno
import io
import json
import os
import pty
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from gateway.cli import main
from tests.house import ADMIN, ROOT, USER, Gateway, eventually, free_port, running_gateway
from tests.real.status_kit import LIMITED, MODELS, make_cold, running_herd

pytestmark = pytest.mark.real


@pytest.fixture(scope="module")
def herd(tmp_path_factory: pytest.TempPathFactory, chat_model: Path, embedding_model: Path) -> Iterator[Gateway]:
    with running_herd(tmp_path_factory.mktemp("herd"), chat_model, embedding_model) as gateway:
        yield gateway


def environment(gateway: Gateway, key: str) -> dict[str, str]:
    return {"PYTHONPATH": str(ROOT), "COLUMNS": "200", "CORRAL_URL": gateway.url, "CORRAL_API_KEY": key}


@dataclass
class Done:
    code: int
    out: str
    err: str

    @property
    def rows(self) -> dict[str, list[str]]:
        """The table's rows by their first cell."""
        table = self.out.rpartition("\n\n")[2]
        return {cells[0]: cells for line in table.splitlines()[1:] if (cells := re.split(r" {2,}", line.strip()))}


def corral(gateway: Gateway, *argv: str, key: str = ADMIN, **variables: str) -> Done:
    """The command in this process, with nothing of our environment: a process of its own costs half a second."""
    out, err = io.StringIO(), io.StringIO()
    with (
        mock.patch.dict(os.environ, environment(gateway, key) | variables, clear=True),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        code = main(["models", *argv])
    return Done(code, out.getvalue(), err.getvalue())


# --- in a script


def test_list(herd: Gateway) -> None:
    make_cold(herd)
    assert corral(herd, "load", "a").code == 0
    done = corral(herd, "list")
    assert (done.code, done.err) == (0, "")
    titles, *_ = done.out.splitlines()
    assert titles.split() == "MODEL STATE SLOTS CONTEXT QUANT FAMILY ALIASES FILE".split()
    assert list(done.rows) == list(MODELS)
    file = str(herd.folder / "models" / "a.gguf")
    assert done.rows["a"] == ["a", "ready", "2", "1024", "F32", "llama", "-", file]
    assert done.rows["broken"][:6] == ["broken", "off", "-", "-", "-", "-"]
    rows = json.loads(corral(herd, "list", "--json", key=LIMITED).out)
    assert [row["id"] for row in rows] == ["b", "broken"]
    assert rows[0]["file"]["family"] == "llama"


def test_load_eject_reset(herd: Gateway) -> None:
    make_cold(herd)
    done = corral(herd, "load", "a", "c d")
    assert (done.code, done.err) == (0, "")
    assert re.search(r"^a: loading$", done.out, re.MULTILINE)
    assert re.search(r"^a: ready in \d\.\d\d s$", done.out, re.MULTILINE)
    assert re.search(r"^c d: ready in \d\.\d\d s$", done.out, re.MULTILINE)
    assert "\x1b" not in done.out and "\r" not in done.out
    assert corral(herd, "load", "a").out == "a: ready already\n"
    (told,) = json.loads(corral(herd, "load", "a", "--json").out)
    assert (told["model"], told["status"]) == ("a", "ready")
    assert corral(herd, "eject", "a", "--force").out == "a: off\n"
    assert herd.get("/v1/models/a/status").json()["status"] == "off"
    assert corral(herd, "reset", "c d").out == "c d: ready\n"


def test_load_without_waiting(herd: Gateway) -> None:
    make_cold(herd)
    done = corral(herd, "load", "b", "--no-wait")
    assert (done.code, done.err, done.out.startswith("b: ")) == (0, "", True)
    eventually(lambda: herd.get("/v1/models/b/status").json()["status"] == "ready")


def test_a_load_that_fails(herd: Gateway) -> None:
    make_cold(herd)
    done = corral(herd, "load", "broken", "none", "b")
    assert done.code == 1
    assert "b: ready in" in done.out, "the others are loaded nevertheless"
    first, second = done.err.splitlines()
    assert first.startswith("corral models: broken: llama-server exited with status 1")
    assert second == "corral models: the model 'none' does not exist; there are: a, b, broken, c d, embed"
    told = json.loads(corral(herd, "load", "none", "a", "--json").out)
    assert (told[0]["code"], told[1]["status"]) == ("model_not_found", "ready")


def test_what_has_failed_is_loaded_anew(herd: Gateway) -> None:
    make_cold(herd)
    path = herd.folder / "models" / "broken.gguf"
    broken = path.read_bytes()
    assert herd.chat(model="broken").status == 503
    assert herd.get("/v1/models/broken/status").json()["status"] == "failed"
    again = corral(herd, "load", "broken")
    assert (again.code, again.err.count("\n")) == (1, 1) and "broken: llama-server exited" in again.err
    assert herd.chat(model="broken").status == 503
    try:
        path.write_bytes((herd.folder / "models" / "a.gguf").read_bytes())
        mended = corral(herd, "load", "broken")
        assert (mended.code, mended.err) == (0, "") and "broken: ready in" in mended.out
    finally:
        path.write_bytes(broken)


def test_status(herd: Gateway) -> None:
    make_cold(herd)
    assert herd.chat(model="a").status == 200
    assert corral(herd, "load", "broken").code == 1
    done = corral(herd, "status")
    assert (done.code, done.err) == (0, "")
    assert done.out.startswith(f"{herd.url} is ready, up since 20")
    assert list(done.rows) == list(MODELS)
    name, state, running, waiting, size, used, why = done.rows["a"]
    assert (name, state, running, waiting, why) == ("a", "ready", "0", "0", "-")
    assert int(size) > 0 and re.fullmatch(r"\d+ s ago", used)
    assert done.rows["b"] == ["b", "off", "0", "0", "-", "-", "-"] or done.rows["b"][5].endswith(" ago")
    assert done.rows["broken"][1] in ("crashed", "failed") and "exited" in done.rows["broken"][6]
    assert list(corral(herd, "status", "c d", "b").rows) == ["b", "c d"]
    told = json.loads(corral(herd, "status", "b", "--json").out)
    assert list(told["models"]) == ["b"] and told["server"]["status"] == "ready"


def test_test(herd: Gateway) -> None:
    make_cold(herd)
    done = corral(herd, "test")
    assert (done.code, done.err) == (1, "")
    assert done.out.splitlines()[0].split() == ["MODEL", "OK", "SECONDS", "TOKENS/S", "ERROR"]
    assert list(done.rows) == list(MODELS)
    for name in ("a", "b", "c d"):
        _, ok, seconds, speed, error = done.rows[name]
        assert (ok, error) == ("yes", "-") and float(seconds) < 10 and float(speed) > 10
    assert done.rows["embed"][1] == "yes" and done.rows["embed"][3:] == ["-", "-"]
    assert done.rows["broken"][1] == "no" and done.rows["broken"][4].startswith(
        "broken has failed: llama-server exited"
    )
    well = corral(herd, "test", "embed", "a", "--json")
    assert well.code == 0
    assert [(row["model"], row["ok"], row["error"]) for row in json.loads(well.out)] == [
        ("embed", True, None),
        ("a", True, None),
    ]


@pytest.mark.parametrize(
    ("argv", "key", "code", "says"),
    [
        (("eject", "a"), USER, 1, "lacks the scope admin, which this route needs; use a key with scope=admin"),
        (("load", "a"), USER, 1, "use a key with scope=admin"),
        (("list",), "sk-wrong-key-0123456789", 1, "set --key or CORRAL_API_KEY"),
        (("list",), "", 1, "set --key or CORRAL_API_KEY"),
        (("status", "embed"), LIMITED, 1, "the model 'embed' does not exist; there are: b, broken"),
        (("test", "none"), USER, 1, "the model 'none' does not exist"),
        (("list", "--key", "ключ"), USER, 2, "characters that no key has"),
        (("list", "--url", "ftp://x"), USER, 2, "'ftp://x' is no URL of a gateway"),
        (("list", "--url", "http://127.0.0.1:99999"), USER, 2, "is no URL of a gateway"),
        (
            ("status", "--watch", "--url", "http://127.0.0.1:1"),
            USER,
            1,
            "no gateway at http://127.0.0.1:1: is it running?",
        ),
        (("list", "--url", "http://no.such.host.invalid"), USER, 1, "no.such.host.invalid"),
    ],
)
def test_what_is_wrong_is_told_in_one_line(
    herd: Gateway, argv: tuple[str, ...], key: str, code: int, says: str
) -> None:
    done = corral(herd, *argv, key=key)
    assert (done.code, done.out, done.err.count("\n")) == (code, "", 1)
    assert done.err.startswith("corral models: ") and says in done.err


def test_which_gateway_is_meant(herd: Gateway) -> None:
    """--url, then CORRAL_URL, then this machine's PORT."""
    elsewhere = f"http://127.0.0.1:{free_port()}"
    assert corral(herd, "list", "--url", f"{herd.url}/v1/", CORRAL_URL=elsewhere).code == 0
    assert corral(herd, "--url", f"127.0.0.1:{herd.port}", "list", CORRAL_URL=elsewhere).code == 0
    assert corral(herd, "list", CORRAL_URL="", PORT=str(herd.port)).code == 0
    assert f"no gateway at {elsewhere}:" in corral(herd, "list", CORRAL_URL=elsewhere, PORT=str(herd.port)).err
    assert corral(herd, "list", "--key", USER, key="sk-wrong-key-0123456789").code == 0


def test_a_single_model(tmp_path: Path, chat_model: Path) -> None:
    with running_gateway(tmp_path, MODEL_PATH=str(chat_model)) as gateway:
        assert corral(gateway, "list", key=USER).rows["tiny"][1] == "ready"
        assert corral(gateway, "status", key=USER).rows["tiny"][1] == "ready"
        assert corral(gateway, "test", key=USER).rows["tiny"][1] == "yes"


def test_a_model_that_never_fits(tmp_path: Path, slow_model: Path) -> None:
    """It is said with the numbers, and that the model is not broken."""
    (tmp_path / "models").mkdir()
    for name in ("big", "other"):
        (tmp_path / "models" / f"{name}.gguf").symlink_to(slow_model)
    variables = {"MODELS_DIR": str(tmp_path / "models"), "VRAM_BUDGET_MB": "50", "VRAM_MARGIN_MB": "0"}
    with running_gateway(tmp_path, variables) as gateway:
        done = corral(gateway, "load", "big")
        assert (done.code, done.err.count("\n")) == (1, 1)
        assert re.match(r"corral models: big needs \d+ MiB of the 50 MiB that models may use", done.err)
        assert corral(gateway, "status", "big").rows["big"][1] == "off"


def test_a_load_that_has_to_wait(tmp_path: Path, slow_model: Path, chat_model: Path) -> None:
    """Room for one, and that one is at work: the bar says what it waits for."""
    models = {"busy": {"model_path": str(slow_model)}, "next": {"model_path": str(chat_model)}}
    (tmp_path / "models.json").write_text(json.dumps({"system": {"max_concurrent_models": 1}, "models": models}))
    with running_gateway(tmp_path, CONFIG_PATH=str(tmp_path / "models.json"), CTX="1024", PARALLEL="1") as gateway:
        assert corral(gateway, "load", "busy").code == 0
        stream = threading.Thread(target=lambda: gateway.chat(model="busy", max_tokens=300, stream=True))
        stream.start()
        eventually(lambda: corral(gateway, "status").rows["busy"][2] == "1")
        done = corral(gateway, "load", "next")
        stream.join()
    assert (done.code, done.err) == (0, "")
    lines = done.out.splitlines()
    assert re.match(r"next: \w+: waits for .*, until busy ", lines[0]) and "ready in" in lines[-1]


# --- followed


@dataclass
class Watch:
    """A `corral models` that goes on; what it has written comes in as it is looked at."""

    process: subprocess.Popen[bytes]
    source: int
    seen: bytearray = field(default_factory=bytearray)

    def look(self) -> str:
        with contextlib.suppress(BlockingIOError):
            try:
                while more := os.read(self.source, 1 << 16):
                    self.seen += more
            except OSError as error:
                if error.errno != errno.EIO:  # the terminal's other end is closed
                    raise
        return self.seen.decode(errors="replace")

    def until(self, text: str) -> str:
        return eventually(lambda: told if text in (told := self.look()) else False)

    def interrupt(self) -> int:
        self.process.send_signal(signal.SIGINT)
        code = self.process.wait(5)
        self.look()
        return code


@contextlib.contextmanager
def started(gateway: Gateway, *argv: str, terminal: bool = False) -> Iterator[Watch]:
    command = [sys.executable, "-m", "gateway", "models", *argv]
    source, target = pty.openpty() if terminal else os.pipe()
    os.set_blocking(source, False)
    with (gateway.folder / "watch.err").open("wb") as err:
        process = subprocess.Popen(
            command, cwd=gateway.folder, env=environment(gateway, ADMIN), stdout=target, stderr=err, stdin=target
        )
    os.close(target)
    try:
        yield Watch(process, source)
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
        os.close(source)
    assert (gateway.folder / "watch.err").read_text() == ""


def test_watch_in_a_pipe(herd: Gateway) -> None:
    make_cold(herd)
    with started(herd, "status", "--watch") as watch:
        watch.until("embed is off\n")
        assert corral(herd, "load", "a").code == 0
        watch.until(" a is ready\n")
        assert corral(herd, "load", "broken").code == 1
        told = watch.until(" broken is crashed: llama-server exited")
        assert watch.interrupt() == 0
    lines = [line.partition(" ") for line in told.splitlines()]
    assert all(re.fullmatch(r"\d\d:\d\d:\d\d", at) for at, _, _ in lines)
    said = [text for _, _, text in lines]
    assert said[0] == "the gateway is ready"
    assert said[1:6] == [f"{name} is off" for name in MODELS]
    assert said.index("a is loading") < said.index("a is ready")
    assert "\x1b" not in told


def test_watch_of_some_models(herd: Gateway) -> None:
    make_cold(herd)
    with started(herd, "status", "b", "--watch", "--json") as watch:
        watch.until("full_status")
        assert corral(herd, "load", "a", "b").code == 0
        told = watch.until('"status": "ready", "port"')
        assert watch.interrupt() == 0
    events = [json.loads(line) for line in told.splitlines()]
    updates: list[Any] = [event["data"] for event in events if event["event"] == "model_update"]
    assert {row["id"] for row in updates} == {"b"}


def test_watch_on_a_terminal(herd: Gateway) -> None:
    make_cold(herd)
    with started(herd, "status", "--watch", terminal=True) as watch:
        watch.until("embed")
        assert corral(herd, "load", "a").code == 0
        eventually(lambda: re.search(r"^a +ready", watch.look(), re.MULTILINE) or False)
        assert watch.interrupt() == 0
        told = watch.look()
    assert told.startswith("\x1b[?1049h\x1b[?25l")
    screen, back, rest = told.rpartition("\x1b[?25h\x1b[?1049l")
    assert back, "the terminal is as it was"
    assert screen.count("\x1b[H") >= 3, "it is drawn anew for each change"
    assert re.search(r"^a +ready", rest, re.MULTILINE), "and the last picture stays"


def test_watch_goes_on_when_the_gateway_comes_back(tmp_path: Path, chat_model: Path) -> None:
    port = str(free_port())
    with running_gateway(tmp_path, MODEL_PATH=str(chat_model), PORT=port) as gateway:
        with started(gateway, "status", "--watch") as watch:
            watch.until("tiny is ready")
            assert gateway.stop() == 0
            watch.until("connection lost: no gateway at")
            already = watch.look().count("tiny is ready")
            with running_gateway(tmp_path, MODEL_PATH=str(chat_model), PORT=port):
                eventually(lambda: watch.look().count("the gateway is ready") == 2)
                assert already == 1
                assert watch.interrupt() == 0


def test_a_bar_while_it_loads(herd: Gateway) -> None:
    make_cold(herd)
    with started(herd, "load", "a", terminal=True) as watch:
        told = watch.until("ready in")
        assert watch.process.wait(5) == 0
    assert re.search(r"\ra  \[[#.]{24}\]  (starting|loading).* s\x1b\[K", told)
    assert re.search(r"\r\x1b\[Ka: ready in \d+\.\d\d s\r\n$", told)
