"""What the Dockerfiles make: small, closed, and the same twice."""

from __future__ import annotations

import json
import sys
from typing import Any

import pytest

from gateway import __version__
from tests.image.conftest import Images
from tests.image.engine import RUN, Engine

pytestmark = [pytest.mark.image, pytest.mark.timeout(300), pytest.mark.xdist_group("image")]

# Of all that is compiled, what would not load; of all that could be compiled, what is not.
INSPECT = """
import ctypes, importlib, importlib.util, json, pathlib, sys
broken, uncompiled, loaded = [], [], 0
site = pathlib.Path(sys.path[-1])
for file in site.glob("**/*.so"):
    name = ".".join(file.relative_to(site).parts).partition(".cpython-")[0].removesuffix(".abi3.so")
    try:
        if ".cpython-" in file.name or ".abi3." in file.name:
            importlib.import_module(name)
        else:
            ctypes.CDLL(str(file))  # an extension of SQLite's
    except (ImportError, OSError) as error:
        broken.append(f"{name}: {error}")
    loaded += 1
for place in (pathlib.Path("/opt/corral"), pathlib.Path(importlib.__file__).parents[1]):
    for file in place.glob("**/*.py"):
        if not pathlib.Path(importlib.util.cache_from_source(str(file))).exists():
            uncompiled.append(str(file))
print(json.dumps([loaded, broken, uncompiled]))
"""


@pytest.fixture(params=["cpu", "cuda"])
def image(request: pytest.FixtureRequest, images: Images) -> str:
    return str(getattr(images, request.param))


def python(engine: Engine, image: str, code: str) -> Any:
    run = ("run", *RUN, "--rm", "--health-interval", "disable", "--entrypoint", "/opt/corral/.venv/bin/python")
    return json.loads(engine.podman(*run, image, "-P", "-c", code))


def test_the_image_adds_less_than_120_mb(engine: Engine, images: Images, image: str) -> None:
    layers = json.loads(engine.podman("history", "--format", "json", image))
    base = len(json.loads(engine.podman("history", "--format", "json", images.base)))
    added = [layer["size"] for layer in layers[: len(layers) - base]]
    sizes = [f"{size / 1e6:.1f}" for size in added if size]
    sys.stdout.write(f"adds {sum(added) / 1e6:.1f} MB ({' + '.join(sizes)}), had in {images.seconds:.1f} s\n")
    assert 20e6 < sum(added) < 120e6


def test_its_description(engine: Engine, images: Images, image: str) -> None:
    found = engine.inspect(image)
    config = found["Config"]
    assert config["User"] == "10001:10001"
    assert config["Entrypoint"] == ["/usr/bin/tini", "-s", "--", "/opt/corral/entrypoint.sh"]
    assert not config.get("Cmd")
    assert set(config["ExposedPorts"]) == {"8000/tcp", "8001/tcp"}
    assert set(config["Volumes"]) == {"/data"}
    assert ("NGL=0" in config["Env"]) is ("CTX=4096" in config["Env"]) is (image == images.cpu)
    assert found["Healthcheck"]["Test"] == ["CMD", "/opt/corral/entrypoint.sh", "healthcheck"]
    labels = {name.removeprefix("org.opencontainers.image."): value for name, value in config["Labels"].items()}
    assert labels["title"] == "Corral" and labels["licenses"] == "MIT" and labels["version"] == __version__
    assert labels["base.name"].startswith("ghcr.io/ggml-org/llama.cpp:server")


def test_all_code_is_compiled_and_all_compiled_code_loads(engine: Engine, images: Images) -> None:
    """A read-only container could not keep what it compiles; and stripped libraries have to be whole."""
    loaded, broken, uncompiled = python(engine, images.cpu, INSPECT)
    assert loaded > 10 and broken == []
    assert uncompiled == []


def test_nothing_stays_that_only_the_build_needs(engine: Engine, images: Images) -> None:
    code = """
import json, pathlib, shutil
paths = ["/root/.cache", "/var/lib/apt/lists", "/opt/corral/requirements.lock"]
left = [str(child) for path in paths for child in pathlib.Path(path).glob("*") if pathlib.Path(path).exists()]
site = next(pathlib.Path("/opt/corral/.venv/lib").glob("python3*")) / "site-packages"
print(json.dumps({
    "tools": [tool for tool in ("pip", "pip3", "gcc", "cc", "strip", "make", "git") if shutil.which(tool)],
    "packages": [name for name in ("pip", "setuptools", "pytest", "mypy") if (site / name).exists()],
    "top": sorted(path.name for path in pathlib.Path("/opt/corral").iterdir()),
    "foreign": [str(path) for path in pathlib.Path("/opt/corral").rglob("*") if path.lstat().st_uid != 0],
    "writable": [
        str(path) for path in pathlib.Path("/opt/corral").rglob("*")
        if not path.is_symlink() and path.stat().st_mode & 0o022
    ],
    "left": left,
}))
"""
    run = ("run", *RUN, "--rm", "--health-interval", "disable", "--user", "0:0")
    found = json.loads(engine.podman(*run, "--entrypoint", "/opt/corral/.venv/bin/python", images.cpu, "-c", code))
    assert found == {
        "tools": [],
        "packages": [],
        "top": [".venv", "LICENSE", "entrypoint.sh", "gateway", "health"],
        "foreign": [],
        "writable": [],
        "left": [],
    }


def test_with_its_extra_the_image_has_runpods_sdk(engine: Engine, images: Images) -> None:
    with engine.locked():
        image = engine.build("Dockerfile.cpu", EXTRAS="runpod")
    code = """
import json, sys
sys.path.insert(0, "/opt/corral")
from gateway.workers.runpod.worker import load_sdk
print(json.dumps(load_sdk().jobs.get_job_count()))
"""
    assert python(engine, image, code) == 0
    assert engine.inspect(image)["Size"] - engine.inspect(images.cpu)["Size"] < 150e6
