"""One model as it is configured."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gateway.models.configured.template import PromptTemplate


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """It has a `path`, or a source to fetch it from, or a `url` of a foreign server; else a `problem` says why not.

    Two specs are equal exactly if the model need not be started anew.
    """

    id: str
    path: Path | None = None
    mmproj: Path | None = None
    download_url: str | None = None
    sha256: str | None = None
    hf: str | None = None
    url: str | None = None
    aliases: tuple[str, ...] = ()
    flags: tuple[str, ...] = ()  # straight to llama-server, never rescaled
    env: tuple[tuple[str, str], ...] = field(default=(), repr=False)  # may hold secrets
    slots: int | None = None  # requests at once; None: PARALLEL, else as many as fit
    pinned: bool = False  # never evicted
    idle_timeout: float | None = None  # seconds; None: IDLE_TIMEOUT_SECONDS, 0: never
    defaults: Mapping[str, Any] = field(default_factory=dict)  # JSON values, where a request is silent
    api_key_env: str | None = None  # the variable that holds the key for `url`
    chat_template_file: Path | None = None
    chat_template_sha256: str | None = None  # of what is in it, so that a file that was edited makes another spec
    prompt_template: PromptTemplate | None = None
    embedding: bool | None = None  # None: the file's header decides when the model is loaded
    problem: str | None = None  # why this model cannot be loaded, known before it is tried
    # for one with a problem: the model as its files and variables are by then; blocking
    look_again: Callable[[], ModelSpec] | None = field(default=None, compare=False, repr=False)
