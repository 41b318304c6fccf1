"""A request's line in the log, as usual or as its client asks for it (X-Log-Level, ?log=, X-Log-Infer)."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING

import msgspec

from gateway.logs import LateRecord
from gateway.pipeline.transcript import prompt_said

if TYPE_CHECKING:
    from gateway.pipeline.account import Record

log = logging.getLogger("corral.requests")

LEVELS = ("off", "error", "info", "debug")
MOST_VALUE, MOST_PROMPT = 200, 4096  # characters
# What steers the model, and holds no prompt. Other fields are not logged.
PARAMETERS = frozenset(
    (
        "cache_prompt dimensions dry_allowed_length dry_base dry_multiplier dry_penalty_last_n dynatemp_exponent "
        "dynatemp_range encoding_format frequency_penalty ignore_eos logprobs max_completion_tokens "
        "max_output_tokens max_tokens min_keep min_p mirostat mirostat_eta mirostat_tau n n_cmpl n_keep n_predict "
        "n_probs parallel_tool_calls presence_penalty reasoning_effort reasoning_format repeat_last_n repeat_penalty "
        "samplers seed stop stop_sequences stream temperature tool_choice top_k top_logprobs top_n top_n_sigma top_p "
        "typical_p xtc_probability xtc_threshold"
    ).split()
)


def wishes(level: str | None, infer: bool, failed: bool) -> tuple[bool, bool]:
    """Whether there is a line about a request, and whether with its parameters and timings.

    `level` None is the usual one; `infer` adds to a line and makes none where there would be none.
    """
    line = level in (None, "info", "debug") or (level == "error" and failed)
    return line, line and (infer or level == "debug")


class Line(LateRecord):
    """A request's, as usual."""

    name = log.name

    def __init__(self, record: Record, now: float) -> None:
        self.created = now
        self.record = record
        self.request_id, self.key_id, self.model = record.request_id, record.key_id, record.model

    def words(self) -> str:
        record = self.record
        error = f", {record.error}" if record.error else ""
        return (
            f"{record.method} {record.route} {record.status} {record.duration_ms:.1f} ms, queue {record.queue_ms:.1f}, "
            f"tokens {record.usage.prompt}+{record.usage.completion}{error}"
        )


class FullLine(Line):
    """With timings and parameters; with the prompt where AUDIT_CONTENT is full."""

    def __init__(
        self, record: Record, now: float, fields: Mapping[str, msgspec.Raw], *, with_prompt: bool = False
    ) -> None:
        super().__init__(record, now)
        self._fields = dict(fields)
        self._with_prompt = with_prompt

    def words(self) -> str:
        record, usage = self.record, self.record.usage
        first = f"{record.ttft_ms:.1f}" if record.ttft_ms is not None else "none"
        words = [
            f"{super().words()}, load {record.load_ms:.1f}, first token {first}, model {record.model_ms:.1f}, "
            f"cached {usage.cached}, {'stream' if record.stream else 'whole'}",
            f"parameters {parameters(self._fields)}",
        ]
        if record.model_ms and usage.completion:
            words.insert(1, f"{usage.completion / record.model_ms * 1000:.1f} tokens a second")
        if self._with_prompt and (prompt := prompt_said(self._fields)) is not None:
            words.append(f"prompt {prompt[: 4 * MOST_PROMPT].decode(errors='replace')[:MOST_PROMPT]}")
        return ", ".join(words)


def parameters(fields: Mapping[str, msgspec.Raw]) -> str:
    """As JSON, in the order of their names; a long value is cut."""
    shown = []
    for name in sorted(PARAMETERS & fields.keys()):
        value = bytes(fields[name]).decode(errors="replace")
        if len(value) > MOST_VALUE:
            value = json.dumps(f"{value[:MOST_VALUE]}…", ensure_ascii=False)
        shown.append(f'"{name}":{value}')
    return f"{{{','.join(shown)}}}"
