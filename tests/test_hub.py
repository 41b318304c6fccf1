"""Models on Hugging Face: which file is meant, and where it already lies."""

from __future__ import annotations

import asyncio
import os
import sys
import threading
import types
from pathlib import Path
from typing import Any

import pytest

from gateway.models.fetching.hub import HubModel, fetch_hf, find_hf_cached
from gateway.models.fetching.partial import DownloadError

FILES = [
    "README.md",
    "Qwen3-8B-Q4_K_M.gguf",
    "Qwen3-8B-Q4_K_S.gguf",
    "Qwen3-8B-IQ4_XS.gguf",
    "Qwen3-8B-UD-Q4_K_XL.gguf",
    "Qwen3-8B.Q8_0.gguf",
    "qwen3_8b_f16.gguf",
    "mmproj-Q8_0.gguf",
    "BF16/Qwen3-8B-BF16-00001-of-00002.gguf",
    "BF16/Qwen3-8B-BF16-00002-of-00002.gguf",
    "Q2_K/part-00001-of-00002.gguf",
    "Q2_K/part-00002-of-00002.gguf",
]


@pytest.mark.parametrize(
    ("spec", "repo", "quant"),
    [
        ("user/repo", "user/repo", None),
        (" unsloth/Qwen3-8B-GGUF:UD-Q4_K_XL ", "unsloth/Qwen3-8B-GGUF", "UD-Q4_K_XL"),
        ("u/r.x:sub/file.gguf", "u/r.x", "sub/file.gguf"),
    ],
)
def test_specs(spec: str, repo: str, quant: str | None) -> None:
    assert HubModel.parse(spec) == HubModel(repo, quant)
    assert str(HubModel.parse(spec)) == spec.strip()


@pytest.mark.parametrize(
    "spec", ["", "repo", "a/b/c", "../x", "a/..", "a/b:", "a/b:../c", "https://h/a", "a/\nb", "a b/c"]
)
def test_specs_that_are_none(spec: str) -> None:
    with pytest.raises(DownloadError, match="user/repo"):
        HubModel.parse(spec)


@pytest.mark.parametrize(
    ("quant", "chosen"),
    [
        (None, "Qwen3-8B-Q4_K_M.gguf"),
        ("q4_k_s", "Qwen3-8B-Q4_K_S.gguf"),
        ("Q4_K", None),
        ("Q4_K_XL", "Qwen3-8B-UD-Q4_K_XL.gguf"),
        ("Q8_0", "Qwen3-8B.Q8_0.gguf"),
        ("F16", "qwen3_8b_f16.gguf"),
        ("bf16", "BF16/Qwen3-8B-BF16-00001-of-00002.gguf"),
        ("Q2_K", "Q2_K/part-00001-of-00002.gguf"),
        ("qwen3_8b_f16.gguf", "qwen3_8b_f16.gguf"),
        ("8b_f16.gguf", None),
        ("part-00001-of-00002.gguf", "Q2_K/part-00001-of-00002.gguf"),
        ("Q3_K", None),
    ],
)
def test_which_file_is_meant(quant: str | None, chosen: str | None) -> None:
    assert HubModel("u/r", quant).choose(FILES) == chosen


def test_defaults_when_there_is_less_to_choose_from() -> None:
    assert HubModel("u/r").choose(["a-Q8_0.gguf", "a-F16.gguf"]) == "a-Q8_0.gguf"
    assert HubModel("u/r").choose(["only.gguf", "mmproj-only.gguf"]) == "only.gguf"
    assert HubModel("u/r").choose(["x-00001-of-00002.gguf", "x-00002-of-00002.gguf"]) == "x-00001-of-00002.gguf"
    assert HubModel("u/r").choose(["a-F16.gguf", "a-Q6_K.gguf"]) is None
    assert HubModel("u/r").choose([]) is None


def cached(root: Path, name: str, revision: str = "abc", repo: str = "u/r") -> Path:
    """A file as huggingface_hub lays it down: a link into blobs."""
    folder = root / f"models--{repo.replace('/', '--')}"
    path = folder / "snapshots" / revision / name
    blob = folder / "blobs" / f"{revision}-{path.name}"
    for parent in (path.parent, blob.parent):
        parent.mkdir(parents=True, exist_ok=True)
    blob.write_bytes(b"GGUF")
    path.symlink_to(blob)
    return path


def test_a_cached_model_is_found_in_the_first_root_that_has_it(tmp_path: Path) -> None:
    first, second, third = tmp_path / "1", tmp_path / "2", tmp_path / "3"
    cached(first, "m-Q8_0.gguf", repo="u/other")
    cached(second, "m-Q5_K.gguf")
    found = cached(third, "sub/m-Q8_0.gguf")
    assert find_hf_cached("u/r", "q8_0", [first, second, third]) == found
    assert find_hf_cached("u/r", "q6_k", [first, second, third]) is None
    assert find_hf_cached("u/r", None, []) is None


def test_main_comes_before_the_newest(tmp_path: Path) -> None:
    old, new, main = (cached(tmp_path, "m.gguf", revision) for revision in ("old", "new", "main-is-this"))
    for age, path in ((30, old), (10, new), (20, main)):
        os.utime(path.parent, (1e9 - age, 1e9 - age))
    assert find_hf_cached("u/r", None, [tmp_path]) == new
    refs = tmp_path / "models--u--r" / "refs"
    refs.mkdir()
    (refs / "main").write_text("main-is-this\n")
    assert find_hf_cached("u/r", None, [tmp_path]) == main


def test_an_incomplete_download_is_not_found(tmp_path: Path) -> None:
    dangling = cached(tmp_path, "m-Q8_0.gguf")
    dangling.resolve().unlink()
    cached(tmp_path, "m-Q4_K_M-00001-of-00002.gguf")
    assert find_hf_cached("u/r", "Q8_0", [tmp_path]) is None
    assert find_hf_cached("u/r", "Q4_K_M", [tmp_path]) is None
    cached(tmp_path, "m-Q4_K_M-00002-of-00002.gguf")
    assert find_hf_cached("u/r", None, [tmp_path]) is not None


class Hub:
    """As much of huggingface_hub as is used."""

    class RepositoryNotFoundError(Exception):
        pass

    class GatedRepoError(RepositoryNotFoundError):
        pass

    def __init__(self) -> None:
        self.files = FILES
        self.error: Exception | None = None
        self.fetched: list[str] = []
        self.gate = threading.Event()
        self.gate.set()

    def list_repo_files(self, repo: str) -> list[str]:
        self.gate.wait()
        if self.error:
            raise self.error
        return self.files

    def hf_hub_download(self, repo: str, name: str, *, cache_dir: Path) -> str:
        self.fetched.append(name)
        return str(cached(cache_dir, name, repo=repo))


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Hub:
    hub = Hub()
    module: Any = types.ModuleType("huggingface_hub")
    module.list_repo_files, module.hf_hub_download = hub.list_repo_files, hub.hf_hub_download
    module.errors = types.SimpleNamespace(
        RepositoryNotFoundError=Hub.RepositoryNotFoundError, GatedRepoError=Hub.GatedRepoError
    )
    tqdm: Any = types.ModuleType("huggingface_hub.utils.tqdm")
    tqdm.disable_progress_bars = lambda: None
    for name, fake in {"": module, ".utils": types.ModuleType("utils"), ".utils.tqdm": tqdm}.items():
        monkeypatch.setitem(sys.modules, f"huggingface_hub{name}", fake)
    return hub


async def test_fetched_once_and_then_found(hub: Hub, tmp_path: Path) -> None:
    path = await fetch_hf("u/r:bf16", tmp_path)
    assert path.is_relative_to(tmp_path / ".hub") and path.read_bytes() == b"GGUF"
    assert hub.fetched == FILES[8:10]  # both parts
    hub.error = OSError("the network is away")
    assert await fetch_hf("u/r:bf16", tmp_path) == path


async def test_a_platforms_cache_comes_first(hub: Hub, tmp_path: Path) -> None:
    there = cached(tmp_path / "runpod", "m.gguf")
    assert await fetch_hf("u/r", tmp_path / "models", [tmp_path / "runpod"]) == there
    assert hub.fetched == []


@pytest.mark.parametrize(
    ("error", "why"),
    [
        (Hub.GatedRepoError("long\ntext"), "u/r is gated; accept its terms"),
        (Hub.RepositoryNotFoundError("long\ntext"), "does not exist on Hugging Face, or is private"),
        (OSError("long\ntext"), r"could not be fetched from Hugging Face \(OSError\)"),
        (RuntimeError("long\ntext"), r"could not be fetched from Hugging Face \(RuntimeError\)"),
    ],
)
async def test_problems_in_one_sentence(hub: Hub, tmp_path: Path, error: Exception, why: str) -> None:
    hub.error = error
    with pytest.raises(DownloadError, match=why) as caught:
        await fetch_hf("u/r", tmp_path)
    assert "\n" not in str(caught.value)


async def test_an_ambiguous_wish_lists_what_there_is(hub: Hub, tmp_path: Path) -> None:
    with pytest.raises(DownloadError, match=r"u/r:Q3_K does not name one GGUF file; u/r has: Qwen3-8B-Q4_K_M\.gguf, "):
        await fetch_hf("u/r:Q3_K", tmp_path)


async def test_without_the_extra_the_install_line_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(DownloadError, match=r"pip install 'corral\[hf\]'"):
        await fetch_hf("u/r", tmp_path)


async def test_a_cancellation_does_not_wait_for_the_thread(hub: Hub, tmp_path: Path) -> None:
    hub.gate.clear()
    task = asyncio.create_task(fetch_hf("u/r", tmp_path))
    while "huggingface" not in {thread.name for thread in threading.enumerate()}:  # noqa: ASYNC110
        await asyncio.sleep(0.001)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    hub.gate.set()
    for thread in threading.enumerate():
        if thread.name == "huggingface":
            assert thread.daemon
            await asyncio.to_thread(thread.join)
