"""A whole answer out of a stream, as llama-server would have given it without streaming.

Why: a client that leaves a non-streaming request frees llama-server's slot only at the answer's natural end while
other requests run. So for one that wants a long answer in one piece a stream is asked for and put together here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gateway.pipeline.assemblers.base import Assembler, StreamCut, StreamFailed
from gateway.pipeline.assemblers.choices import Chat, Completions
from gateway.pipeline.assemblers.events import Messages, Responses
from gateway.pipeline.assemblers.native import Native
from gateway.pipeline.dialects import Dialect

__all__ = ["Assembler", "StreamCut", "StreamFailed", "assembler"]

_KINDS: dict[Dialect, type[Assembler]] = {
    Dialect.CHAT: Chat,
    Dialect.COMPLETIONS: Completions,
    Dialect.NATIVE: Native,
    Dialect.RESPONSES: Responses,
    Dialect.MESSAGES: Messages,
}


def assembler(dialect: Dialect, request: Mapping[str, Any]) -> Assembler:
    """An assembler for the stream that `dialect.ask_stream(request)` gives; `request` is what the client asked for.

    Where `dialect.assembles(request)` is false the answer will not be quite the one of the same request without
    streaming. Dialects that do not generate raise KeyError.
    """
    return _KINDS[dialect](request)
