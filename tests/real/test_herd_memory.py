"""What a herd does about memory that nobody foretold: it asks first, remembers, and makes way once for who runs out."""

from __future__ import annotations

import json
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from tests.fake_llama import install
from tests.house import ADMIN, Gateway, alive, eventually, llama_server, running_gateway
from tests.real.herd import Stage, ask, children, herd, make_models, rows, stage, states, until
from tests.shapes import GEMMA, LLAMA

pytestmark = [pytest.mark.real, pytest.mark.timeout(60)]
MIB = 1 << 20
OOM = "allocating 4096.00 MiB on device 0: cudaMalloc failed: out of memory"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("herd")
    make_models(folder, 4)
    return folder


def vram(gateway: Gateway, model: str) -> dict[str, Any]:
    found: dict[str, Any] = next(row for row in gateway.get("/vram", key=ADMIN).json()["models"] if row["id"] == model)
    return found


def footprints(gateway: Gateway) -> list[dict[str, Any]]:
    return list(json.loads((gateway.data_dir / "footprints.json").read_text()).values())


def path_of(path: Path) -> dict[str, str]:
    return {"model_path": str(path)}


# --- running out


def out_of_memory_at_start(count: int, folder: Path) -> str:
    """Shell: the first `count` starts of x end as llama-server does for want of memory, and note who is alive."""
    return f"""
if [ "$model" = x ] && [ -z "$glance" ]; then
  for pid in $(cat {folder}/pid.a {folder}/pid.b 2>/dev/null); do kill -0 $pid 2>/dev/null && echo $pid; done > {folder}/alive
  n=$(cat {folder}/n 2>/dev/null || echo 0); echo $((n + 1)) > {folder}/n
  if [ $n -lt {count} ]; then echo "{OOM}"; exit 1; fi
fi
echo $$ > {folder}/pid.$model
"""  # noqa: E501


@pytest.fixture
def models(folder: Path) -> dict[str, dict[str, str]]:
    return {"a": path_of(folder / "m0.gguf"), "b": path_of(folder / "m1.gguf"), "x": path_of(folder / "m2.gguf")}


def test_one_more_goes_and_it_is_tried_once_more(tmp_path: Path, models: dict[str, Any]) -> None:
    slow_end = f"""{out_of_memory_at_start(1, tmp_path)}
if [ "$model" = a ] && [ -z "$glance" ]; then
  trap 'wait $child; sleep 0.6; exit 0' TERM
  {llama_server()} "$@" & child=$!
  wait $child
fi
"""
    staged = stage(tmp_path, llama_server(), slow_end)
    with herd(tmp_path, models, LLAMA_SERVER_PATH=str(staged.path)) as gateway:
        assert ask(gateway, "a").status == ask(gateway, "b").status == 200
        before = rows(gateway)
        assert ask(gateway, "x").status == 200
        after = rows(gateway)
        assert {name: row["state"] for name, row in after.items()} == {"a": "off", "b": "ready", "x": "ready"}
        assert after["b"]["pid"] == before["b"]["pid"], "only one has gone, the least recently used"
        still = (tmp_path / "alive").read_text().split()
        assert still == [str(before["b"]["pid"])], "it was not tried again before a had ended"
        assert staged.starts("x") == 2
        assert "a: x ran out of memory while it loaded" in gateway.stderr
        assert [one["raised"] for one in footprints(gateway)].count(1.25) == 1, "it is remembered"
        assert vram(gateway, "x")["measured_mb"] is not None


def test_a_second_time_is_a_refusal_with_the_numbers(tmp_path: Path, models: dict[str, Any]) -> None:
    staged = stage(tmp_path, llama_server(), out_of_memory_at_start(2, tmp_path))
    with herd(tmp_path, models, LLAMA_SERVER_PATH=str(staged.path)) as gateway:
        assert ask(gateway, "a").status == ask(gateway, "b").status == 200
        refused = ask(gateway, "x")
        error = refused.json()["error"]
        assert (refused.status, error["code"]) == (503, "insufficient_memory")
        assert "x needs " in error["message"] and " MiB" in error["message"] and "out of memory" in error["message"]
        assert int(refused.headers["retry-after"]) >= 1
        assert states(gateway) == {"a": "off", "b": "ready", "x": "off"}
        assert "out of memory" in gateway.get("/v1/models/x/status").json()["error_message"]
        assert max(one["raised"] for one in footprints(gateway)) == pytest.approx(1.25**2)
        assert ask(gateway, "x").status == 200, "it may fit another time"
        assert gateway.get("/v1/models/x/status").json()["error_message"] is None


def test_with_nobody_to_go_it_is_refused_at_once(tmp_path: Path, models: dict[str, Any]) -> None:
    models["a"]["pinned"] = True
    staged = stage(tmp_path, llama_server(), out_of_memory_at_start(9, tmp_path))
    with herd(tmp_path, models, LLAMA_SERVER_PATH=str(staged.path)) as gateway:
        assert ask(gateway, "a").status == 200
        refused = ask(gateway, "x")
        assert (refused.status, refused.json()["error"]["code"]) == (503, "insufficient_memory")
        assert staged.starts("x") == 1
        assert states(gateway) == {"a": "ready", "b": "off", "x": "off"}


def test_alone_it_is_started_again_and_has_failed_in_the_end(tmp_path: Path, folder: Path) -> None:
    fake = install(tmp_path, "oom")
    with running_gateway(
        tmp_path / "run", ready=False, MODEL_PATH=str(folder / "m0.gguf"), LLAMA_SERVER_PATH=str(fake)
    ) as gateway:
        health = eventually(lambda: (found := gateway.get("/health", key=None)).json()["state"] == "failed" and found)
        assert "out of memory" in health.json()["detail"]
        assert gateway.stderr.count("model.crashed") == 2


def test_a_real_want_of_memory(tmp_path: Path, folder: Path) -> None:
    """A limit on its address space stands for a machine that has less than it said."""
    large = LLAMA.build(tmp_path / "large.gguf")
    limit = f'if [ "$model" = large ]; then exec prlimit --as={400 * MIB} {llama_server()} "$@"; fi'
    staged = stage(tmp_path, llama_server(), limit)
    models = {"a": path_of(folder / "m0.gguf"), "large": path_of(large)}
    with herd(tmp_path, models, LLAMA_SERVER_PATH=str(staged.path)) as gateway:
        assert ask(gateway, "a").status == 200
        refused = ask(gateway, "large")
        error = refused.json()["error"]
        assert (refused.status, error["code"]) == (503, "insufficient_memory"), error
        assert "large needs " in error["message"]
        assert staged.starts("large") == 2
        assert states(gateway) == {"a": "off", "large": "off"}
        assert ask(gateway, "a").status == 200


# --- asking first


def test_the_first_start_asks_and_the_answer_is_remembered(tmp_path: Path, folder: Path) -> None:
    models = {"a": path_of(folder / "m0.gguf"), "b": path_of(folder / "m1.gguf")}
    staged = stage(tmp_path, llama_server())

    def counts() -> tuple[int, int]:
        return staged.starts("a", glances=True), staged.starts("a")

    with herd(tmp_path, models, LLAMA_SERVER_PATH=str(staged.path)) as gateway:
        assert ask(gateway, "a").status == 200
        assert counts() == (1, 1)
        row = vram(gateway, "a")
        assert row["measured_mb"] == row["predicted_mb"] > 0
        (known,) = footprints(gateway)
        assert known["buffers"]["RAM"] > 0 and known["load_seconds"] > 0
        gateway.request("POST", "/v1/models/eject", {"model": "a"}, key=ADMIN)
        assert ask(gateway, "a").status == 200
        assert counts() == (1, 2)
        booked = row["measured_mb"]
    with herd(tmp_path, models, LLAMA_SERVER_PATH=str(staged.path)) as gateway:
        assert ask(gateway, "a").status == 200
        assert counts() == (1, 3), "another gateway knows it from the file"
        assert vram(gateway, "a")["measured_mb"] == booked


def glancing(staged: Stage, model: str) -> bool:
    return staged.starts(model, glances=True) > 0


def test_one_that_does_not_answer_does_not_hold_up_the_load(tmp_path: Path, folder: Path) -> None:
    staged = stage(tmp_path, llama_server(), '[ -n "$glance" ] && [ "$model" = a ] && exec sleep 1000')
    models = {"a": path_of(folder / "m0.gguf"), "b": path_of(folder / "m1.gguf")}
    with (
        herd(tmp_path, models, LLAMA_SERVER_PATH=str(staged.path)) as gateway,
        ThreadPoolExecutor(1) as pool,
    ):
        begun = time.monotonic()
        asked = pool.submit(ask, gateway, "a")
        eventually(lambda: glancing(staged, "a"))
        assert ask(gateway, "b").status == 200, "others do not wait for it"
        assert not asked.done()
        assert asked.result().status == 200
        assert 4.9 < time.monotonic() - begun < 9
        gateway.request("POST", "/v1/models/eject", {"model": "a"}, key=ADMIN)
        begun = time.monotonic()
        assert ask(gateway, "a").status == 200
        assert time.monotonic() - begun < 4, "who did not answer is not asked again"


@pytest.mark.parametrize("how", ["eject", "stop"])
def test_who_is_asked_can_be_sent_away(tmp_path: Path, folder: Path, how: str) -> None:
    staged = stage(tmp_path, llama_server(), '[ -n "$glance" ] && exec sleep 1000')
    with herd(tmp_path, {"a": path_of(folder / "m0.gguf")}, LLAMA_SERVER_PATH=str(staged.path)) as gateway:
        gateway.request("POST", "/v1/models/load", {"model": "a"}, key=ADMIN)
        eventually(lambda: glancing(staged, "a"))
        family = eventually(lambda: children(gateway))
        begun = time.monotonic()
        if how == "eject":
            assert gateway.request("POST", "/v1/models/eject", {"model": "a"}, key=ADMIN).status == 200
            assert states(gateway) == {"a": "off"}
            assert gateway.get("/vram", key=ADMIN).json()["used_est_mb"] == 0
        else:
            assert gateway.stop() == 0
        assert time.monotonic() - begun < 3
        assert not any(alive(pid) for pid in family)
        assert staged.starts("a") == 0


# --- progress


def test_progress_of_two_large_models(tmp_path: Path) -> None:
    """Their weights are holes in files: nothing waits for a disk, and the pages come all the same."""
    large = {"one": path_of(LLAMA.build(tmp_path / "one.gguf")), "two": path_of(GEMMA.build(tmp_path / "two.gguf"))}
    assert all(Path(one["model_path"]).stat().st_size > 300 * MIB for one in large.values())
    with herd(tmp_path, large) as gateway:
        seen: dict[str, list[float]] = {name: [] for name in large}
        for name in large:
            gateway.request("POST", "/v1/models/load", {"model": name}, key=ADMIN)

        def look() -> bool:
            found = gateway.get("/v1/models/status").json()["models"]
            for name, row in found.items():
                if row["load_progress"] is not None:
                    seen[name].append(row["load_progress"])
            return all(row["status"] == "ready" for row in found.values())

        eventually(look, 40)
        for name, told in seen.items():
            assert told[-1] == 1.0 and all(0 <= one <= 1 for one in told)
            assert all(later >= earlier for earlier, later in pairwise(told)), name
            assert len({one for one in told if 0 < one < 1}) >= 3, (name, told)
        until(gateway, "one", "ready")
