"""The live keys: who is let in, and what a failure costs."""

from __future__ import annotations

import asyncio
import logging
import threading
from dataclasses import FrozenInstanceError
from pathlib import Path

import pytest

from gateway.errors import ExpiredKey, InvalidKey, MissingKey, RateLimitExceeded
from gateway.stores.keys import hashes, verify
from gateway.stores.keys.failures import Failures
from gateway.stores.keys.file import format_time
from gateway.stores.keys.ring import Key, KeyRing, ReloadReport, RingView, presented
from tests.keys_kit import CHOSEN, HERE, PLAIN, RANDOM, count_slow, slow, write


class Clock:
    def __init__(self) -> None:
        self.time = 1_800_000_000.0

    def __call__(self) -> float:
        return self.time


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "api_keys.txt"


# Which header


@pytest.mark.parametrize(
    ("authorization", "x_api_key", "secret"),
    [
        (None, None, None),
        ("", "", None),
        ("Bearer abc", None, "abc"),
        ("bearer abc", None, "abc"),
        ("BEARER \t abc  ", None, "abc"),
        ("abc", None, "abc"),
        (None, " abc ", "abc"),
        ("Bearer abc", "def", "abc"),
        ("abc", "def", "abc"),
        ("Bearer", "def", "def"),
        ("Bearer ", None, None),
        ("Basic dXNlcjpwYXNz", "def", "def"),
        ("Basic dXNlcjpwYXNz", None, None),
        ("Bearer a b", None, "a b"),
    ],
)
def test_presented(authorization: str | None, x_api_key: str | None, secret: str | None) -> None:
    assert presented(authorization, x_api_key) == secret


# Who is let in


async def test_every_form_of_a_secret_and_the_fast_way_after_its_first_use(path: Path) -> None:
    write(path, f"alice:{PLAIN}:60 scope=admin\nbob:{hashes.fast_hash(RANDOM)}\ncarol:{slow(CHOSEN)} tpm=7\n")
    ring = KeyRing(path)
    assert ring.report == ReloadReport(3, [])
    assert ring.lookup(PLAIN) == Key("alice", rpm=60, scopes=frozenset({"admin"}))
    for secret, key_id in ((PLAIN, "alice"), (RANDOM, "bob"), (CHOSEN, "carol")):
        assert (await ring.authenticate(secret, HERE)).id == key_id
        found = ring.lookup(secret)
        assert found is not None
        assert found.id == key_id
    assert ring.view() == RingView(keys=3, usable=True)
    ring.close()


async def test_upper_case_hex_is_the_same_hash(path: Path) -> None:
    write(path, f"bob:{hashes.fast_hash(RANDOM).replace('sha256$', '').upper().join(['sha256$', ''])}\n")
    assert (await KeyRing(path).authenticate(RANDOM, HERE)).id == "bob"


@pytest.mark.parametrize("secret", ["wrong-secret-0123456789", "x", "\udcff\ud800", "é" * 20, "\0", "y" * 100_000])
async def test_what_is_no_key(path: Path, secret: str) -> None:
    write(path, f"alice:{PLAIN}\nbob:{hashes.fast_hash(RANDOM)}\ncarol:{slow(CHOSEN)}\n")
    ring = KeyRing(path)
    assert ring.lookup(secret) is None
    with pytest.raises(InvalidKey) as caught:
        await ring.authenticate(secret, HERE)
    assert len(caught.value.message) < 200
    ring.close()


@pytest.mark.parametrize("secret", [None, ""])
async def test_no_key_at_all_is_missing_and_no_failure(path: Path, secret: str | None) -> None:
    ring = KeyRing(path, failures=Failures(burst=1))
    for _ in range(3):
        with pytest.raises(MissingKey):
            await ring.authenticate(secret, HERE)


async def test_a_stored_hash_is_not_itself_a_key(path: Path) -> None:
    stored = hashes.fast_hash(RANDOM)
    write(path, f"bob:{stored}\n")
    ring = KeyRing(path)
    for guess in (stored, stored.removeprefix("sha256$")):
        with pytest.raises(InvalidKey):
            await ring.authenticate(guess, HERE)


async def test_an_expired_key_stops_at_that_moment_though_it_is_known(path: Path, clock: Clock) -> None:
    end = clock() + 10
    write(
        path,
        "".join(
            f"{name}:{stored}::{format_time(end)}\n"
            for name, stored in (("a", PLAIN), ("b", hashes.fast_hash(RANDOM)), ("c", slow(CHOSEN)))
        ),
    )
    ring = KeyRing(path, now=clock)
    for secret in (PLAIN, RANDOM, CHOSEN):
        await ring.authenticate(secret, HERE)
        assert ring.lookup(secret)
    clock.time = end
    for secret in (PLAIN, RANDOM, CHOSEN):
        assert ring.lookup(secret) is None
        with pytest.raises(ExpiredKey, match="expired on 2027-01-15"):
            await ring.authenticate(secret, HERE)
    assert ring.view() == RingView(keys=3, usable=False)
    assert ring.by_id("a") is None
    with pytest.raises(ExpiredKey):
        await KeyRing(path, now=lambda: 0.0).authenticate(PLAIN, HERE, now=end)
    ring.close()


async def test_rotation_both_work_until_the_grace_ends(path: Path, clock: Clock) -> None:
    write(path, f"bob:{PLAIN}::{format_time(clock() + 60)} tpm=5\nbob:{hashes.fast_hash(RANDOM)} tpm=9\n")
    ring = KeyRing(path, now=clock)
    assert ((await ring.authenticate(PLAIN, HERE)).tpm, (await ring.authenticate(RANDOM, HERE)).tpm) == (5, 9)
    clock.time += 61
    with pytest.raises(ExpiredKey):
        await ring.authenticate(PLAIN, HERE)
    assert await ring.authenticate(RANDOM, HERE) == ring.by_id("bob")


def test_keys_of_the_environment(path: Path) -> None:
    write(path, f"alice:{PLAIN} tpm=5\n")
    ring = KeyRing(path, f" {RANDOM}, short ,,{PLAIN},bad secret,{'é' * 20}")
    assert [ring.lookup(secret) for secret in (RANDOM, "short", PLAIN)] == [Key("env"), Key("env"), Key("alice", tpm=5)]
    assert ring.report.loaded == 3
    assert [problem.split(":")[0] for problem in ring.report.problems] == [
        "API_KEY, key 2",
        "API_KEY, key 4",
        "API_KEY, key 5",
    ]
    assert "short" not in "".join(ring.report.problems)
    assert ring.by_id("env") == Key("env")
    path.unlink()
    ring.reload()
    assert ring.lookup(RANDOM) == Key("env")


def test_without_a_file_the_environment_is_enough(tmp_path: Path) -> None:
    for ring in (KeyRing(None, PLAIN), KeyRing(tmp_path / "none", PLAIN)):
        assert ring.report == ReloadReport(1, [])
        assert ring.lookup(PLAIN) == Key("env")
        assert ring.poll() is None
    assert not KeyRing(tmp_path / "none").usable


def test_one_secret_on_two_lines_the_first_counts(path: Path) -> None:
    write(path, f"alice:{PLAIN} scope=infer\nroot:{hashes.fast_hash(PLAIN)} scope=admin\n")
    ring = KeyRing(path)
    assert ring.lookup(PLAIN) == Key("alice")
    assert ring.report.loaded == 1
    assert "line 2: its secret stands on line 1" in ring.report.problems[0]


# What a failure costs


async def test_a_slow_hash_is_computed_once_for_all_who_wait(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(path, f"carol:{slow(CHOSEN)}\n")
    gate = threading.Event()
    made = count_slow(monkeypatch, gate)
    ring = KeyRing(path)
    waiting = [asyncio.create_task(ring.authenticate(CHOSEN, HERE)) for _ in range(10)]
    await asyncio.sleep(0)
    waiting[0].cancel()  # the first one leaves; the others still get their answer
    gate.set()
    results = await asyncio.gather(*waiting, return_exceptions=True)
    assert isinstance(results[0], asyncio.CancelledError)
    assert results[1:] == [Key("carol")] * 9
    assert made == [CHOSEN]
    ring.close()


async def test_a_hash_whose_secret_is_in_use_is_tried_last(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    secrets = [f"{CHOSEN}-{number}" for number in range(5)]
    write(path, "".join(f"user:{slow(secret)}\n" for secret in secrets))
    made = count_slow(monkeypatch)
    ring = KeyRing(path)
    await asyncio.gather(*[ring.authenticate(secret, HERE) for secret in secrets])
    assert made == secrets
    ring.close()


async def test_a_wrong_secret_costs_a_slow_hash_once(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(path, f"carol:{slow(CHOSEN)}\n")
    made = count_slow(monkeypatch)
    ring = KeyRing(path)
    for _ in range(3):
        with pytest.raises(InvalidKey):
            await ring.authenticate("wrong-secret-0123456789", HERE)
    assert len(made) == 1
    ring.close()


async def test_failures_are_throttled_and_nothing_else_is(
    path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(path, f"alice:{PLAIN}\nbob:{hashes.fast_hash(RANDOM)}\ncarol:{slow(CHOSEN)}\n")
    monkeypatch.setattr(verify, "REST_SECONDS", 0.01)
    ring = KeyRing(path, now=clock, failures=Failures(burst=3, per=60))
    for number in range(3):
        with pytest.raises(InvalidKey):
            await ring.authenticate(f"wrong-secret-{number}-0123456789", HERE)
    for wrong in ("wrong-secret-0-0123456789", "wrong-secret-x-0123456789"):
        with pytest.raises(RateLimitExceeded) as caught:
            await ring.authenticate(wrong, HERE)
        assert caught.value.headers()["Retry-After"] == "20"
    for secret, key_id in ((PLAIN, "alice"), (RANDOM, "bob"), (CHOSEN, "carol")):
        assert (await ring.authenticate(secret, HERE)).id == key_id, "right, though it was never used"
    clock.time += 20
    with pytest.raises(InvalidKey):
        await ring.authenticate("wrong-secret-x-0123456789", HERE)
    ring.close()


async def test_right_keys_are_never_charged_however_many_come_at_once(path: Path) -> None:
    secrets = [f"{CHOSEN}-{number}" for number in range(25)]
    write(path, "".join(f"user{number}:{slow(secret)}\n" for number, secret in enumerate(secrets)))
    failures = Failures(burst=3)
    ring = KeyRing(path, failures=failures)
    asked = [ring.authenticate(secret, HERE) for secret in [*secrets, *[secrets[0]] * 40]]
    assert [key.id for key in await asyncio.gather(*asked)] == [f"user{n}" for n in range(25)] + ["user0"] * 40
    assert len(failures) == 0
    ring.close()


async def test_a_wrong_key_is_charged_to_everyone_who_brought_it(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(path, f"carol:{slow(CHOSEN)}\n")
    made = count_slow(monkeypatch)
    ring = KeyRing(path, failures=Failures(burst=5))
    asked = [ring.authenticate("wrong-secret-0123456789", HERE) for _ in range(40)]
    results = await asyncio.gather(*asked, return_exceptions=True)
    assert [type(result) for result in results] == [InvalidKey] * 5 + [RateLimitExceeded] * 35
    assert len(made) == 1
    ring.close()


class Hashing:
    """Slow comparisons that tell when they begin, and end when they are let."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.begun: asyncio.Queue[str] = asyncio.Queue()
        self.gate = threading.Event()
        loop, real = asyncio.get_running_loop(), hashes.matches

        def matches(stored: str, secret: str) -> bool:
            loop.call_soon_threadsafe(self.begun.put_nowait, secret)
            self.gate.wait(5)
            return real(stored, secret)

        monkeypatch.setattr(hashes, "matches", matches)


def guesses(ring: KeyRing, count: int, address: str = HERE) -> list[asyncio.Task[Key]]:
    return [
        asyncio.create_task(ring.authenticate(f"wrong-secret-{number}-of-{address}", address))
        for number in range(count)
    ]


async def test_an_address_is_hashed_for_one_at_a_time_and_holds_no_other_up(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(path, f"carol:{slow(CHOSEN)}\n")
    hashing = Hashing(monkeypatch)
    ring = KeyRing(path, failures=Failures(burst=5))
    asked = guesses(ring, 20)
    first = await hashing.begun.get()
    right = asyncio.create_task(ring.authenticate(CHOSEN, "192.0.2.2"))
    assert (first, await hashing.begun.get()) == (f"wrong-secret-0-of-{HERE}", CHOSEN)
    for task in asked[:10]:
        task.cancel()  # leaving gets nobody a second thread
    await asyncio.sleep(0)
    assert hashing.begun.empty()
    hashing.gate.set()
    assert await right == Key("carol")
    ring.close()


async def test_guesses_of_a_throttled_address_are_paced(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(path, f"carol:{slow(CHOSEN)}\n")
    made = count_slow(monkeypatch)
    monkeypatch.setattr(verify, "REST_SECONDS", 3600)
    ring = KeyRing(path, failures=Failures(burst=3))
    asked = guesses(ring, 20)
    done, waiting = set[asyncio.Task[Key]](), set(asked)
    while len(done) < 4:
        some, waiting = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        done |= some
    assert (await ring.authenticate(CHOSEN, "192.0.2.2")).id == "carol"
    assert len(made) == 4 + 1
    ring.close()
    left = await asyncio.gather(*waiting, return_exceptions=True)
    assert {type(result) for result in left} == {asyncio.CancelledError}


async def test_only_so_many_of_an_address_wait(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(path, f"carol:{slow(CHOSEN)}\n")
    monkeypatch.setattr(verify, "MAX_WAITING", 4)
    ring = KeyRing(path)
    results = await asyncio.gather(*guesses(ring, 6), return_exceptions=True)
    assert [type(result) for result in results] == [InvalidKey] * 4 + [RateLimitExceeded] * 2
    ring.close()


async def test_hashing_is_bounded_over_all_addresses(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(path, f"carol:{slow(CHOSEN)}\n")
    monkeypatch.setattr(verify, "MAX_ADDRESSES", 4)
    ring = KeyRing(path)
    asked = [guesses(ring, 1, f"192.0.2.{number}")[0] for number in range(6)]
    results = await asyncio.gather(*asked, return_exceptions=True)
    assert [type(result) for result in results] == [InvalidKey] * 4 + [RateLimitExceeded] * 2
    ring.close()


def test_memory_of_failures_is_bounded_and_counts_a_customer_not_an_address() -> None:
    failures = Failures(burst=2, per=60, addresses=100)
    for number in range(1000):
        failures.charge(f"10.0.{number // 256}.{number % 256}", 0.0)
    assert len(failures) == 100
    for address in ("2001:db8::1", "2001:db8::ffff:1"):
        assert failures.charge(address, 0.0) == 0
    assert failures.charge("2001:db8::2%eth0", 0.0) == pytest.approx(30)
    assert failures.charge("2001:db8:0:1::1", 0.0) == 0
    for address in ("::ffff:192.0.2.9", "192.0.2.9"):
        assert failures.charge(address, 0.0) == 0
    assert failures.charge("192.0.2.9", 15.0) == pytest.approx(15)
    assert failures.wait("192.0.2.9", 30.0) == 0
    assert failures.charge("192.0.2.9", 30.0) == 0
    assert failures.wait("192.0.2.9", 30.0) == pytest.approx(30)
    assert failures.charge("unix:", 0.0) == 0


def test_a_clock_set_back_locks_nobody_out() -> None:
    failures = Failures(burst=2, per=60)
    failures.charge(HERE, 1e9)
    failures.charge(HERE, 1e9)
    assert failures.charge(HERE, 1e6) <= 60


async def test_bcrypt_like_aliases_do_not_fill_the_memory(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(path, f"carol:{slow(CHOSEN)}\n")
    ring = KeyRing(path)
    monkeypatch.setattr(hashes, "matches", lambda stored, secret: True)
    for number in range(40):
        await ring.authenticate(f"{CHOSEN}{number}", HERE)
    assert len(ring._table.fast) <= 4
    ring.close()


# Secrets stay secret


async def test_no_secret_in_any_repr_report_or_log(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    stored = slow(CHOSEN)
    write(path, f"alice:{PLAIN}\nbob:{hashes.fast_hash(RANDOM)}\ncarol:{stored}\n{PLAIN}x\nx:{PLAIN}y:{RANDOM}y\n")
    ring = KeyRing(path, CHOSEN + "env")
    said = [repr(ring), repr(ring._table), repr(ring._reading), repr(ring.report), repr(ring.view())]
    for secret in (PLAIN, RANDOM, CHOSEN, CHOSEN + "env"):
        said.append(repr(await ring.authenticate(secret, HERE)))
    for wrong in (PLAIN + "x", RANDOM + "y"):
        with pytest.raises(InvalidKey) as caught:
            await ring.authenticate(wrong, HERE)
        said.append(repr(caught.value))
    ring.close()
    text = "\n".join([*said, caplog.text])
    for secret in (PLAIN, RANDOM, CHOSEN, stored, hashes.fast_hash(RANDOM).removeprefix("sha256$")):
        assert secret not in text


def test_a_key_cannot_be_changed() -> None:
    with pytest.raises(FrozenInstanceError):
        Key("a").id = "b"  # type: ignore[misc]
