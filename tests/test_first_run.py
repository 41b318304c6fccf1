"""The key of the curl command that `./scripts/run` prints: one that works when it is pasted."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from gateway.stores.keys.file import KeyFile
from gateway.stores.keys.ring import KeyRing
from scripts.first_run import CannotRun, curl_key, load
from tests.house import ROOT

OTHER = "other-secret-0123456789"
THEIRS = "$CORRAL_API_KEY"


class Place:
    """A data folder, and what the script makes of it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.keys = folder / "api_keys.txt"
        self.secret = folder / "demo.key"

    def curl_key(self, **environment: str) -> str | None:
        return curl_key(load({"DATA_DIR": str(self.folder), **environment}))

    def corral(self, *words: str) -> str:
        command = [sys.executable, "-m", "gateway", "keys", *words, "--file", str(self.keys), "--quiet"]
        done = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True)
        return done.stdout.strip()

    @property
    def ids(self) -> list[str]:
        return KeyFile(self.keys.read_bytes()).ids

    def opened_by(self, word: str | None) -> str | None:
        """Whose key it is, as the shell that it is pasted into reads it."""
        secret = subprocess.run(["sh", "-c", f'printf %s "{word}"'], stdout=subprocess.PIPE, text=True).stdout
        key = KeyRing(self.keys).authenticate(secret, "192.0.2.1")
        try:
            key.send(None)  # a fast hash awaits nothing
        except StopIteration as found:
            return str(found.value.id)
        return None


@pytest.fixture
def place(tmp_path: Path) -> Place:
    folder = tmp_path / "data with a blank"
    folder.mkdir()
    return Place(folder)


def test_the_first_run_makes_a_key_and_the_next_one_uses_it(place: Place) -> None:
    word = place.curl_key()
    assert place.opened_by(word) == "demo"
    assert place.secret.stat().st_mode & 0o777 == 0o600
    content = place.keys.read_bytes()
    assert place.curl_key() == word
    assert place.keys.read_bytes() == content


@pytest.mark.parametrize("grace", ["0", "24h"])
def test_a_demo_that_got_another_secret_stays_with_who_has_it(place: Place, grace: str) -> None:
    place.curl_key()
    rotated = place.corral("rotate", "--name", "demo", "--grace", grace)
    assert place.opened_by(place.curl_key()) == ("demo" if grace != "0" else "demo-2")
    assert place.opened_by(rotated) == "demo"


@pytest.mark.parametrize(
    ("lines", "made"),
    [
        ("# nothing\n", "demo"),
        (f"old:{OTHER}:60:2020-01-01\n", "demo"),
        ("bad line\n", "demo"),
        (f"demo:{OTHER}::2020-01-01\n", "demo-2"),
        ("demo:short\n", "demo-2"),
    ],
)
def test_without_a_usable_key_one_is_made_and_the_file_kept(place: Place, lines: str, made: str) -> None:
    place.keys.write_text(lines)
    assert place.opened_by(place.curl_key()) == made
    assert place.keys.read_text().startswith(lines)


def test_a_demo_that_may_no_longer_chat_is_not_used(place: Place) -> None:
    place.curl_key()
    place.keys.write_text(place.keys.read_text().rstrip("\n") + " scope=metrics\n")
    assert place.opened_by(place.curl_key()) == "demo-2"


def test_a_file_of_other_keys_gets_none(place: Place) -> None:
    place.keys.write_text(f"ada:{OTHER}\n")
    assert place.curl_key() == THEIRS
    assert place.curl_key(API_KEY=OTHER) == THEIRS
    place.secret.write_text("what was once the key")
    assert place.curl_key() == THEIRS, "the demo was taken out of the file"
    assert place.ids == ["ada"]


def test_no_keys_no_key(place: Place) -> None:
    assert place.curl_key(AUTH_ENABLED="false") is None
    assert not place.keys.exists()


@pytest.mark.parametrize("name", ["api_keys.txt", "demo.key"])
def test_a_folder_in_the_place_of_a_file_is_told(place: Place, name: str) -> None:
    (place.folder / name).mkdir()
    with pytest.raises(CannotRun, match=f"{name}: .*folder|{name}: Is a directory"):
        place.curl_key()


def test_a_data_folder_that_cannot_be_made_is_told(place: Place) -> None:
    place.keys.touch()
    with pytest.raises(CannotRun, match="Not a directory"):
        place.curl_key(DATA_DIR=str(place.keys / "below"), AUTH_KEYS_FILE=str(place.folder / "keys"))
