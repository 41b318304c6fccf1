"""Workers behind NATS, asked by `corral chat`."""

from __future__ import annotations

import asyncio
import importlib.util
from typing import Any

from gateway.cli.chat.talk import Emit, Piece, Talk, Told, with_mend
from gateway.cli.client import Failed, Refused, Unreachable
from gateway.errors import ConfigError
from gateway.models.subjects import subject_name
from gateway.pipeline.identity import new_request_id


class Workers:
    """Asked by jobs on `subject`, or on that of the talk's model. Raises Failed where neither is given."""

    def __init__(self, urls: str, subject: str | None, talk: Talk, silence: float) -> None:
        if subject is None and talk.model is None:
            raise Failed("whom to ask by NATS? give --model ID, or --subject", 2)
        if importlib.util.find_spec("nats") is None:
            raise Failed("NATS needs nats-py: pip install 'corral[nats]'")
        from gateway.environment import load_settings
        from gateway.workers.nats.link import servers_of

        try:
            self._servers = servers_of(urls)
        except ConfigError as error:
            raise Failed(str(error).replace("NATS_URL", "--nats"), 2) from None
        if subject is not None and (not subject.strip() or any(c.isspace() or c in "*>" for c in subject)):
            raise Failed(f"--subject {subject!r} is no subject of a job; such as: inference.request.qwen-7b", 2)
        self._creds = load_settings().nats_creds_file
        self._fixed, self._silence = subject, silence

    def answer(self, talk: Talk, emit: Emit) -> Told:
        from gateway.workers.nats.ask import ask
        from gateway.workers.nats.layout import REQUEST_SUBJECT
        from gateway.workers.nats.link import Away

        subject = self._fixed or REQUEST_SUBJECT + subject_name(talk.model or "")
        job = {"messages": talk.messages(), "params": talk.params, "stream": True, "req_id": new_request_id()}
        shown: list[str] = []

        def take(token: str) -> None:
            shown.append(token)
            emit(Piece(token))

        try:
            with asyncio.Runner() as runner:  # Ctrl-C cancels what it runs
                told = runner.run(ask(self._servers, self._creds, subject, job, self._silence, take))
        except Away as error:
            raise Unreachable(f"NATS: {error}; see --nats and --subject") from None
        return _told(told, "".join(shown), emit)

    def models(self) -> list[str]:
        return []

    def choose(self, talk: Talk, model: str) -> None:
        if self._fixed is not None:
            raise Failed("--subject says where all jobs go; start with --model instead to choose others")
        talk.model = model


def _told(told: dict[str, Any], shown: str, emit: Emit) -> Told:
    """Raises Refused."""
    error = told.get("error")
    if isinstance(error, dict):
        raise with_mend(Refused(str(error.get("message")), str(error.get("code"))))
    text = str(told.get("text", ""))
    if text.startswith(shown) and text != shown:  # tokens may have gone astray, the answer has not
        emit(Piece(text[len(shown) :]))
    tokens = told.get("tokens_out")
    return Told(tokens if isinstance(tokens, int) else None)
