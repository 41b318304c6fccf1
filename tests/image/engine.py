"""podman and buildah with a storage of their own: nothing that this machine keeps is seen or changed."""

from __future__ import annotations

import fcntl
import hashlib
import itertools
import json
import os
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.house import ROOT, USER, Gateway, eventually, free_port

CACHE = ROOT / ".cache" / "image-base"
TOOLS = ("podman", "buildah", "runc", "mmdebstrap")
# What the small virtual machines of continuous integration bear: the default limits and crun fail there.
RUN = ("--runtime", "runc", "--network", "host", "--ulimit", "nofile=20000:20000", "--ulimit", "nproc=20000:20000")

_numbers = itertools.count(1)


class Engine:
    """Runs podman and buildah as root. Raises EngineError with their words when they fail."""

    def __init__(self, cache: Path = CACHE) -> None:
        missing = [tool for tool in TOOLS if shutil.which(tool) is None]
        assert not missing, f"missing: {', '.join(missing)}; ./scripts/test installs them"
        assert os.geteuid() == 0, "containers need root here; leave them out by: ./scripts/test -m 'not image'"
        self.cache = cache
        self._temporary = cache / "tmp"
        self._temporary.mkdir(parents=True, exist_ok=True)
        # A storage knows its own path, so one that was moved is worthless.
        here = hashlib.sha256(bytes(cache)).hexdigest()[:8]
        self._storage = ("--root", str(cache / f"storage-{here}"), "--runroot", f"/run/corral-tests/{here}")

    @contextmanager
    def locked(self) -> Iterator[None]:
        """One session at a time makes the base and builds."""
        with (self.cache / "lock").open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def command(self, *arguments: str) -> list[str]:
        return ["podman", *self._storage, *arguments]

    def podman(self, *arguments: str) -> str:
        """What it printed."""
        return self._run(self.command(*arguments))

    def inspect(self, image: str) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.podman("image", "inspect", image))[0]
        return found

    def build(self, dockerfile: str, **arguments: str) -> str:
        """The id of the image. Layers are kept, so that a second build does only what has changed."""
        id_file = self._temporary / f"{dockerfile}.{os.getpid()}.id"
        options = ["--isolation=chroot", "--layers", "--format", "docker", "--pull-never", "--iidfile", str(id_file)]
        options += [f"--build-arg={name}={value}" for name, value in arguments.items()]
        self._run(["buildah", *self._storage, "bud", *options, "--file", dockerfile, "."])
        image = id_file.read_text().strip()
        id_file.unlink()
        return image

    def succeeds(self, *arguments: str) -> bool:
        return subprocess.run(self.command(*arguments), capture_output=True, check=False).returncode == 0

    def prune(self) -> None:
        """Drops the layers of builds that nobody has repeated for three days."""
        self.podman("image", "prune", "--force", "--filter", "until=72h")

    def _run(self, command: list[str]) -> str:
        environment = {**os.environ, "TMPDIR": str(self._temporary)}
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise EngineError(
                f"{' '.join(command)}: exit {done.returncode}\n{done.stdout[-4000:]}{done.stderr[-4000:]}"
            )
        return done.stdout


class EngineError(Exception):
    """podman or buildah failed."""


@dataclass
class Container(Gateway):
    """A gateway whose process is the `podman run` that shows its output and ends with its status."""

    engine: Engine
    name: str

    @property
    def port_health(self) -> int:
        return int(self.environment["PORT_HEALTH"] or self.environment["PORT"])

    def execute(self, *command: str) -> str:
        return self.engine.podman("exec", self.name, *command)

    def processes(self) -> dict[int, str]:
        """Name by the process id that it has outside."""
        lines = self.engine.podman("top", self.name, "hpid", "comm").splitlines()[1:]
        return {int(pid): name for pid, name in (line.split() for line in lines)}

    def ping(self) -> int:
        return self.at(self.port_health).get("/ping", key=None).status

    def at(self, port: int) -> Gateway:
        return Gateway(port, self.process, self.folder, self.environment)

    def wait_ping(self, status: int = 200, seconds: float = 30) -> None:
        def look() -> bool:
            assert self.process.poll() is None, f"the container has ended: {self.stderr}"
            return self.ping() == status

        eventually(look, seconds)

    def end(self) -> int:
        """`podman stop`; the container's exit status."""
        self.engine.podman("stop", "--time", "45", self.name)
        return self.process.wait(50)


@contextmanager
def running_container(
    engine: Engine,
    image: str,
    folder: Path,
    *flags: str,
    variables: Mapping[str, str] | None = None,
    ready: bool = True,
) -> Iterator[Container]:
    """A container on this machine's network, with further flags of `podman run`; USER is its key unless told otherwise.

    It is gone afterwards, with its anonymous volumes.
    """
    folder.mkdir(parents=True, exist_ok=True)
    environment = {
        "HOST": "127.0.0.1",
        "PORT": str(free_port()),
        "PORT_HEALTH": str(free_port()),
        "PORT_BACKEND": str(free_port()),
        "API_KEY": USER,
        "THREADS": "1",
    } | dict(variables or {})
    name = f"corral-{os.getpid()}-{next(_numbers)}"
    told = [part for key, value in environment.items() for part in ("--env", f"{key}={value}")]
    # Without a timer of systemd's; the tests run the check themselves.
    command = engine.command("run", *RUN, "--rm", "--name", name, "--health-interval", "disable", *told, *flags, image)
    with (folder / "stdout").open("wb") as out, (folder / "stderr").open("wb") as err:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=out, stderr=err)
    container = Container(int(environment["PORT"]), process, folder, environment, engine=engine, name=name)
    try:
        if ready:
            container.wait_ping()
        yield container
    finally:
        if process.poll() is None:
            engine.succeeds("kill", name)
            process.wait(20)
        engine.succeeds("rm", "--force", "--volumes", name)


def bind(source: Path, target: str, *options: str) -> tuple[str, str]:
    return "--volume", ":".join((str(source), target, *options))


def model(path: Path) -> tuple[str, str]:
    return bind(path, f"/data/models/{path.name}", "ro")
