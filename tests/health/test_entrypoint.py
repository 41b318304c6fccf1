"""entrypoint.sh as it is, in a folder where a small real program stands in for the gateway."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.health.support import Reply, ask, connect, free_port, is_alive, kill_quietly, read_all
from tests.house import ROOT, eventually

GATEWAY = """
import json, os, sys, time
from pathlib import Path
print(json.dumps({"pid": os.getpid(), "argv": sys.argv[1:], "cwd": os.getcwd(), "env": dict(os.environ)}), flush=True)
if state := os.environ.get("STATE_FILE"):
    first = Path(state).read_text()
if "PUBLISH" in os.environ:
    time.sleep(0.5)
    Path(state).write_text(json.dumps({"status": "ready", "first": json.loads(first), "heartbeat": time.monotonic()}))
time.sleep(float(os.environ.get("LIFE", "0")))
sys.exit(7)
"""


class Boot:
    """One run of the entrypoint; `told` is what the gateway found when it was started."""

    def __init__(self, here: Path, cwd: Path, *arguments: str, **env: str) -> None:
        base = {"PATH": os.environ["PATH"], "DATA_DIR": str(cwd / "data"), "HOME": "/nonexistent", "TMPDIR": str(cwd)}
        self.process = subprocess.Popen(
            [str(here / "entrypoint.sh"), *arguments],
            env={name: value for name, value in (base | env).items() if value != "unset"},
            cwd=cwd,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def told(self) -> Any:
        assert self.process.stdout is not None
        return json.loads(self.process.stdout.readline())

    def finish(self) -> tuple[int, str, str]:
        out, err = self.process.communicate(timeout=8)
        return self.process.returncode, out, err

    def end(self) -> None:
        for pid in children(self.process.pid):
            state = re.search(r"STATE_FILE=(/[^\0]+/corral\.\w+)/", Path(f"/proc/{pid}/environ").read_text())
            kill_quietly(pid)
            if state:
                shutil.rmtree(state[1], ignore_errors=True)
        kill_quietly(self.process.pid)
        self.process.wait()
        for pipe in (self.process.stdout, self.process.stderr):
            if pipe is not None:
                pipe.close()


def children(pid: int) -> list[int]:
    try:
        return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except FileNotFoundError:
        return []


class Stage:
    def __init__(self, tmp_path: Path) -> None:
        self.here = tmp_path / "app with space"
        self.cwd = tmp_path / "cwd"
        self.port = free_port()
        self.boots: list[Boot] = []
        (self.here / "gateway").mkdir(parents=True)
        self.cwd.mkdir()
        (self.here / "gateway" / "__init__.py").touch()
        (self.here / "gateway" / "__main__.py").write_text(GATEWAY)
        shutil.copy(ROOT / "entrypoint.sh", self.here)
        (self.here / "health").symlink_to(ROOT / "health")
        (self.here / ".venv").symlink_to(sys.prefix)

    def boot(self, *arguments: str, **env: str) -> Boot:
        boot = Boot(self.here, self.cwd, *arguments, **{"PORT_HEALTH": str(self.port)} | env)
        self.boots.append(boot)
        return boot

    def logs(self) -> Path:
        return self.cwd / "data" / "logs" / "_boot"


@pytest.fixture
def stage(tmp_path: Path) -> Iterator[Stage]:
    stage = Stage(tmp_path)
    yield stage
    for boot in stage.boots:
        boot.end()


def refused(port: int) -> bool:
    try:
        connect(port).close()
    except ConnectionRefusedError:
        return True
    return False


def test_health_answers_at_once_lives_with_the_gateway_and_cleans_up(stage: Stage) -> None:
    boot = stage.boot(LIFE="1.5", PUBLISH="1")
    reply = eventually(lambda: ask(stage.port))
    assert reply.status == 204
    told = boot.told()
    assert told["argv"] == ["serve"] and told["cwd"] == str(stage.cwd)
    assert told["pid"] == boot.process.pid
    # Of the 0.1 s that are promised: its own time, as the clock on the wall depends on who else is on this machine.
    (health,) = children(told["pid"])
    ticks = Path(f"/proc/{health}/stat").read_text().rpartition(")")[2].split()[11:13]
    assert sum(map(int, ticks)) / os.sysconf("SC_CLK_TCK") < 0.1
    private = Path(told["env"]["STATE_FILE"]).parent
    assert private.stat().st_mode & 0o777 == 0o700
    eventually(lambda: ask(stage.port).status == 200)
    first = ask(stage.port, "/status").json()["first"]
    assert first["status"] == "starting" and abs(first["since"] - time.time()) < 10
    code, _, err = boot.finish()
    assert code == 7
    assert "Traceback" not in err
    eventually(lambda: refused(stage.port), 1.0)
    eventually(lambda: not private.exists(), 1.0)


def test_a_gateway_killed_hard_takes_the_health_server_with_it(stage: Stage) -> None:
    boot = stage.boot(LIFE="30")
    told = boot.told()
    (health,) = eventually(lambda: children(told["pid"]))
    eventually(lambda: ask(stage.port).status == 204)
    os.kill(told["pid"], signal.SIGKILL)
    boot.process.wait()
    eventually(lambda: not is_alive(health), 1.0)


def test_a_state_file_that_was_named_is_used_and_kept(stage: Stage, tmp_path: Path) -> None:
    state = tmp_path / "state.json"
    state.write_text('{"status": "ready", "heartbeat": %d}' % time.monotonic())  # noqa: UP031 - braces
    boot = stage.boot(STATE_FILE=str(state), LIFE="0.6")
    assert eventually(lambda: ask(stage.port)).status == 204
    assert boot.told()["env"]["STATE_FILE"] == str(state)
    boot.finish()
    eventually(lambda: refused(stage.port))
    assert json.loads(state.read_text())["status"] == "starting"


def test_a_state_file_that_cannot_be_written_stops_nothing(stage: Stage) -> None:
    boot = stage.boot(STATE_FILE="/proc/nope/state.json")
    code, _, err = boot.finish()
    assert code == 1 and "STATE_FILE" in err  # the 1 is the stand-in's, which was reached and insists on reading it


@pytest.mark.parametrize(
    ("env", "serves"),
    [
        ({"PORT": "HEALTH"}, False),
        ({"GATEWAY_PORT": "HEALTH"}, False),
        ({"GATEWAY_PORT": "HEALTH", "PORT": "8000"}, True),
        ({"PORT": " HEALTH "}, False),
        ({"PORT": "0HEALTH"}, False),
        ({"PORT": "HEALTH", "PORT_HEALTH": "\tHEALTH "}, False),
        ({"PORT": "a[$(touch pwned)]"}, True),
        ({"PORT_HEALTH": "", "RUNPOD_POD_ID": "x"}, False),
        ({"PORT_HEALTH": "unset", "RUNPOD_ENDPOINT_ID": "x"}, False),
        ({"RUNPOD_ENDPOINT_ID": "x"}, True),
        # A worker listens nowhere, so that port is free for the health server.
        ({"PORT": "HEALTH", "WORKER_MODE": "nats"}, True),
        ({"PORT": "HEALTH", "PORT_HEALTH": "unset", "RUNPOD_ENDPOINT_ID": "x", "WORKER_MODE": "runpod"}, True),
    ],
)
def test_when_a_health_server_is_started(stage: Stage, env: dict[str, str], serves: bool) -> None:
    env = {name: value.replace("HEALTH", str(stage.port)) for name, value in env.items()}
    told = stage.boot(LIFE="5", **env).told()
    assert len(children(told["pid"])) == int(serves)
    assert ("STATE_FILE" in told["env"]) is serves
    assert not (stage.cwd / "pwned").exists()


def test_the_health_port_may_have_spaces_and_noughts(stage: Stage) -> None:
    stage.boot(LIFE="5", PORT_HEALTH=f" 00{stage.port} ").told()
    assert eventually(lambda: ask(stage.port)).status == 204


@pytest.mark.parametrize(
    ("mode", "command"), [("http", ["serve"]), ("nats", ["worker", "nats"]), ("RunPod", ["worker", "runpod"])]
)
def test_worker_mode(stage: Stage, mode: str, command: list[str]) -> None:
    assert stage.boot(WORKER_MODE=mode).told()["argv"] == command


def test_an_unknown_worker_mode(stage: Stage) -> None:
    code, out, err = stage.boot(WORKER_MODE="grpc").finish()
    assert (code, out) == (2, "")
    assert err == "WORKER_MODE='grpc': must be one of http, nats, runpod\n"
    assert refused(stage.port)


def test_arguments_go_to_the_gateway_without_a_health_server(stage: Stage) -> None:
    boot = stage.boot("keys", "generate", "--name", "two words", LIFE="5", WORKER_MODE="whatever")
    told = boot.told()
    assert told["argv"] == ["keys", "generate", "--name", "two words"]
    assert children(told["pid"]) == [] and not stage.logs().exists()


def test_values_in_dotenv(stage: Stage) -> None:
    lines = [
        "# a comment",
        f'export PORT_HEALTH="{stage.port}"',
        "  HEALTH_MODE = liveness   # quiet",
        "WORKER_MODE='nats'",
        f"DATA_DIR={stage.cwd}/from-dotenv",
        "LOG_FORMAT=json\r",
        "HOST=203.0.113.7",
        "PORT=$(touch pwned)",
        "garbage",
        "EMPTY=",
    ]
    (stage.cwd / ".env").write_text("\n".join(lines))
    boot = stage.boot(PORT_HEALTH="unset", DATA_DIR="unset", HOST="127.0.0.1", LIFE="0.6")
    told = boot.told()
    assert told["argv"] == ["worker", "nats"]
    assert told["env"]["DATA_DIR"] == f"{stage.cwd}/from-dotenv"
    assert eventually(lambda: ask(stage.port)).status == 200  # HEALTH_MODE came through; HOST is the real one
    _, _, err = boot.finish()
    first = json.loads(err.splitlines()[0])
    assert first["level"] == "info" and "worker nats" in first["message"]
    assert not (stage.cwd / "pwned").exists()
    for name in ("PORT", "WORKER_MODE", "HEALTH_MODE", "EMPTY"):
        assert name not in told["env"], "the gateway reads .env by itself"


def test_a_real_variable_wins_over_dotenv_even_when_empty(stage: Stage) -> None:
    (stage.cwd / ".env").write_text("WORKER_MODE=nats\nDATA_DIR=/from-dotenv\n")
    told = stage.boot(WORKER_MODE="").told()
    assert told["argv"] == ["serve"] and told["env"]["DATA_DIR"] == str(stage.cwd / "data")


def test_boot_log(stage: Stage) -> None:
    stage.logs().mkdir(parents=True)
    for number in range(120):
        (stage.logs() / f"20010101_{number:06}_boot_old.log").touch()
    boot = stage.boot(RUNPOD_POD_ID="pod/../1")
    _, _, err = boot.finish()
    name = (stage.logs() / "latest.txt").read_text().strip()
    assert re.fullmatch(r"\d{8}_\d{6}_boot_pod----1\.log", name)
    assert (stage.logs() / name).read_text() == err
    assert re.match(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z INFO    boot: serve, ", err)
    assert len(list(stage.logs().glob("*.log"))) == 20


def test_a_data_dir_that_cannot_be_written_stops_nothing(stage: Stage) -> None:
    boot = stage.boot(DATA_DIR="/proc/nope")
    code, _, err = boot.finish()
    assert code == 7
    assert "no boot log" in err and "boot: serve" in err and "line " not in err


def test_a_folder_named_gateway_in_the_working_directory_is_not_ours(stage: Stage) -> None:
    (stage.cwd / "gateway").mkdir()
    (stage.cwd / "gateway" / "__main__.py").write_text("raise SystemExit('wrong one')")
    assert stage.boot().finish()[0] == 7


def test_it_may_be_called_through_a_link(stage: Stage, tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "entrypoint.sh").symlink_to(stage.here / "entrypoint.sh")
    boot = Boot(tmp_path / "bin", stage.cwd, PORT_HEALTH=str(stage.port))
    stage.boots.append(boot)
    assert boot.told()["argv"] == ["serve"]


def test_debug_shell_masks_secrets_and_holds_until_sigterm(stage: Stage) -> None:
    secrets = {
        "API_KEY": "sekret1",
        "HF_TOKEN": "sekret2",
        "my_password": "sekret3\nsekret3b",
        "REDIS_URL": "redis://:sekret4@host:6379/0",
        "NATS_URL": "nats://bob:sekret5@a:4222,nats://bob:sekret6@b:4222",
        "EXTRA_ARGS": "--threads 2 --api-key sekret7 --ctx 1",
        "AWS_SECRET_ACCESS": "sekret8",
        "NOTE": "use sk-alice-sekret9sekret9",
        "MODEL_URL": "https://host/x?token=sekret10&y=1",
        "GOOGLE_APPLICATION_CREDENTIALS": "sekret11",
    }
    plain = {"MODEL_NAME": "tiny.gguf", "AUTH_ENABLED": "false", "MULTI": "a\nb"}
    boot = stage.boot(DEBUG_SHELL="True", LIFE="0", **secrets, **plain)
    assert eventually(lambda: ask(stage.port)).status == 204
    assert boot.process.stderr is not None
    while "holding" not in boot.process.stderr.readline():
        pass
    begin = time.monotonic()
    boot.process.send_signal(signal.SIGTERM)
    code, out, _ = boot.finish()
    assert code == 0 and time.monotonic() - begin < 1.0
    assert "sekret" not in out and '"argv"' not in out
    for name in secrets:
        assert f"{name}=" in out
    for name, value in plain.items():
        assert f"{name}={value}\n" in out
    eventually(lambda: refused(stage.port), 1.0)


def test_a_signal_to_the_whole_group_leaves_the_health_server_answering(stage: Stage) -> None:
    (stage.here / "gateway" / "__main__.py").write_text(
        "import signal, time\nsignal.signal(signal.SIGINT, signal.SIG_IGN)\nprint('{}', flush=True)\ntime.sleep(30)"
    )
    boot = stage.boot()
    boot.told()
    eventually(lambda: ask(stage.port).status == 204)
    os.killpg(boot.process.pid, signal.SIGINT)
    with connect(stage.port) as sock:
        sock.sendall(b"GET /ping HTTP/1.0\r\n\r\n")
        assert Reply(read_all(sock)).status == 204


@pytest.mark.parametrize(
    ("folders", "expected"),
    [
        (["runpod-volume", "workspace", "data"], "/runpod-volume"),
        (["workspace", "data"], "/workspace"),
        (["data"], "/data"),
        ([], "/data"),
    ],
)
def test_platform_detection(stage: Stage, tmp_path: Path, folders: list[str], expected: str) -> None:
    """In a root of its own, made of mounts in a namespace."""
    if subprocess.run(["unshare", "-rm", "true"], capture_output=True).returncode != 0:
        assert not os.environ.get("CI"), "mount namespaces are needed: run as root"
        pytest.skip("no mount namespaces here")
    root = tmp_path / "root"
    root.mkdir()
    shared = {"/usr", "/etc", "/proc", "/dev", str(ROOT), str(stage.here), str(stage.cwd), sys.base_prefix, sys.prefix}
    script = [f"mount -t tmpfs t {root}", *(f"mkdir {root}/{name}" for name in folders)]
    script += [f"cp -d {link} {root}{link}" for link in ("/bin", "/lib", "/lib64") if Path(link).is_symlink()]
    script += [f"mkdir -p '{root}{path}'; mount --rbind '{path}' '{root}{path}'" for path in sorted(shared)]
    script.append(f"exec chroot {root} '{stage.here}/entrypoint.sh'")
    (stage.here / "inside.sh").write_text("set -e\n" + "\n".join(script))
    done = subprocess.run(
        ["unshare", "-rm", "--propagation", "private", "bash", str(stage.here / "inside.sh")],
        env={"PATH": os.environ["PATH"], "PORT": str(stage.port), "PORT_HEALTH": str(stage.port)},
        capture_output=True,
        text=True,
        timeout=8,
    )
    assert done.returncode == 7, done.stderr
    assert json.loads(done.stdout)["env"]["DATA_DIR"] == expected


def test_shellcheck() -> None:
    tool = Path(sys.prefix) / "bin" / "shellcheck"
    done = subprocess.run([tool, "-x", "entrypoint.sh"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert len((ROOT / "entrypoint.sh").read_text().splitlines()) < 120
