"""What becomes of a queued job: which errors are final, how often it is tried, and how it is named. Tables."""

from __future__ import annotations

import inspect
import json

import pytest

from gateway import errors
from gateway.errors import BackendError, CorralError, RateLimitExceeded, ShuttingDown
from gateway.models.subjects import collisions, subject_name
from gateway.workers.jobs import (
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


SILENCE = "without a word from who had it: a worker that vanished, most often"


@pytest.mark.parametrize(
    ("attempts", "ended", "reason"),
    [
        (after(), 0, None),  # new
        (after(failures=2), 2, None),
        (after(failures=3), 3, "failed 3 times, at last with backend_error: it died"),
        (after(returned=500), 500, None),  # nobody's fault
        (after(returned=5, failures=2), 7, None),
        (after(), 2, None),
        (after(), 3, f"was delivered 3 times {SILENCE}"),
        (after(), 9, f"was delivered 9 times {SILENCE}"),
        (after(failures=1), 2, None),
        (
            after(failures=2),
            3,
            f"failed 2 times, at last with backend_error: it died; was delivered once {SILENCE}",
        ),
        (after(failures=1, returned=4), 6, None),
        (
            after(failures=1, returned=4),
            7,
            f"failed once, at last with backend_error: it died; was delivered 2 times {SILENCE}",
        ),
        (after(failures=2, returned=3), 2, None),  # what was written down of a delivery that never came
    ],
)
def test_when_a_job_is_given_up(attempts: Attempts, ended: int, reason: str | None) -> None:
    assert given_up(attempts, ended) == reason


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
