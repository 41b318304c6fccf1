"""Audio comes as a form: whom it asks for, and its wishes, are heeded as those of any other request."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.house import USER, Gateway, Response
from tests.real.status_kit import LIMITED, load, running_herd, state

pytestmark = pytest.mark.real

ROUTES = ("/v1/audio/transcriptions", "/audio/transcriptions")
KIND = {"Content-Type": "multipart/form-data; boundary=edge"}


@pytest.fixture(scope="module")
def herd(tmp_path_factory: pytest.TempPathFactory, chat_model: Path, embedding_model: Path) -> Iterator[Gateway]:
    with running_herd(tmp_path_factory.mktemp("herd"), chat_model, embedding_model) as running:
        yield running


def ask(gateway: Gateway, model: str, path: str = ROUTES[0], key: str = USER, **headers: str) -> Response:
    named = f'--edge\r\nContent-Disposition: form-data; name="model"\r\n\r\n{model}\r\n'.encode() if model else b""
    sound = (
        b'--edge\r\nContent-Disposition: form-data; name="file"; filename="a.wav"\r\nContent-Type: audio/wav\r\n\r\n'
        b"RIFF\r\n--edge--\r\n"
    )
    return gateway.request("POST", path, named + sound, key=key, headers=KIND | headers)


def refusal(reply: Response) -> tuple[int, str]:
    return reply.status, reply.json()["error"]["code"]


@pytest.mark.parametrize("path", ROUTES)
def test_the_model_that_the_form_names(herd: Gateway, path: str) -> None:
    load(herd, "b")
    assert refusal(ask(herd, "b", path)) == (501, "not_supported")  # it is asked, and hears nothing
    assert state(herd, "a") == "off"


def test_a_model_that_there_is_not(herd: Gateway) -> None:
    reply = ask(herd, "whisper-1")
    assert refusal(reply) == (404, "model_not_found")
    assert "whisper-1" in reply.json()["error"]["message"]
    assert refusal(ask(herd, "")) == (404, "model_not_found")
    told = ask(herd, "whisper-1", key=LIMITED).json()["error"]["message"]
    assert told.endswith("there are: b, broken")  # and nothing of those that this key may not use


def test_a_model_that_the_key_may_not_use(herd: Gateway) -> None:
    assert refusal(ask(herd, "a", key=LIMITED)) == (403, "model_not_allowed")
    assert state(herd, "a") == "off"


def test_its_headers_are_read(herd: Gateway) -> None:
    assert refusal(ask(herd, "b", **{"X-Request-Priority": "urgent"})) == (400, "invalid_request")
    assert refusal(ask(herd, "b", **{"X-Request-Timeout": "soon"})) == (400, "invalid_request")
