"""Models files for tests, read exactly as a start reads them."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from gateway.cli.config import load_configuration
from gateway.errors import ConfigError
from gateway.models.registry import Registry, build_registry
from gateway.settings import Settings, variables
from tests.test_registry import files


class Place:
    """A folder that is both working directory and DATA_DIR, and an environment with nothing else of ours."""

    def __init__(self, folder: Path, patch: pytest.MonkeyPatch) -> None:
        self.folder, self.patch = folder, patch
        patch.chdir(folder)
        for var in variables():
            for name in (var.name, *var.aliases, *var.deprecated):
                patch.delenv(name, raising=False)
        for name in ("CUDA_VISIBLE_DEVICES", "RUNPOD_POD_ID", "RUNPOD_ENDPOINT_ID"):
            patch.delenv(name, raising=False)
        patch.setenv("DATA_DIR", str(folder))

    def write(self, content: Any, name: str = "config.yaml") -> Path:
        path = self.folder / name
        path.write_text(content if isinstance(content, str) else json.dumps(content))  # JSON is YAML
        return path

    def files(self, *names: str) -> Path:
        return files(self.folder / "models", *names)

    @contextlib.contextmanager
    def environment(self, **environ: str) -> Iterator[None]:
        for name, value in environ.items():
            self.patch.setenv(name, value)
        try:
            yield
        finally:
            for name in environ:
                self.patch.delenv(name)

    def settings(self, content: Any, **environ: str) -> Settings:
        self.write(content)
        with self.environment(**environ):
            return load_configuration()

    def registry(self, content: Any, **environ: str) -> Registry:
        self.write(content)
        with self.environment(**environ):
            return build_registry(load_configuration())

    def problems(self, content: Any, **environ: str) -> list[str]:
        """Without the file's name, which each of them must begin with."""
        with pytest.raises(ConfigError) as raised:
            self.registry(content, **environ)
        start = f"{self.folder / 'config.yaml'}: "
        assert all(line.startswith(start) for line in raised.value.problems), raised.value.problems
        assert all("\n" not in line for line in raised.value.problems)
        return [line.removeprefix(start) for line in raised.value.problems]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    return Place(tmp_path, monkeypatch)
