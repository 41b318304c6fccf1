"""The health server's variables. Only real ones: entrypoint.sh hands on what stands in `.env`.

Plain classes here and in the whole package: importing `dataclasses` or `pathlib` costs 5 to 10 of the 20 ms of a start.
"""

from __future__ import annotations

from collections.abc import Mapping


class WrongSetting(Exception):
    """A variable cannot be used; the message is the one line that the operator sees."""


class Settings:
    __slots__ = ("host", "liveness", "port", "stale_after", "state_file")

    def __init__(self, *, host: str, port: int, stale_after: float, liveness: bool, state_file: str) -> None:
        self.host = host
        self.port = port
        self.stale_after = stale_after  # seconds
        self.liveness = liveness
        self.state_file = state_file


def read_settings(env: Mapping[str, str]) -> Settings:
    """An empty variable counts as unset. Raises WrongSetting."""

    def value(name: str, default: str) -> str:
        return env.get(name, "").strip() or default

    return Settings(
        host=value("HOST", "0.0.0.0"),
        port=_port(value("PORT_HEALTH", "8001")),
        stale_after=_stale_after(value("HEALTH_STALE_SECONDS", "10")),
        liveness=_liveness(value("HEALTH_MODE", "readiness")),
        state_file=value("STATE_FILE", ""),
    )


def _port(text: str) -> int:
    if text.isascii() and text.isdecimal() and len(text) <= 5 and 1 <= int(text) <= 65535:
        return int(text)
    raise WrongSetting(f"PORT_HEALTH={text!r}: must be a whole number from 1 to 65535")


def _stale_after(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if 0.1 <= seconds <= 3600:
        return seconds
    raise WrongSetting(f"HEALTH_STALE_SECONDS={text!r}: must be a number from 0.1 to 3600")


def _liveness(text: str) -> bool:
    if text.lower() in ("readiness", "liveness"):
        return text.lower() == "liveness"
    raise WrongSetting(f"HEALTH_MODE={text!r}: must be one of readiness, liveness")
