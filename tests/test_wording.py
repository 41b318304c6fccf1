"""The gist of a prompt: what asks for the same has the same one, and what only looks like it has not."""

from __future__ import annotations

import time

import hypothesis
import hypothesis.strategies as st
import pytest

from gateway.stores.cache.wording import MOST_CHARACTERS, gist
from tests.wording_pairs import NEAR_MISSES, PARAPHRASES, UNSEEN_NEAR_MISSES

ALIKE = 0.7  # of the paraphrases; docs/CACHE.md has the numbers


def test_paraphrases() -> None:
    alike = [pair for pair in PARAPHRASES if gist(pair[0]) is not None and gist(pair[0]) == gist(pair[1])]
    assert len(alike) / len(PARAPHRASES) > ALIKE


@pytest.mark.parametrize(
    ("kind", "one", "other"), [(kind, *pair) for kind in NEAR_MISSES for pair in NEAR_MISSES[kind]]
)
def test_near_misses(kind: str, one: str, other: str) -> None:
    assert gist(one) is not None
    assert gist(one) != gist(other)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("What's the capital of France?", "what france capital"),
        ("Hello, could you please tell me what the capital of France is?", "what france capital"),
        ("How do I boil two eggs?", "howto boil 2 egg"),
        ("Why don't cats swim?", "why do not cat swim"),
        ("Is it going to rain?", "yesno it going to rain"),
        ("Write me a poem, please.", "write poem"),
        ("What does the US do?", "what do =US do"),
        ("What does he tell us?", "what do he tell us"),
        ("Convert -5 °C to °F", "convert - 5 °c to °f"),
        ("You are here?", "you here ?"),
        ("You are here.", "you here"),
        ("¿Qué hora es?", "qué hora es ?"),
    ],
)
def test_gists(text: str, words: str) -> None:
    found = gist(text)
    assert found is not None
    assert " ".join(found) == words


@pytest.mark.parametrize(
    "text",
    [
        "",
        "   ",
        "?!",
        "line\nline",
        "print(x)",
        "a[1]",
        "`ls`",
        "if a < b",
        "x" * (MOST_CHARACTERS + 1),
    ],
    ids=repr,
)
def test_what_has_no_gist(text: str) -> None:
    assert gist(text) is None


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("What is John like?", "What does John like?"),
        ("What is -5 + 3?", "What is 5 + 3?"),
        ("Let us eat, grandma", "Let us eat grandma"),
        ("What is .NET?", "What is NET?"),
        ("C++ or C", "C# or C"),
        ("What is 1,5?", "What is 1.5?"),
        ("How do I eat fish?", "How do fish eat?"),
        ("How do you feel?", "How do I feel?"),
        ("a of b", "b of a"),
        ("teacher of the pupil", "pupil of the teacher"),
    ],
)
def test_small_things_that_matter(one: str, other: str) -> None:
    assert gist(one) != gist(other)


@hypothesis.given(st.text(max_size=MOST_CHARACTERS))
def test_any_text(text: str) -> None:
    found = gist(text)
    assert found is None or all(found)


@pytest.mark.parametrize(
    "piece",
    ["how tall is ", "what is the ", "please ", "explain for me ", "of the ", "a", "a ", "'s ", "how much do a cost "],
    ids=repr,
)
def test_nothing_takes_long(piece: str) -> None:
    text = (piece * MOST_CHARACTERS)[:MOST_CHARACTERS]
    began = time.process_time()
    gist(text)
    assert time.process_time() - began < 0.1


@pytest.mark.parametrize(("one", "other"), UNSEEN_NEAR_MISSES)
def test_unseen_near_misses(one: str, other: str) -> None:
    assert gist(one) != gist(other)
