"""Models on Hugging Face: found in the caches that a platform brings along, else fetched by `huggingface_hub`."""

from __future__ import annotations

import asyncio
import contextlib
import re
import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from gateway.models.fetching.partial import DownloadError
from gateway.models.gguf.header import GGUFError, shards

CACHE = ".hub"  # the cache folder that is ours, in MODELS_DIR
_PREFERRED = ("Q4_K_M", "Q8_0")  # llama-server's own choice, then the one that is always good
_LATER_PART = re.compile(r"-(?!00001)\d{5}-of-\d{5}\.gguf$", re.IGNORECASE)
_INSTALL = "pip install 'corral[hf]'"


@dataclass(frozen=True)
class HubModel:
    """`user/repo[:quant]`; the quant may also be a file's name."""

    repo: str
    quant: str | None = None

    @classmethod
    def parse(cls, spec: str) -> HubModel:
        """Raises DownloadError."""
        match = re.fullmatch(r"(\w[\w.-]*/\w[\w.-]*)(?::(\w[\w./-]*))?", spec.strip(), re.ASCII)
        if not match:
            raise DownloadError(f"{spec!r} is not of the form user/repo or user/repo:quant")
        return cls(match[1], match[2])

    def __str__(self) -> str:
        return f"{self.repo}:{self.quant}" if self.quant else self.repo

    def choose(self, names: Iterable[str]) -> str | None:
        """The file meant among a repository's: by quant, else Q4_K_M, Q8_0 or the only one; of several parts the first.

        Projectors (`mmproj`) are no models. None if nothing, or more than one, could be meant.
        """
        models = [name for name in names if _is_model(name)]
        for quant in (self.quant,) if self.quant else _PREFERRED:
            if found := sorted(
                (name for name in models if _has_quant(name, quant)), key=lambda name: (len(name), name)
            ):
                return found[0]
        return models[0] if len(models) == 1 and not self.quant else None


def find_hf_cached(repo: str, quant: str | None, roots: Sequence[Path]) -> Path | None:
    """The model in one of the cache folders `roots`, complete with all its parts; blocking.

    Layout: `<root>/models--USER--NAME/snapshots/<revision>/…`; what `refs/main` names comes first, then the newest.
    RunPod's root is /runpod-volume/huggingface-cache/hub, a user's ~/.cache/huggingface/hub.
    """
    model = HubModel(repo, quant)
    for root in roots:
        for snapshot in _snapshots(root / f"models--{repo.replace('/', '--')}"):
            files = {path.relative_to(snapshot).as_posix(): path for path in sorted(snapshot.rglob("*.gguf"))}
            name = model.choose(name for name, path in files.items() if path.is_file())  # links may point nowhere
            with contextlib.suppress(GGUFError):
                if name is not None and shards(files[name]):
                    return files[name]
    return None


async def fetch_hf(spec: str, models_dir: Path, roots: Sequence[Path] = ()) -> Path:
    """The model of `user/repo[:quant]`: from the caches `roots` or our own, else from Hugging Face by the extra `hf`.

    huggingface_hub resumes, checks, locks and reads HF_TOKEN itself. Raises DownloadError. A cancellation leaves at
    once; the thread may go on until the process ends.
    """
    model = HubModel.parse(spec)
    roots = (*roots, models_dir / CACHE)
    if found := await asyncio.to_thread(find_hf_cached, model.repo, model.quant, roots):
        return found
    loop, done = asyncio.get_running_loop(), asyncio.get_running_loop().create_future()

    def settle(path: Path | None, error: Exception | None) -> None:
        if not done.done():
            if error is not None:
                done.set_exception(error)
            else:
                done.set_result(path)

    def run() -> None:
        path: Path | None = None
        error: Exception | None = None
        try:
            path = _fetch(model, models_dir / CACHE)
        except DownloadError as problem:
            error = problem
        except Exception as problem:  # of whichever HTTP library huggingface_hub uses; one who waits has to hear of it
            error = DownloadError(
                f"{model} could not be fetched from Hugging Face ({type(problem).__name__}); "
                "check the network and the disk, what has come is kept"
            )
            error.__cause__ = problem
        with contextlib.suppress(RuntimeError):  # the loop has ended meanwhile
            loop.call_soon_threadsafe(settle, path, error)

    # A daemon, because the loop's own threads are waited for at exit, and this one may have hours to go.
    threading.Thread(target=run, name="huggingface", daemon=True).start()
    result: Path = await done
    return result


def _fetch(model: HubModel, cache: Path) -> Path:
    """Blocking. Raises DownloadError."""
    try:
        import huggingface_hub
        from huggingface_hub import errors
        from huggingface_hub.utils.tqdm import disable_progress_bars
    except ImportError:
        raise DownloadError(
            f"{model} is in no cache, and fetching it from Hugging Face needs an extra: {_INSTALL}"
        ) from None
    disable_progress_bars()
    try:
        names = huggingface_hub.list_repo_files(model.repo)
        name = model.choose(names)
        if name is None:
            there = ", ".join(filter(_is_model, names)) or "none"
            raise DownloadError(f"{model} does not name one GGUF file; {model.repo} has: {there[:2000]}")
        paths = [huggingface_hub.hf_hub_download(model.repo, part, cache_dir=cache) for part in _parts(name)]
    except errors.GatedRepoError:
        raise DownloadError(f"{model.repo} is gated; accept its terms on Hugging Face and set HF_TOKEN") from None
    except errors.RepositoryNotFoundError:
        raise DownloadError(f"{model.repo} does not exist on Hugging Face, or is private: then set HF_TOKEN") from None
    return Path(paths[0])


def _parts(name: str) -> list[str]:
    match = re.search(r"-00001-of-(\d{5})\.gguf$", name, re.IGNORECASE)
    if not match:
        return [name]
    return [f"{name[: match.start()]}-{i:05}-of-{match[1]}.gguf" for i in range(1, int(match[1]) + 1)]


def _snapshots(folder: Path) -> list[Path]:
    """The revisions that are there, the best first."""
    try:
        found = [path for path in (folder / "snapshots").iterdir() if path.is_dir()]
    except OSError:
        return []
    main = ""
    with contextlib.suppress(OSError, UnicodeDecodeError):
        main = (folder / "refs" / "main").read_text().strip()
    return sorted(found, key=lambda path: (path.name == main, path.stat().st_mtime), reverse=True)


def _is_model(name: str) -> bool:
    last = name.lower().rpartition("/")[2]
    return last.endswith(".gguf") and "mmproj" not in last and not _LATER_PART.search(last)


def _has_quant(name: str, quant: str) -> bool:
    """Q4_K is not in Q4_K_M, nor Q4_0 in IQ4_0; a folder's name counts, as in `Q8_0/model-00001-of-00002.gguf`."""
    if quant.lower().endswith(".gguf"):
        return f"/{name.lower()}".endswith(f"/{quant.lower()}")
    return re.search(rf"(?<![a-z0-9]){re.escape(quant)}(?![a-z0-9_])", name, re.IGNORECASE) is not None
