"""Where a model's file comes from if it is not here yet."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path

from gateway.models.fetching.download import fetch_url
from gateway.models.fetching.hub import fetch_hf
from gateway.models.spec import ModelSpec

log = logging.getLogger("corral.models")
_MIB = 1024 * 1024


async def fetch(
    spec: ModelSpec, models_dir: Path, hub_caches: Sequence[Path], tell: Callable[[float | None], None]
) -> Path:
    """The file, fetched if need be. Raises DownloadError. `tell` hears how far it has come, 0–1, if that is known."""
    shown = 0

    def progress(done: int, total: int | None) -> None:
        nonlocal shown
        percent = done * 100 // total if total else done // (256 * _MIB)
        if percent != shown:
            shown = percent
            tell(done / total if total else None)
            if not total or percent % 10 == 0:
                log.info("%s: %d MiB fetched%s", spec.id, done // _MIB, f" ({percent} %)" if total else "")

    if spec.hf is not None:
        return await fetch_hf(spec.hf, models_dir, hub_caches)
    assert spec.download_url is not None
    return await fetch_url(spec.download_url, models_dir, sha256=spec.sha256, progress=progress)
