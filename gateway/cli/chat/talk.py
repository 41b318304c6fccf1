"""A conversation, and who is asked: a gateway by HTTP, or its workers by NATS."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

from gateway.cli.client import Client, Failed, Refused

Message = dict[str, str]
Emit = Callable[["Piece"], None]
_MENDS = {
    "context_length_exceeded": "in a talk, /clear begins anew",
    "model_not_found": "see: corral models list; set --model",
    "grammar_not_found": "a text with ::= is a grammar itself, @FILE reads one",
}


class Piece(NamedTuple):
    """Some text of an answer, or of the thoughts before it."""

    text: str
    kind: Literal["answer", "thought"] = "answer"


@dataclass
class Told:
    """What an answer took, as far as it is known."""

    tokens: int | None = None
    finish_reason: str | None = None


@dataclass
class Talk:
    """What has been said, and how answers shall be."""

    model: str | None = None
    system: str | None = None
    params: dict[str, Any] = field(default_factory=dict)
    turns: list[Message] = field(default_factory=list)

    def messages(self) -> list[Message]:
        return ([{"role": "system", "content": self.system}] if self.system else []) + self.turns


class Asked(Protocol):
    """Whom to ask; both raise Failed."""

    def answer(self, talk: Talk, emit: Emit) -> Told:
        """Calls `emit` with each piece as it comes. Ctrl-C ends the answer where it is made, too."""

    def models(self) -> list[str]:
        """Those that may be chosen; empty where that cannot be known."""

    def choose(self, talk: Talk, model: str) -> None:
        """The model for the next answers."""


class Gateway:
    """Asked by HTTP."""

    def __init__(self, client: Client, silence: float) -> None:
        self._client, self._silence = client, silence

    def answer(self, talk: Talk, emit: Emit) -> Told:
        body = {"messages": talk.messages(), "stream": True} | talk.params
        if talk.model is not None:
            body["model"] = talk.model
        told = Told()
        try:
            with contextlib.closing(self._client.answer("/v1/chat/completions", body, self._silence)) as events:
                for event in events:
                    _take(event, told, emit)
        except Refused as error:
            raise with_mend(error) from None
        return told

    def models(self) -> list[str]:
        return [str(row["id"]) for row in self._client.get("/v1/models")["data"]]

    def choose(self, talk: Talk, model: str) -> None:
        known = self._client.get("/v1/models")["data"]
        if not any(model in (row["id"], *row.get("meta", {}).get("aliases", ())) for row in known):
            raise Failed(f"there is no model {model!r}; there are: {', '.join(row['id'] for row in known)}")
        talk.model = model


def _take(event: Any, told: Told, emit: Emit) -> None:
    if not isinstance(event, dict):
        return
    for choice in event.get("choices") or ():
        delta = choice.get("delta") or {}
        if thought := delta.get("reasoning_content"):
            emit(Piece(thought, "thought"))
        if text := delta.get("content"):
            emit(Piece(text))
        told.finish_reason = choice.get("finish_reason") or told.finish_reason
    about = event.get("usage") or {}
    told.tokens = about.get("completion_tokens") or (event.get("timings") or {}).get("predicted_n") or told.tokens


def with_mend(error: Refused) -> Refused:
    mend = _MENDS.get(error.error_code)
    return Refused(f"{error}; {mend}", error.error_code) if mend else error


def read_grammar(given: str | None) -> str | None:
    """The text of a file for @FILE. Raises Failed."""
    if given is None or not given.startswith("@"):
        return given
    try:
        return Path(given[1:]).read_text()
    except (OSError, UnicodeDecodeError) as error:
        about = error.strerror if isinstance(error, OSError) else "is not UTF-8"
        raise Failed(f"--grammar {given}: {about}", 2) from None
