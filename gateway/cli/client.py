"""HTTP for commands that talk to a running gateway: JSON and event streams; every failure is one line with its mend."""

from __future__ import annotations

import contextlib
import http.client
import json
import re
import socket
import ssl
from collections.abc import Generator, Iterator
from typing import Any
from urllib.parse import quote, urlsplit

from gateway import __version__

TIMEOUT_SECONDS = 30.0
STREAM_SILENCE_SECONDS = 45.0  # three heartbeats
_KEY_MENDS = {
    "missing_api_key": "set --key or CORRAL_API_KEY",
    "invalid_api_key": "set --key or CORRAL_API_KEY",
    "expired_api_key": "set --key or CORRAL_API_KEY",
    "insufficient_scope": "use a key with scope=admin",
}


class Failed(Exception):
    """Ends the command with a line on stderr and an exit code: 1 failed, 2 used wrongly."""

    def __init__(self, message: str, code: int = 1) -> None:
        super().__init__(one_line(message))
        self.code = code


class Unreachable(Failed):
    """Nobody answers, or the connection broke: it may be better in a moment."""


class Refused(Failed):
    """The gateway answered with an error; `error_code` is its code."""

    def __init__(self, message: str, error_code: str) -> None:
        super().__init__(message)
        self.error_code = error_code


def one_line(text: str) -> str:
    """What others sent may hold line ends and escape sequences, which a terminal would obey."""
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())


class Client:
    """A gateway at `url`. Nothing is kept open between two calls."""

    def __init__(self, url: str, key: str | None = None) -> None:
        """Raises Failed where the URL or the key cannot be one."""
        try:
            parts = urlsplit(url if "://" in url else f"http://{url}")
            port, wrong = parts.port, parts.scheme not in ("http", "https") or not parts.hostname
        except ValueError:  # a port or an address that cannot be
            wrong = True
        if wrong or any(c.isspace() or not c.isprintable() for c in url):
            raise Failed(f"'{url}' is no URL of a gateway; such as: --url http://127.0.0.1:8000", 2)
        if key is not None and not re.fullmatch(r"[!-~]+", key):
            raise Failed("the key has characters that no key has; see --key and CORRAL_API_KEY", 2)
        self._tls, self._host, self._port = parts.scheme == "https", parts.hostname or "", port
        self._base = parts.path.rstrip("/").removesuffix("/v1")  # people copy what their OpenAI client has
        self._key = key
        self.url = f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{self._base}"

    def get(self, path: str) -> Any:
        return self._json("GET", path, None, TIMEOUT_SECONDS)

    def post(self, path: str, body: Any, timeout: float | None = TIMEOUT_SECONDS, **headers: str) -> Any:
        """`timeout` in seconds bounds each silence; None: as long as it takes."""
        return self._json("POST", path, body, timeout, headers)

    def events(self, path: str) -> Iterator[tuple[str, Any]]:
        """(name, data) of each event, until the stream ends. Raises Failed."""
        for name, data in self._stream("GET", path, None, STREAM_SILENCE_SECONDS):
            yield name, self._parsed(path, 200, data)

    def answer(self, path: str, body: Any, silence: float) -> Generator[Any, None, None]:
        """The data of each event of an answer; leaving it early ends the answer at the gateway.

        `silence` in seconds bounds each. Raises Failed, also where the answer breaks off.
        """
        with contextlib.closing(self._stream("POST", path, body, silence)) as events:
            for _, data in events:
                if data == b"[DONE]":
                    return
                event = self._parsed(path, 200, data)
                if isinstance(event, dict) and "error" in event:
                    self._refused(path, 200, data)
                yield event
        raise Unreachable(f"{self.url}: the answer broke off; see the gateway's log")

    def _stream(self, method: str, path: str, body: Any, silence: float) -> Generator[tuple[str, bytes], None, None]:
        with self._reply(method, path, body, silence) as reply:
            if reply.status != 200:
                self._refused(path, reply.status, self._read(reply))
            with self._told(path):
                name, data = "message", ""
                while line := reply.readline():
                    field, _, value = line.decode("utf-8", "replace").rstrip("\r\n").partition(":")
                    value = value.removeprefix(" ")
                    if field == "event":
                        name = value
                    elif field == "data":
                        data += value
                    elif not field and not value and data:
                        yield name, data.encode()
                        name, data = "message", ""

    def _json(
        self, method: str, path: str, body: Any, timeout: float | None, headers: dict[str, str] | None = None
    ) -> Any:
        with self._reply(method, path, body, timeout, headers) as reply:
            content = self._read(reply)
            if not 200 <= reply.status < 300:
                self._refused(path, reply.status, content)
            return self._parsed(path, reply.status, content)

    @contextlib.contextmanager
    def _reply(
        self, method: str, path: str, body: Any, timeout: float | None, headers: dict[str, str] | None = None
    ) -> Iterator[http.client.HTTPResponse]:
        kind = http.client.HTTPSConnection if self._tls else http.client.HTTPConnection
        connection = kind(self._host, self._port, timeout=timeout)
        about = {"User-Agent": f"corral/{__version__}", "Connection": "close"}
        about |= {name.replace("_", "-"): value for name, value in (headers or {}).items()}
        if self._key:
            about["Authorization"] = f"Bearer {self._key}"
        if body is not None:
            about["Content-Type"] = "application/json"
        try:
            with self._told(path):
                connection.request(method, self._base + path, None if body is None else json.dumps(body), about)
                reply = connection.getresponse()
            yield reply
        finally:
            connection.close()

    def _read(self, reply: http.client.HTTPResponse) -> bytes:
        with self._told(""):
            return reply.read()

    @contextlib.contextmanager
    def _told(self, path: str) -> Iterator[None]:
        """The sockets' errors, as Failed."""
        try:
            yield
        except ConnectionRefusedError:
            raise Unreachable(f"no gateway at {self.url}: is it running? set --url") from None
        except socket.gaierror as error:
            raise Unreachable(f"{self.url}: {error.strerror or error}; set --url") from None
        except TimeoutError:
            raise Unreachable(f"{self.url}{path} has not answered in time; see its log, or set --url") from None
        except ssl.SSLError as error:
            raise Failed(f"{self.url}: {error.reason or error}; http:// or https://? set --url") from None
        except (OSError, http.client.HTTPException) as error:
            about = str(error) or type(error).__name__
            raise Unreachable(f"{self.url}: the connection broke ({about}); is it a gateway? see its log") from None

    def _parsed(self, path: str, status: int, content: bytes) -> Any:
        try:
            return json.loads(content)
        except (ValueError, RecursionError):
            raise Failed(f"{self.url}{path} answered {status}, but not as a gateway does; set --url") from None

    def _refused(self, path: str, status: int, content: bytes) -> None:
        """Raises Failed or Refused."""
        body = self._parsed(path, status, content)
        error = body.get("error") if isinstance(body, dict) else None
        if not isinstance(error, dict) or not isinstance(error.get("message"), str):
            raise Failed(f"{self.url}{path} answered {status}, but not as a gateway does; set --url")
        code = str(error.get("code"))
        mend = f"; {_KEY_MENDS[code]}" if code in _KEY_MENDS else ""
        raise Refused(f"{error['message']}{mend}", code)


def segment(name: str) -> str:
    """A model's name as one segment of a path."""
    return quote(name, safe="")
