"""What becomes of a queued job: which errors are final, how often it is tried, and how it is named. Tables."""

from __future__ import annotations

import inspect
import json

import pytest

from gateway import errors
from gateway.errors import BackendError, CorralError, RateLimitExceeded, ShuttingDown
from gateway.models.subjects import collisions, subject_name
from gateway.workers.jobs import (
    MOST_VANISHED,
    Attempts,
    Cancelled,
    Kind,
    attempts_in,
    dead_letter,
    given_up,
    kind_of,
    pause_before_next,
)
from gateway.workers.nats.job import is_reply_subject, names_in

FINAL, FAILED, RETURNED = Kind.FINAL, Kind.FAILED, Kind.RETURNED

EXPECTED = {
    "InvalidJSON": FINAL,
    "BadRequest": FINAL,
    "ContextLengthExceeded": FINAL,
    "Unauthorized": FINAL,
    "MissingKey": FINAL,
    "InvalidKey": FINAL,
    "ExpiredKey": FINAL,
    "Forbidden": FINAL,
    "InsufficientScope": FINAL,
    "ModelNotAllowed": FINAL,
    "NotFound": FINAL,
    "ModelNotFound": RETURNED,
    "GrammarNotFound": FINAL,
    "MethodNotAllowed": FINAL,
    "ClientTimeout": FINAL,
    "PayloadTooLarge": FINAL,
    "URITooLong": FINAL,
    "UnsupportedMediaType": FINAL,
    "HeaderFieldsTooLarge": FINAL,
    "TooManyRequests": RETURNED,
    "RateLimitExceeded": RETURNED,
    "TokensExceeded": RETURNED,
    "ConcurrencyExceeded": RETURNED,
    "InsufficientQuota": FINAL,
    "NotSupported": FINAL,
    "BackendError": FAILED,
    "BackendGone": FAILED,
    "BackendTimeout": FAILED,
    "CorralError": FAILED,
    "Unavailable": FAILED,
    "QueueFull": RETURNED,
    "QueueTimeout": RETURNED,
    "ModelLoading": RETURNED,
    "ModelFailed": FAILED,
    "InsufficientMemory": FAILED,
    "ShuttingDown": RETURNED,
}


def all_errors() -> dict[str, type[CorralError]]:
    return {
        name: kind
        for name, kind in inspect.getmembers(errors, inspect.isclass)
        if issubclass(kind, CorralError) and name != "BackendReply"
    }


def test_the_table_knows_every_error() -> None:
    assert EXPECTED.keys() == all_errors().keys()


@pytest.mark.parametrize("name", EXPECTED)
def test_what_becomes_of_a_job_after_an_error(name: str) -> None:
    assert kind_of(all_errors()[name]("no")) is EXPECTED[name]


@pytest.mark.parametrize(("status", "kind"), [(400, FINAL), (404, FINAL), (500, FAILED)])
def test_an_error_of_llama_servers_own_goes_by_its_status(status: int, kind: Kind) -> None:
    assert kind_of(errors.BackendReply("no", status=status, type="x", code="of_its_own")) is kind


def test_a_cancelled_job_is_not_tried_again() -> None:
    assert kind_of(Cancelled()) is FINAL


@pytest.mark.parametrize(
    ("error", "failures", "pause"),
    [
        (BackendError("died"), 1, 1.0),
        (BackendError("died"), 2, 5.0),
        (errors.ModelFailed("broken", retry_after=60), 1, 1.0),  # another worker may have it
        (RateLimitExceeded("slowly", retry_after=17.5), 0, 17.5),
        (ShuttingDown("bye", retry_after=5), 0, 0.0),
        (errors.QueueFull("full"), 0, 2.0),
    ],
)
def test_how_long_it_waits_then(error: CorralError, failures: int, pause: float) -> None:
    assert pause_before_next(kind_of(error), error, failures) == pause


def after(failures: int = 0, returned: int = 0) -> Attempts:
    attempts = Attempts()
    for _ in range(failures):
        attempts = attempts.failed(BackendError("it died"), "here", 0.0)
    for _ in range(returned):
        attempts = attempts.gave_back()
    return attempts


@pytest.mark.parametrize(
    ("attempts", "deliveries", "age", "reason"),
    [
        (after(), 1, 0.0, None),  # new
        (after(), 1, 9e9, None),  # it lay there for long
        (after(failures=2), 3, 1.0, None),
        (after(failures=3), 4, 9.0, "failed 3 times, at last with backend_error: it died"),
        (after(returned=500), 501, 9.0, None),  # nobody's fault
        (after(returned=5, failures=2), 8, 9.0, None),
        (after(), 4, 90.0, None),  # three workers vanished under it, one each 30 s
        (after(), 4, 1.0, "was refused 3 times by others than Corral"),  # so fast no worker vanishes
        (after(), 4, 35.0, None),  # one vanished, two refused it
        (after(failures=2), 4, 1.0, "failed 2 times, at last with backend_error: it died and was refused 1 times"),
        (after(), MOST_VANISHED, 1e4, None),
        (after(), MOST_VANISHED + 1, 1e4, f"{MOST_VANISHED} workers vanished while they had this job"),
        (after(failures=2, returned=3), 3, 1.0, None),  # what was written down of a delivery that never came
        (after(), 4, -50.0, "was refused 3 times by others than Corral"),  # our clock is behind
    ],
)
def test_when_a_job_is_given_up(attempts: Attempts, deliveries: int, age: float, reason: str | None) -> None:
    told = given_up(attempts, deliveries, age, ack_wait=30.0)
    assert told == reason or (told is not None and reason is not None and told.startswith(reason))


def test_what_is_written_down_can_be_read_again() -> None:
    attempts = after(failures=2, returned=4)
    assert attempts_in(attempts.encode()) == attempts
    assert attempts_in(None) == attempts_in(b"{not json") == attempts_in(b"[]") == Attempts()


@pytest.mark.parametrize(("payload", "job"), [(b'{"input": "hi"}', {"input": "hi"}), (b"\xffno", "�no")])
def test_a_dead_letter_holds_the_job(payload: bytes, job: object) -> None:
    letter = dead_letter("id", "tiny", payload, "why", 4, after(failures=1))
    assert json.loads(json.dumps(letter)) == letter
    assert (letter["req_id"], letter["reason"], letter["deliveries"], letter["job"]) == ("id", "why", 4, job)
    assert letter["failures"] == [{"code": "backend_error", "message": "it died", "worker": "here", "at": 0.0}]


@pytest.mark.parametrize(
    ("model_id", "name"),
    [("tiny", "tiny"), ("qwen-2.5_7B", "qwen-2_5_7B"), ("a b.c*>", "a_b_c__"), ("größe", "gr__e")],
)
def test_what_a_model_is_called_in_subjects(model_id: str, name: str) -> None:
    assert subject_name(model_id) == name


def test_models_that_would_share_a_name() -> None:
    assert collisions(["a.b", "c", "d"]) == []
    (problem,) = collisions(["a.b", "c", "a-b", "a b"])
    assert problem == "models a.b, a b: all are called 'a_b' in NATS subjects; rename all but one"


@pytest.mark.parametrize(
    ("subject", "usable"),
    [
        ("_INBOX.abc.1", True),
        ("answers.of-me_2/x", True),
        ("inference.reply.x", True),
        ("", False),
        (".a", False),
        ("a..b", False),
        ("a.", False),
        ("a.*", False),
        ("a.>", False),
        ("a b", False),
        ("a\r\nPUB x 0", False),
        ("a\x00", False),
        ("größe", False),
        ("x" * 600, False),
        ("$JS.API.STREAM.PURGE.INFERENCE", False),
        ("inference.request.tiny", False),
        ("inference.dead.tiny", False),
        ("inference.cancel.x", False),
    ],
)
def test_where_an_answer_may_go(subject: str, usable: bool) -> None:
    assert is_reply_subject(subject) is usable


@pytest.mark.parametrize(
    ("payload", "names"),
    [
        (b'{"req_id": "a", "reply_to": "b"}', ("a", "b")),
        (b'{"req_id": "two words", "reply_to": "$SYS"}', ("two words", None)),
        (b'{"req_id": 5, "reply_to": ["b"]}', (None, None)),
        (b'{"req_id": "", "reply_to": ""}', (None, None)),
        (b'{"req_id": "' + b"x" * 300 + b'"}', (None, None)),
        (b"{not json", (None, None)),
        (b"[]", (None, None)),
    ],
)
def test_names_are_found_in_jobs_that_are_no_use_otherwise(
    payload: bytes, names: tuple[str | None, str | None]
) -> None:
    assert names_in(payload) == names
