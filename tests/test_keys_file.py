"""The keys file's line: what is read, what is refused and how, and that edits leave the rest alone."""

from __future__ import annotations

import string
from datetime import UTC, datetime
from pathlib import Path

import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from gateway.stores.keys.file import (
    Key,
    KeyFile,
    compose,
    format_time,
    parse_line,
    parse_time,
    with_expiry,
    with_secret,
)

S = "a-Secret_0123456789"
SHA = "sha256$" + "0f" * 32
PBKDF2 = "$pbkdf2-sha256$1000$9J6zds65VypF6D3nnLO2Ng$0gH.Pfcd8zltrZEW31/wct6ZFhQNk9hFfAjcR/71ygg"
SCRYPT = "$scrypt$ln=4,r=8,p=1$ZUxJaQ1hrHVOyRmDcC4FoA$Vn1cmy6aXAKcDwBVU9tIMtOF/9KjUOkvrdyvSMdfb1k"
NEW_YEAR = datetime(2027, 1, 1, tzinfo=UTC).timestamp()


@pytest.mark.parametrize(
    ("text", "key"),
    [
        (f"alice:{S}", Key("alice")),
        (f"  alice:{S}\r", Key("alice")),
        (f"\ufeffalice:{S}", Key("alice")),
        (f"alice:{S}:60", Key("alice", rpm=60)),
        (f"alice:{S}:0", Key("alice", rpm=0)),
        (f"alice:{S}:", Key("alice")),
        (f"alice:{S}::", Key("alice")),
        (f"alice:{S}:60:", Key("alice", rpm=60)),
        (f"alice:{S}:60:2027-01-01", Key("alice", rpm=60, expires=NEW_YEAR)),
        (f"alice:{S}:60:2027-01-01T00:00:00", Key("alice", rpm=60, expires=NEW_YEAR)),
        (f"alice:{S}::2027-01-01T00:00:00Z", Key("alice", expires=NEW_YEAR)),
        (f"alice:{S}:2027-01-01T00:00:00Z", Key("alice", expires=NEW_YEAR)),
        (f"alice:{S}:2027-01-01T02:00:00+02:00", Key("alice", expires=NEW_YEAR)),
        (f"alice:{S}:2027-01-01", Key("alice", expires=NEW_YEAR)),
        (f"alice:{S}:20270101T000000Z", Key("alice", expires=NEW_YEAR)),
        (f"alice:{S} scope=admin", Key("alice", scopes=frozenset({"admin"}))),
        (f"alice:{S}\tmodels=a,b-*   tpm=5 ", Key("alice", models=("a", "b-*"), tpm=5)),
        (f"alice:{S} models=hf:user/repo", Key("alice", models=("hf:user/repo",))),
        (f"alice:{S} budget=7", Key("alice", budget=7)),
        (f"alice:{S} concurrency=4 # tpm=1, and words", Key("alice", concurrency=4)),
        (
            f"alice:{S}:1:2027-01-01 scope=infer,metrics models=q tpm=2 concurrency=3 priority=low budget=4/day",
            Key("alice", 1, NEW_YEAR, frozenset({"infer", "metrics"}), ("q",), 2, 3, "low", 4),
        ),
    ],
)
def test_lines_that_are_keys(text: str, key: Key) -> None:
    line = parse_line(text, 7)
    assert line.problem is None
    assert (line.key, line.stored, line.id, line.number) == (key, S, "alice", 7)


@pytest.mark.parametrize("stored", [SHA, PBKDF2, SCRYPT, "x" * 16, "x" * 128])
def test_forms_of_a_secret(stored: str) -> None:
    line = parse_line(f"alice:{stored}:5:2027-01-01T00:00:00Z tpm=9")
    assert line.problem is None
    assert (line.key, line.stored) == (Key("alice", rpm=5, expires=NEW_YEAR, tpm=9), stored)


@pytest.mark.parametrize("text", ["", "   ", "\t\r", "# alice:" + S, "  #x", "\ufeff# x"])
def test_lines_that_are_nothing(text: str) -> None:
    line = parse_line(text)
    assert (line.key, line.problem, line.id, line.text) == (None, None, None, text)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (S, "no colon"),
        (f"alice {S}", "no colon"),
        (f":{S}", "key id"),
        (f"al.ice:{S}", "key id"),
        (f"älice:{S}", "key id"),
        (f"{'x' * 129}:{S}", "key id"),
        ("alice:", "secret is missing"),
        (f"alice: {S}", "secret is missing"),
        ("alice:short", "5 characters"),
        (f"alice:{'x' * 129}", "129 characters"),
        (f"alice:{S}!", "letters, digits"),
        (f"alice:{S}é", "letters, digits"),
        ("alice:sha256$abc", "64 hexadecimal"),
        (f"alice:md5${'0f' * 16}", "64 hexadecimal"),
        (f"alice:${S}", "no known kind"),
        ("alice:$apr1$salt$0123456789abcdef", "no known kind"),
        (f"alice:{PBKDF2[:-4]}", "pbkdf2_sha256 hash is malformed"),
        ("alice:$pbkdf2-sha256$1000$9J6zds65VypF6D3nnLO2Ng", "malformed or incomplete"),
        ("alice:$scrypt$ln=16,x=8,p=1$a$b", "scrypt hash is malformed"),
        (f"alice:{S}:x", "requests per minute, the expiry"),
        (f"alice:{S}:-1", "requests per minute, the expiry"),
        (f"alice:{S}:6０", "requests per minute, the expiry"),
        (f"alice:{S}:60:60", "requests per minute, the expiry"),
        (f"alice:{S}:60:2027-13-01", "requests per minute, the expiry"),
        (f"alice:{S}:9999-12-31T23:59:59-08:00", "requests per minute, the expiry"),
        (f"alice:{S}:0001-01-01T00:00:00+08:00", "requests per minute, the expiry"),
        (f"alice:{S}:20270101", "0 (no limit) to 1000000"),
        (f"alice:{S}:{'9' * 5000}", "0 (no limit) to 1000000"),
        (f"alice:{S}:60:2027-01-01 00:00:00", "word 1 after the key"),
        (f"alice:{S} scopes=infer", "did you mean scope=?"),
        (f"alice:{S} unheard=of", "known: scope=, models="),
        (f"alice:{S} tpm=1 admin", "word 2 after the key"),
        (f"alice:{S} scope=", "infer,metrics,admin, not ''"),
        (f"alice:{S} scope=infer,root", "not 'root'"),
        (f"alice:{S} scope=infer,", "not ''"),
        (f"alice:{S} models=", "ids or globs"),
        (f"alice:{S} models=a,,b", "ids or globs"),
        (f"alice:{S} tpm=-5", "not '-5'"),
        (f"alice:{S} tpm=1e6", "not '1e6'"),
        (f"alice:{S} tpm={'9' * 5000}", "tpm= must be a whole number"),
        (f"alice:{S} priority=urgent", "not 'urgent'"),
        (f"alice:{S} budget=5/month", "not '5/month'"),
        (f"alice:{S} tpm=1 tpm=2", "tpm= is given twice"),
        ("alice:\udcff\udcfe" + S, "letters, digits"),
        ("\x00", "no colon"),
    ],
)
def test_lines_with_a_problem(text: str, says: str) -> None:
    line = parse_line(text, 3)
    assert line.key is None
    assert line.problem is not None
    assert says in line.problem
    assert S not in line.problem
    assert "\n" not in line.problem


def test_a_bad_line_is_still_known_by_its_id() -> None:
    assert parse_line("alice:short").id == "alice"
    assert parse_line(S).id is None


ids = st.text(string.ascii_letters + string.digits + "-_", min_size=1, max_size=128)
plain = st.text(string.ascii_letters + string.digits + "-_", min_size=16, max_size=128)
numbers = st.integers(0, 10**15)
globs = st.lists(st.text(string.ascii_letters + "*?[]:./-_#=", min_size=1, max_size=20), min_size=1, max_size=4)


@settings(deadline=None)
@given(st.text() | st.text(alphabet="ab1:=#$, -\t\ufeff"))
@example("a:$")
@example("::::")
def test_reading_never_raises(text: str) -> None:
    line = parse_line(text)
    assert line.text == text
    assert line.key is None or line.problem is None


@settings(deadline=None)
@given(plain, st.lists(st.sampled_from(["{}", "alice", ":", ":", " ", "=", ",", "scope=", "tpm=", "$", "60", "#"])))
def test_no_message_repeats_a_secret_wherever_it_was_put(secret: str, parts: list[str]) -> None:
    assume(any(letter not in "0123456789abcdef" for letter in secret))
    line = parse_line("".join(parts).replace("{}", secret), 3)
    assert secret not in (line.problem or "")
    if secret not in (line.id or ""):
        assert secret not in repr(line)


@settings(deadline=None)
@given(
    key_id=ids,
    stored=plain | st.just(SHA) | st.just(PBKDF2),
    rpm=st.none() | st.integers(0, 1_000_000),
    expires=st.none() | st.integers(0, 2**37).map(float),
    scopes=st.sets(st.sampled_from(["infer", "metrics", "admin"]), min_size=1),
    models=globs,
    limits=st.tuples(numbers, numbers, numbers),
    priority=st.sampled_from(["high", "normal", "low"]),
)
def test_what_is_written_reads_back(
    key_id: str,
    stored: str,
    rpm: int | None,
    expires: float | None,
    scopes: set[str],
    models: list[str],
    limits: tuple[int, int, int],
    priority: str,
) -> None:
    tpm, concurrency, budget = limits
    attributes = {
        "scope": ",".join(scopes),
        "models": ",".join(models),
        "tpm": str(tpm),
        "concurrency": str(concurrency),
        "priority": priority,
        "budget": f"{budget}/day",
    }
    line = parse_line(compose(key_id, stored, rpm, expires, attributes))
    assert line.problem is None
    assert line.stored == stored
    key = line.key
    assert key is not None
    assert (key.id, key.rpm, key.expires, key.models) == (key_id, rpm, expires, tuple(models))
    assert key.scopes == frozenset(scopes)
    assert (key.tpm, key.concurrency, key.budget, key.priority) == (tpm, concurrency, budget, priority)


@pytest.mark.parametrize(
    ("key_id", "attributes"),
    [
        ("a:b", {}),
        ("", {}),
        ("a b", {}),
        ("a", {"models": "x y"}),
        ("a", {"models": "x\nroot:" + S}),
        ("a", {"scope": "root"}),
        ("a", {"colour": "red"}),
    ],
)
def test_nothing_is_written_that_reads_otherwise(key_id: str, attributes: dict[str, str]) -> None:
    with pytest.raises(ValueError) as caught:
        compose(key_id, S, attributes=attributes)
    assert S not in str(caught.value)


@settings(deadline=None)
@given(st.binary())
def test_a_file_of_any_bytes_is_written_back_as_it_was(data: bytes) -> None:
    expected = data if not data or data.endswith(b"\n") else data + b"\n"
    assert KeyFile(data).encode() == expected


def test_an_edit_leaves_comments_foreign_lines_and_endings_alone() -> None:
    data = f"# top\r\nalice:{S}:60 tpm=5  # laptop\r\n\r\n\xff broken\nbob:{S}x".encode("latin-1")
    keys = KeyFile(data)
    alice = keys.of("alice")[0]
    keys.insert(with_secret(alice, SHA, None), after=alice)
    keys.replace(alice, with_expiry(alice, NEW_YEAR))
    keys.insert(f"carol:{S}y")
    assert keys.encode() == (
        f"# top\r\nalice:{S}:60:2027-01-01T00:00:00Z tpm=5  # laptop\r\nalice:{SHA}:60 tpm=5  # laptop\r\n"
        f"\r\n\xff broken\nbob:{S}x\ncarol:{S}y\n"
    ).encode("latin-1")


def test_states_of_an_id_on_two_lines() -> None:
    keys = KeyFile(
        f"alice:{S}1:60:2026-06-01\nalice:{S}2::2026-12-01 tpm=5\nalice:{S}3 tpm=9\nbob:{S}4::2027-01-01\n".encode()
    )
    now = parse_time("2026-07-01")
    assert [keys.state(line, now) for line in keys.lines] == ["expired", "grace", "active", "active"]
    assert [line.key.tpm for line in keys.of("alice") if line.key] == [None, 5, 9]


def test_what_a_key_may_do() -> None:
    key = Key("a", scopes=frozenset({"infer"}), models=("qwen-*", "Llama"), expires=100.0)
    assert [key.may_use(model) for model in ("qwen-7b", "Llama", "llama", "QWEN-7b", "phi")] == [
        True,
        True,
        False,
        False,
        False,
    ]
    assert Key("b").may_use("anything")
    assert key.has("infer")
    assert not key.has("metrics")
    admin = Key("c", scopes=frozenset({"admin"}))
    assert all(admin.has(scope) for scope in ("infer", "metrics", "admin"))
    assert [key.expired(now) for now in (99.9, 100.0, 100.1)] == [False, True, True]


def test_times() -> None:
    assert format_time(NEW_YEAR) == "2027-01-01T00:00:00Z"
    assert parse_time("2027-01-01T00:00:00") == parse_time("2027-01-01T01:00:00+01:00") == NEW_YEAR
    assert parse_time("2027-01-01T00:00:00z") == parse_time("2027-01-01t00:00:00Z") == NEW_YEAR
    assert parse_line(f"alice:{S}:60:2027-01-01T00:00:00z").key == Key("alice", rpm=60, expires=NEW_YEAR)


def test_the_example_file_holds_no_key_and_true_examples() -> None:
    text = (Path(__file__).parent.parent / "api_keys.txt.example").read_text()
    assert all(line.key is None and line.problem is None for line in KeyFile(text.encode()).lines)
    examples = [line.removeprefix("#: ") for line in text.splitlines() if line.startswith("#: ")]
    assert len(examples) >= 5
    for example_line in examples:
        assert parse_line(example_line).key is None
        assert parse_line(example_line.replace("<secret>", S)).problem is None
