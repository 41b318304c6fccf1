"""Gives `./scripts/run` what it lacks – a llama-server, a model, a key – and becomes ./entrypoint.sh.

What the environment, `.env` or the models file says stays as it is; only what is missing is added.
"""

import dataclasses
import itertools
import json
import os
import shlex
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Container, Iterable, MutableMapping
from pathlib import Path

from gateway.environment import load_settings, models_files_in, read_settings
from gateway.errors import ConfigError
from gateway.models.configured.file import ModelsFile, find_models_file, read_models_file
from gateway.settings import Settings
from gateway.stores.keys import hashes
from gateway.stores.keys import io as keyio
from gateway.stores.keys.file import KeyFile, Line
from scripts import fetch_llama_server

ROOT = Path(__file__).resolve().parent.parent
CACHE = ROOT / ".cache"
DEMO = "demo"
GPUS = ("/dev/nvidia0", "/dev/kfd", "/dev/dxg")


def main() -> int:
    try:
        settings = prepare(os.environ)
        key = curl_key(settings)
    except (ConfigError, fetch_llama_server.NoServer, CannotRun) as problem:
        print(f"corral: {problem}", file=sys.stderr)
        return 1
    if settings.worker_mode == "http":
        announce_when_ready(settings, key)
    os.execv(ROOT / "entrypoint.sh", ["./entrypoint.sh"])


class CannotRun(Exception):
    """Something is in the way; the message has the mend."""


def prepare(environ: MutableMapping[str, str]) -> Settings:
    """Completes the environment that the gateway will inherit, and returns the settings that result."""
    if "DATA_DIR" not in load(environ).explicit:
        environ["DATA_DIR"] = str(CACHE / "data")
    settings = load(environ)
    refuse_taken_ports(settings)
    if not settings.llama_url and not settings.llama_server_path:
        server = fetch_llama_server.find(environ) or fetch_llama_server.fetch(fetch_llama_server.CACHE)
        environ["LLAMA_SERVER_PATH"] = str(server)
    if not names_a_model(settings):
        environ["MODEL_PATH"] = str(demo_model())
    if sys.platform == "linux" and not any(Path(gpu).exists() for gpu in GPUS):
        for name, value in (("NGL", "0"), ("CTX", "4096")):
            if name not in settings.explicit:
                environ[name] = value
    return load(environ)


def load(environ: MutableMapping[str, str]) -> Settings:
    """The settings as the gateway will see them, those of a models file included."""
    settings = load_settings(environ)
    try:
        if settings.config_path and "CONFIG_PATH" in settings.explicit:
            found: ModelsFile | None = read_models_file(settings.config_path)
        else:
            found, _ = find_models_file(models_files_in(settings.data_dir))
    except (ConfigError, OSError):
        return settings  # the gateway will say what is wrong
    if found is None:
        return dataclasses.replace(settings, config_path=None)
    return dataclasses.replace(read_settings(environ, file=found.content)[0], config_path=found.path)


def names_a_model(settings: Settings) -> bool:
    return bool(
        settings.named_model
        or settings.config_path
        or "MODELS_DIR" in settings.explicit
        or next(settings.models_dir.glob("**/*.gguf"), None)
    )


def refuse_taken_ports(settings: Settings) -> None:
    """Waits a little for what an earlier run may be about to give back."""
    last_look = time.monotonic() + 3
    for name, port in {"PORT": settings.port, "PORT_HEALTH": settings.port_health}.items():
        while reason := why_taken(settings.host, port):
            if time.monotonic() > last_look:
                mend = f"End what listens there, or choose another port: {name}=… ./scripts/run"
                raise CannotRun(f"cannot listen on {settings.host}:{port}: {reason}. {mend}")
            time.sleep(0.05)


def why_taken(host: str, port: int) -> str | None:
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as problem:
            return problem.strerror or str(problem)
    return None


def demo_model() -> Path:
    """The demo model, made again when the script that makes it is newer."""
    model, maker = CACHE / "models" / "demo.gguf", ROOT / "scripts" / "make_model.py"
    if not model.exists() or model.stat().st_mtime < maker.stat().st_mtime:
        subprocess.run(["bash", "-c", "set -eu; . scripts/setup.sh; gguf_package"], cwd=ROOT, check=True)
        subprocess.run([sys.executable, "-P", "-m", "scripts.make_model", "--out", str(model)], check=True)
    say("serving the demo model: its weights are random, and its answers random words.")
    say("a real one: MODEL_PATH=/path/to/model.gguf ./scripts/run")
    return model


def curl_key(settings: Settings) -> str | None:
    """What stands for the key in the curl command; makes one if there is none. None: no key is asked for."""
    if not settings.auth_enabled:
        return None
    keys, secret = settings.auth_keys_file.absolute(), settings.data_dir.absolute() / "demo.key"
    try:
        lines = KeyFile(keyio.read(keys)[0]).lines if keys.exists() else []
        usable = [line for line in lines if line.key and not line.key.expired(time.time())]
        if not opens(secret, usable):
            ours = secret.exists() and any(line.id == DEMO for line in usable)  # but it has another secret now
            if settings.api_key or (usable and not ours):
                say("the curl command below wants one of your keys in CORRAL_API_KEY.")
                return "$CORRAL_API_KEY"
            make_key(free_name({line.id for line in lines}), keys, secret)
    except OSError as problem:
        mend = "Mend it, or name another file or folder: AUTH_KEYS_FILE=… DATA_DIR=… ./scripts/run"
        raise CannotRun(f"{problem.filename or keys}: {problem.strerror or problem}. {mend}") from None
    return f"$(cat {shlex.quote(str(secret))})"


def opens(secret: Path, usable: Iterable[Line]) -> bool:
    """Whether this file has the secret, a generated one, of one of these keys that may chat."""
    text = secret.read_text(errors="replace").strip() if secret.exists() else ""
    fast = [line.stored for line in usable if line.key and line.key.has("infer") and not hashes.is_slow(line.stored)]
    return any(hashes.matches(stored, text) for stored in fast)


def free_name(taken: Container[str | None]) -> str:
    """Lines that are there stay as they are: somebody may use a `demo` that got another secret."""
    names = itertools.chain([DEMO], (f"{DEMO}-{number}" for number in itertools.count(2)))
    return next(name for name in names if name not in taken)


def make_key(name: str, keys: Path, secret: Path) -> None:
    command: list[str | Path] = [ROOT / ".venv" / "bin" / "corral", "keys", "generate", "--name", name]
    command += ["--file", keys, "--quiet"]
    keys.parent.mkdir(parents=True, exist_ok=True)
    secret.parent.mkdir(parents=True, exist_ok=True)
    made = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if made.returncode != 0:
        raise CannotRun(f"no key could be made in {keys}; see above.")
    secret.unlink(missing_ok=True)
    secret.touch(mode=0o600)
    secret.write_text(made.stdout)
    say(f"made the key `{name}` in {keys}; it lies in {secret}")


def announce_when_ready(settings: Settings, key: str | None) -> None:
    """Leaves a process behind that prints the curl command; forked twice, so that it is no child of the gateway's."""
    gateway = os.getpid()
    if child := os.fork():
        os.waitpid(child, 0)
        return
    os.setsid()
    if os.fork() == 0:
        try:
            announce(settings, key, gateway)
        except OSError:
            pass  # nobody reads our output any more
    os._exit(0)


def announce(settings: Settings, key: str | None, gateway: int) -> None:
    host = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(settings.host, settings.host)
    host = f"[{host}]" if ":" in host and not host.startswith("[") else host
    while not is_ready(f"http://{host}:{settings.port_health}/health"):
        os.kill(gateway, 0)  # raises when it is gone
        time.sleep(0.1)
    body = {"messages": [{"role": "user", "content": "Hello!"}], "max_tokens": 40}
    words = ["curl", f"http://{host}:{settings.port}/v1/chat/completions", "-H", "'Content-Type: application/json'"]
    words += ["-H", f'"Authorization: Bearer {key}"'] if key else []
    words += ["-d", shlex.quote(json.dumps(body))]
    print(f"\nTry it, in another terminal:\n  {' '.join(words)}\n", flush=True)


def is_ready(url: str) -> bool:
    """Asks where both the health server and, if it is on the same port, the gateway answer 200 only when ready."""
    try:
        with urllib.request.urlopen(url, timeout=2) as answer:
            return bool(answer.status == 200)
    except (urllib.error.URLError, OSError):
        return False


def say(message: str) -> None:
    print(f"corral: {message}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
