"""`corral keys`, run in this process on a real file, with a clock of its own."""

from __future__ import annotations

import fcntl
import io
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from gateway.cli import keys as cli
from gateway.cli import make_parser
from gateway.stores.keys import hashes
from gateway.stores.keys import io as keyio
from gateway.stores.keys.file import Key, KeyFile, format_time
from gateway.stores.keys.ring import KeyRing

OWN = "my-own-secret-0123456789"
NOW = 1_800_000_000.0  # 2027-01-15T08:00:00Z
DAY = 86400.0


@dataclass
class Ran:
    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


class Corral:
    """Runs command lines, and remembers all that was said."""

    def __init__(self, path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
        self.path = path
        self.now = NOW
        self.said = ""
        self._capsys = capsys
        self._monkeypatch = monkeypatch
        monkeypatch.setattr("gateway.cli._keys_file", lambda: path)
        self._parser = make_parser()

    def __call__(self, *argv: str, stdin: str = "") -> Ran:
        self._monkeypatch.setattr("sys.stdin", io.StringIO(stdin))
        try:
            code = cli.run(self._parser.parse_args(["keys", *argv]), now=lambda: self.now)
        except SystemExit as left:
            code = int(left.code or 0)
        out, err = self._capsys.readouterr()
        self.said += out + err
        return Ran(code, out, err)

    def file(self) -> KeyFile:
        return KeyFile(self.path.read_bytes())

    def keys(self) -> list[Key]:
        return [line.key for line in self.file().lines if line.key]

    def accepts(self, secret: str) -> bool:
        return self("check", secret).code == 0


@pytest.fixture
def corral(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Corral:
    return Corral(tmp_path / "data" / "api_keys.txt", capsys, monkeypatch)


def test_generate_shows_the_key_once_and_stores_its_hash(corral: Corral) -> None:
    ran = corral("generate", "--name", "alice")
    secret = ran.out.strip()
    assert ran.code == 0
    assert re.fullmatch(r"sk-alice-[A-Za-z0-9_-]{43}", secret)
    assert secret not in ran.err
    assert "only time" in ran.err
    text = corral.path.read_text()
    assert secret not in text
    assert f"alice:{hashes.fast_hash(secret)}\n" in text
    assert corral.path.stat().st_mode & 0o777 == 0o600
    assert corral.accepts(secret)


def test_generate_with_everything(corral: Corral) -> None:
    ran = corral(
        *("generate", "--name", "ci", "--rate-limit", "30", "--expires", "30d", "--scope", "infer,metrics"),
        *("--models", "qwen-*,phi", "--tpm", "1000", "--concurrency", "2", "--priority", "low", "--budget", "5000/day"),
    )
    assert ran.code == 0
    assert corral.keys() == [
        Key("ci", 30, NOW + 30 * DAY, frozenset({"infer", "metrics"}), ("qwen-*", "phi"), 1000, 2, "low", 5000)
    ]


@pytest.mark.parametrize(
    ("given", "expires"),
    [
        ("30d", NOW + 30 * DAY),
        ("24h", NOW + DAY),
        ("60m", NOW + 3600),
        ("90s", NOW + 90),
        ("2w", NOW + 14 * DAY),
        ("2027-02-01", 1_801_440_000.0),
        ("2027-02-01T01:00:00+01:00", 1_801_440_000.0),
    ],
)
def test_expiries(corral: Corral, given: str, expires: float) -> None:
    assert corral("generate", "--name", "a", "--expires", given).code == 0
    assert corral.keys()[0].expires == expires


def test_no_time_at_all_is_no_expiry(corral: Corral) -> None:
    corral.now += 0.5  # what is left of the second is no reason to make a key that nobody can use
    assert "has passed" in corral("generate", "--name", "a", "--expires", "0d").err
    assert not corral.path.exists()


def test_a_secret_of_ones_own_is_stored_by_a_slow_hash(corral: Corral) -> None:
    assert corral("generate", "--name", "a", "--secret", OWN).code == 0
    assert "a:$pbkdf2-sha256$" in corral.path.read_text()
    assert corral("generate", "--name", "b", "--secret", "-", stdin=OWN + "b\n").out == OWN + "b\n"
    assert corral("generate", "--name", "c", "--secret", OWN + "c", "--plaintext").code == 0
    assert f"c:{OWN}c\n" in corral.path.read_text()
    assert OWN + "b" not in corral.path.read_text()
    ran = corral("generate", "--name", "d", "--secret", OWN)
    assert (ran.code, ran.out) == (1, "")
    assert "that of key 'a'" in ran.err
    assert OWN not in ran.err


def test_plaintext_keeps_the_seeds_form(corral: Corral) -> None:
    secret = corral("generate", "--name", "a", "--plaintext", "--rate-limit", "60").out.strip()
    assert f"a:{secret}:60\n" in corral.path.read_text()
    assert KeyRing(corral.path).lookup(secret) == Key("a", rpm=60)


@pytest.mark.parametrize(
    ("argv", "code", "says"),
    [
        (("generate", "--name", "taken"), 1, "use: corral keys rotate --name taken"),
        (("generate", "--name", "broken"), 1, "already"),
        (("generate", "--name", "env"), 2, "API_KEY"),
        (("generate", "--name", "anonymous"), 2, "AUTH_ENABLED"),
        (("generate", "--name", "a b"), 2, "letters, digits"),
        (("generate", "--name", "a:b"), 2, "letters, digits"),
        (("generate", "--name", ""), 2, "letters, digits"),
        (("generate", "--name", "a", "--expires", "soon"), 2, "--expires must be 30d"),
        (("generate", "--name", "a", "--expires", "2020-01-01"), 2, "has passed"),
        (("generate", "--name", "a", "--expires", "0d"), 2, "has passed"),
        (("generate", "--name", "a", "--expires", "999999w"), 2, "--expires must be"),
        (("generate", "--name", "a", "--rate-limit", "-1"), 2, "whole number"),
        (("generate", "--name", "a", "--rate-limit", "9999999"), 2, "1000000"),
        (("generate", "--name", "a", "--scope", "root"), 2, "infer,metrics,admin, not 'root'"),
        (("generate", "--name", "a", "--scope", "infer scope=admin"), 2, "blanks"),
        (("generate", "--name", "a", "--models", f"x\nroot:{OWN}"), 2, "blanks"),
        (("generate", "--name", "a", "--tpm", "many"), 2, "tpm= must be"),
        (("generate", "--name", "a", "--priority", "urgent"), 2, "invalid choice"),
        (("generate", "--name", "a", "--secret", "short"), 2, "5 characters"),
        (("generate", "--name", "a", "--secret", "sha256$" + "0" * 64), 2, "not a hash"),
        (("generate",), 2, "--name"),
        (("rotate", "--name", "nobody"), 1, "no key 'nobody'"),
        (("rotate", "--name", "takn"), 1, "did you mean 'taken'?"),
        (("rotate", "--name", "taken", "--grace", "long"), 2, "--grace must be"),
        (("rotate", "--name", "broken"), 1, "mend or delete it"),
        (("rotate", "--name", "old"), 1, "add --expires"),
        (("remove", "--name", "takn"), 1, "did you mean 'taken'?"),
        (("check", ""), 2, "no key given"),
        (("check", "-"), 2, "no key given"),
        ((), 2, "required"),
        (("frob",), 2, "invalid choice"),
    ],
)
def test_refusals_change_nothing_and_say_the_mend(corral: Corral, argv: tuple[str, ...], code: int, says: str) -> None:
    corral.path.parent.mkdir()
    corral.path.write_text(f"taken:{OWN}1\nbroken:oops\nold:{OWN}2::2020-01-01\n")
    before = keyio.signature(corral.path.stat())
    ran = corral(*argv)
    assert (ran.code, ran.out) == (code, "")
    assert says in ran.err
    assert OWN not in ran.err
    assert ran.err.count("\n") == 1
    assert ran.err.startswith("corral keys")
    assert keyio.signature(corral.path.stat()) == before


@pytest.mark.parametrize(
    "argv",
    [
        ("--file", "{}", "--quiet", "--json", "generate", "--name", "a"),
        ("generate", "--file", "{}", "--quiet", "--json", "--name", "a"),
        ("generate", "--name", "a", "--json", "--file", "{}", "--quiet"),
        ("--quiet", "generate", "--json", "--name", "a", "--file", "{}"),
    ],
)
def test_shared_options_may_stand_anywhere(corral: Corral, tmp_path: Path, argv: tuple[str, ...]) -> None:
    other = tmp_path / "other.txt"
    ran = corral(*(word.format(other) for word in argv))
    assert (ran.code, ran.err) == (0, "")
    assert ran.json["file"] == str(other)
    assert ran.json["id"] == "a"
    assert ran.json["key"].startswith("sk-a-")
    assert not corral.path.exists()


def test_quiet_prints_the_key_alone(corral: Corral) -> None:
    ran = corral("generate", "--name", "a", "--quiet")
    assert re.fullmatch(r"sk-a-\S{43}\n", ran.out)
    assert ran.err == ""


def test_list(corral: Corral) -> None:
    assert corral("list").code == 0
    assert "corral keys generate" in corral("list").err
    corral.path.parent.mkdir()
    corral.path.write_text(
        f"alice:{OWN}1:60 scope=admin models=q*\nbob:{OWN}2::2027-01-16 tpm=5\nbob:{hashes.fast_hash('x')}:0 "
        f"budget=7/day concurrency=2 priority=low\nold:{OWN}3::2020-01-01\nbad:{OWN}!\n"
    )
    ran = corral("list")
    assert ran.code == 0
    rows = [line.split() for line in ran.out.splitlines()]
    assert rows[0][:3] == ["ID", "STATE", "SCOPE"]
    assert [row[:2] for row in rows[1:]] == [
        ["alice", "active"],
        ["bob", "grace"],
        ["bob", "active"],
        ["old", "expired"],
    ]
    assert rows[2][-2:] == ["2027-01-16T00:00:00Z", "plaintext"]
    assert "line 5: the secret may hold only" in ran.err
    listed = corral("list", "--json").json
    assert listed["keys"][2] == {
        "id": "bob",
        "state": "active",
        "scopes": ["infer"],
        "models": ["*"],
        "requests_per_minute": 0,
        "tokens_per_minute": None,
        "tokens_per_day": 7,
        "concurrency": 2,
        "priority": "low",
        "expires": None,
        "stored": "sha256",
        "line": 3,
    }
    assert len(listed["problems"]) == 1
    assert OWN not in corral.said
    assert hashes.fast_hash("x").partition("$")[2] not in corral.said


def test_rotation_with_the_default_grace(corral: Corral) -> None:
    first = corral("generate", "--name", "a", "--rate-limit", "60", "--tpm", "5").out.strip()
    corral("generate", "--name", "b")
    ran = corral("rotate", "--name", "a")
    second = ran.out.strip()
    assert ran.code == 0
    assert "works until 2027-01-16T08:00:00Z" in ran.err
    assert corral.keys() == [Key("a", 60, NOW + DAY, tpm=5), Key("a", 60, tpm=5), Key("b")]
    assert corral.accepts(first)
    assert corral.accepts(second)
    corral.now += DAY
    assert not corral.accepts(first)
    assert corral.accepts(second)
    corral("rotate", "--name", "a", "--grace", "1h")
    assert corral.keys() == [Key("a", 60, NOW + DAY + 3600, tpm=5), Key("a", 60, tpm=5), Key("b")]


def test_rotation_without_grace_and_with_an_end(corral: Corral) -> None:
    first = corral("generate", "--name", "a", "--expires", "10h").out.strip()
    ran = corral("rotate", "--name", "a", "--json")
    assert ran.json["grace_ends"] == ran.json["expires"] == format_time(NOW + 36000)
    assert corral.keys() == [Key("a", expires=NOW + 36000), Key("a", expires=NOW + 36000)]
    ran = corral("rotate", "--name", "a", "--grace", "0", "--expires", "20h")
    assert "has stopped working" in ran.err
    assert corral.keys() == [Key("a", expires=NOW + 72000)]
    assert not corral.accepts(first)
    corral.now += 72000
    assert corral("rotate", "--name", "a").code == 1
    assert corral("rotate", "--name", "a", "--expires", "1h").code == 0
    assert corral.keys() == [Key("a", expires=NOW + 75600)]


def test_rotation_to_a_secret_of_ones_own(corral: Corral) -> None:
    corral("generate", "--name", "a", "--secret", OWN)
    assert corral("rotate", "--name", "a", "--secret", OWN).code == 1
    assert corral("rotate", "--name", "a", "--secret", OWN + "2").out == f"{OWN}2\n"
    assert corral.accepts(OWN)
    assert corral.accepts(OWN + "2")


def test_remove_takes_every_line_of_the_id_and_no_other(corral: Corral) -> None:
    corral.path.parent.mkdir()
    corral.path.write_text(f"# top\na:{OWN}1\nab:{OWN}2\na:{OWN}3::2020-01-01\na:bad\nnonsense\n# end\n")
    assert corral("remove", "--name", "a", "--json").json["removed"] == 3
    assert corral.path.read_text() == f"# top\nab:{OWN}2\nnonsense\n# end\n"
    assert corral("remove", "--name", "a").code == 1


def test_check(corral: Corral) -> None:
    corral.path.parent.mkdir()
    corral.path.write_text(f"a:{OWN}1 scope=metrics\nb:{hashes.slow_hash(OWN)}\nold:{OWN}2::2020-01-01\n")
    ran = corral("check", OWN + "1")
    assert (ran.code, ran.out) == (0, "valid: a (scope metrics)\n")
    ran = corral("check", "-", stdin=f"{OWN}\n")
    assert (ran.code, ran.out) == (0, "valid: b (scope infer)\n")
    ran = corral("check", OWN + "2")
    assert (ran.code, ran.out) == (1, "expired: old (scope infer, expired on 2020-01-01T00:00:00Z)\n")
    ran = corral("check", OWN + "3", "--json")
    assert (ran.code, ran.json) == (1, {"result": "unknown"})
    assert corral("check", OWN + "1", "--json").json["id"] == "a"
    assert OWN not in corral.said


def test_a_file_that_cannot_be_used(corral: Corral, monkeypatch: pytest.MonkeyPatch) -> None:
    ran = corral("remove", "--name", "a")
    assert (ran.code, ran.err.count("\n")) == (1, 1)
    assert "No such file" in ran.err
    corral.path.mkdir(parents=True)
    for argv in (("list",), ("generate", "--name", "a")):
        ran = corral(*argv)
        assert (ran.code, ran.out, ran.err.count("\n")) == (1, "", 1)
    corral.path.rmdir()
    corral.path.write_text(f"a:{OWN}\n")
    real_edit: Callable[..., Any] = keyio.edit
    monkeypatch.setattr(keyio, "edit", lambda path, create=False: real_edit(path, create=create, wait=0.02))
    with corral.path.open() as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        ran = corral("generate", "--name", "b")
    assert (ran.code, ran.out) == (1, "")
    assert "another process holds or writes it; try again" in ran.err


def test_a_file_open_to_everyone_keeps_its_mode_and_is_mentioned(corral: Corral) -> None:
    corral.path.parent.mkdir()
    corral.path.write_text("")
    corral.path.chmod(0o644)
    assert "chmod 600" in corral("generate", "--name", "a").err
    assert corral.path.stat().st_mode & 0o777 == 0o644


@pytest.mark.parametrize("command", [(), ("generate",), ("list",), ("rotate",), ("remove",), ("check",)])
def test_help_has_examples(corral: Corral, command: tuple[str, ...]) -> None:
    ran = corral(*command, "--help")
    assert ran.code == 0
    assert f"corral keys {command[0] if command else 'generate'}" in ran.out.split("example")[1]
