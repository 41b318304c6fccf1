"""Which requests may be cached, and which are the same."""

from __future__ import annotations

from typing import Any

import pytest

from gateway.pipeline.cache.key import SILENT, Wish, request_of, wish_of
from gateway.settings import Settings
from tests.cache_kit import GREEDY, HI, call_of


def key_of(
    body: dict[str, Any], route: str = "/v1/chat/completions", cache: Wish | None = None, **settings: Any
) -> str | None:
    call = call_of(body, route, cache)
    request = request_of(call, call.fields, Settings(**settings))
    return None if request is None else request.key("about")


@pytest.mark.parametrize(
    ("fields", "may"),
    [
        ({}, False),
        ({"temperature": 0.7}, False),
        ({"temperature": 0}, True),
        ({"temperature": 0.0}, True),
        ({"temperature": -1}, True),  # llama-server takes it for 0
        ({"temperature": False}, False),
        ({"temperature": None}, False),
        ({"top_k": 1}, True),
        ({"seed": 7}, True),
        ({"seed": 0, "temperature": 1.5}, True),
        ({"seed": -1}, False),  # llama-server chooses one
        ({"seed": 0xFFFFFFFF}, False),
        ({"seed": True}, False),
        ({"seed": "7"}, False),
        ({"temperature": 0, "samplers": ["min_p"]}, False),  # without the one that looks at the temperature
        ({"temperature": 0, "dynatemp_range": 1}, False),
        ({"temperature": 0, "mirostat": 2}, False),
        ({"temperature": 0, "mirostat": 2, "seed": 1}, True),
        ({"temperature": 0, "max_tokens": -1}, False),  # it will be refused
    ],
)
def test_only_what_is_repeatable(fields: dict[str, Any], may: bool) -> None:
    assert (key_of({**HI, **fields}) is not None) is may


@pytest.mark.parametrize(
    ("route", "body", "may"),
    [
        ("/v1/embeddings", {"input": "a"}, True),
        ("/v1/rerank", {"query": "a", "documents": ["b"]}, True),
        ("/tokenize", {"content": "a"}, True),
        ("/detokenize", {"tokens": [1]}, True),
        ("/apply-template", HI, False),  # it may tell the date
        ("/v1/messages", HI, False),
        ("/v1/messages", GREEDY, True),
        ("/completion", {"prompt": "a", "temperature": 0}, True),
        ("/v1/responses", {"input": "a", "temperature": 0}, True),
    ],
)
def test_routes(route: str, body: dict[str, Any], may: bool) -> None:
    assert (key_of(body, route) is not None) is may


@pytest.mark.parametrize(
    ("header", "wish"),
    [
        ("", SILENT),
        ("no-cache", Wish(look=False)),
        ("No-Cache, foo", Wish(look=False)),
        ("no-store", Wish(look=False, keep=False)),
        ("max-age=0", Wish(look=False)),
        ("max-age=60", Wish(max_age=60)),
        ('max-age="60"', Wish(max_age=60)),
        ("max-age=99999999999999999999", Wish(max_age=1 << 31)),
        ("max-age=-1", SILENT),
        ("max-age=x, max-stale", SILENT),
        ("no-cache, max-age=60", Wish(look=False, max_age=60)),
    ],
)
def test_cache_control(header: str, wish: Wish) -> None:
    assert wish_of(header) == wish


def test_who_asks_for_an_old_answer_gets_one() -> None:
    assert key_of(HI) is None
    assert key_of(HI, cache=wish_of("max-age=60")) is not None
    assert key_of(HI, cache=wish_of("no-cache, max-age=60")) is None
    assert key_of(GREEDY, cache=wish_of("no-store")) is None
    assert key_of(GREEDY, cache=wish_of("no-cache")) == key_of(GREEDY)


@pytest.mark.parametrize(
    "fields",
    [
        {"user": "a"},
        {"metadata": {"a": "b"}},
        {"stream": False},
        {"stream_options": {"include_usage": True}},  # of a stream only
        {"model": "other name"},
        {"cache_prompt": False},
        {"top_p": None},
        {"temperature": 0.0},
        {"messages": [{"content": "hi", "role": "user"}]},
        {"max_tokens": None},
    ],
    ids=str,
)
def test_what_does_not_matter(fields: dict[str, Any]) -> None:
    assert key_of({**GREEDY, **fields}) == key_of(GREEDY)
    assert key_of(dict(reversed({**GREEDY, **fields}.items()))) == key_of(GREEDY)


@pytest.mark.parametrize(
    "fields",
    [
        {"stream": True},
        {"top_p": 0.5},
        {"seed": 1},
        {"max_tokens": 5},
        {"n": 2},
        {"stop": ["a"]},
        {"grammar": 'root ::= "a"'},
        {"tools": [{"type": "function", "function": {"name": "f"}}]},
        {"messages": [{"role": "user", "content": "Hi"}]},
        {"messages": [{"role": "system", "content": "hi"}]},
        {"messages": [{"role": "user", "content": "hi"}, {"role": "user", "content": "hi"}]},
        {"unknown": 1},
    ],
    ids=str,
)
def test_what_matters(fields: dict[str, Any]) -> None:
    other = key_of({**GREEDY, **fields})
    assert other is not None
    assert other != key_of(GREEDY)


def test_the_order_inside_a_schema_matters() -> None:
    """It is the order in which llama-server generates its fields."""
    orders: tuple[dict[str, Any], ...] = ({"a": {}, "b": {}}, {"b": {}, "a": {}})
    schemas = [
        key_of({**GREEDY, "response_format": {"type": "json_object", "schema": {"properties": order}}})
        for order in orders
    ]
    assert schemas[0] != schemas[1]


def test_bounds_of_the_answer() -> None:
    """Whatever it is called, and whoever says it."""
    assert key_of({**GREEDY, "max_completion_tokens": 5}) == key_of({**GREEDY, "max_tokens": 5})
    assert key_of({**GREEDY, "n_predict": 5, "max_tokens": 9}) == key_of({**GREEDY, "max_tokens": 5})
    assert key_of(GREEDY, max_tokens_default=5) == key_of({**GREEDY, "max_tokens": 5})
    assert key_of({**GREEDY, "max_tokens": 9}, max_tokens_limit=5) == key_of({**GREEDY, "max_tokens": 5})
    assert key_of({**GREEDY, "max_tokens": 9}) != key_of({**GREEDY, "max_tokens": 5})


def test_what_it_is_about_matters() -> None:
    call = call_of(GREEDY)
    request = request_of(call, call.fields, Settings())
    assert request is not None
    keys = {request.key("model", "file", "key"), request.key("model", "file", "other"), request.key("modelfile", "key")}
    assert len(keys) == 3


def test_too_large_or_no_json() -> None:
    assert key_of({**GREEDY, "x": "a" * (1 << 20)}) is None
    call = call_of(GREEDY)
    call.raw = b"form"
    assert request_of(call, call.fields, Settings()) is None
