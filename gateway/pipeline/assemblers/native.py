"""The assembler of llama-server's own dialect, /completion and /infill: text by answer, then one final event each."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from gateway.pipeline.assemblers.base import Assembler
from gateway.pipeline.usage import Usage


class Native(Assembler):
    """Its final event carries all but the text, the tokens and their probabilities.

    Nothing ends such a stream as a whole: it is finished when every answer is, and how many there are the request
    says. Several make a list.
    """

    def __init__(self, request: Mapping[str, Any]) -> None:
        super().__init__(request)
        self._text: dict[int, list[str]] = {}
        self._tokens: dict[int, list[int]] = {}
        self._probabilities: dict[int, list[Any]] = {}
        self._finals: dict[int, dict[str, Any]] = {}
        self._expected = _answers(request)

    @property
    def usage(self) -> Usage:
        return sum((Usage.of_final(final) for final in self._finals.values()), Usage())

    def _take(self, event: str | None, data: bytes) -> None:
        try:
            told = _token.decode(data)
        except msgspec.ValidationError:
            self._take_any(data)
            return
        self._text.setdefault(told.index, []).append(told.content)
        self._tokens.setdefault(told.index, []).extend(told.tokens)

    def _take_any(self, data: bytes) -> None:
        told = self._decode(data)
        if told is None or "prompt_progress" in told:  # that one has a token 0 that was never made
            return
        index = told.get("index", 0)
        self._text.setdefault(index, []).append(told["content"])
        self._tokens.setdefault(index, []).extend(told.get("tokens") or ())
        if probabilities := told.get("completion_probabilities"):
            self._probabilities.setdefault(index, []).extend(probabilities)
        if told["stop"]:
            self._finals[index] = told
            self.finished = len(self._finals) >= self._expected

    def _result(self) -> Any:
        results = [self._answer(index, final) for index, final in sorted(self._finals.items())]
        return results if len(results) > 1 else results[0]

    def _answer(self, index: int, final: dict[str, Any]) -> dict[str, Any]:
        answer = dict(final)
        answer["content"] = "".join(self._text[index])
        answer["tokens"] = self._tokens[index] if self.request.get("return_tokens") else []
        if isinstance(settings := answer.get("generation_settings"), dict):
            answer["generation_settings"] = settings | {"stream": False}
        if index in self._probabilities:
            answer["completion_probabilities"] = self._probabilities[index]
        fields = self.request.get("response_fields")
        return _only(fields, answer) if isinstance(fields, list) and fields else answer


def _answers(request: Mapping[str, Any]) -> int:
    """How many answers llama-server will give. A list of prompts gives one each, but with a number in it it is one."""
    prompt = request.get("prompt")
    prompts = 1
    if isinstance(prompt, list) and not any(isinstance(part, int) for part in prompt):
        prompts = max(1, len(prompt))
    each = request.get("n_cmpl", request.get("n"))
    return prompts * (each if isinstance(each, int) and each > 1 else 1)


def _only(fields: list[Any], answer: dict[str, Any]) -> dict[str, Any]:
    """`response_fields`: each a path like "timings/cache_n", which becomes the name; what is not there is left out."""
    chosen = {}
    for field in fields:
        value: Any = answer
        for name in str(field).split("/"):
            if not isinstance(value, dict) or name not in value:
                break
            value = value[name]
        else:
            chosen[str(field)] = value
    return chosen


class _Token(msgspec.Struct, forbid_unknown_fields=True):
    """The event of an ordinary token; all others, the final one among them, have more fields."""

    index: int
    content: str
    tokens: list[int]
    stop: bool
    id_slot: int
    tokens_predicted: int
    tokens_evaluated: int


_token = msgspec.json.Decoder(_Token)
