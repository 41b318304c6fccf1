"""A short run of the header reader's fuzzer, and that it would tell."""

from __future__ import annotations

from pathlib import Path

import pytest

from gateway.models.gguf.header import GGUFHeader, read_header
from tests import gguf_fuzz


def test_no_file_hurts_the_reader(tmp_path: Path) -> None:
    ends = gguf_fuzz.campaign(1000, seed=7, folder=tmp_path)
    assert ends["read"] > 100 and ends["refused"] > 100  # neither all nonsense nor all sound


@pytest.mark.parametrize("wrong", ["crash", "memory"])
def test_the_fuzzer_notices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wrong: str) -> None:
    def bad(path: Path) -> GGUFHeader:
        if wrong == "crash":
            raise IndexError(path)
        assert bytearray(gguf_fuzz.MOST_BYTES)
        return read_header(path)

    monkeypatch.setattr(gguf_fuzz, "read_header", bad)
    with pytest.raises(IndexError if wrong == "crash" else AssertionError) as caught:
        gguf_fuzz.campaign(50, seed=7, folder=tmp_path)
    assert "of seed 7" in caught.value.__notes__[0]
