"""Media through the whole gateway: llama-server fetches nothing, and data: URLs reach a model that sees."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.house import Gateway, running_gateway
from tests.real.projector import make_projector
from tests.real.test_errors import check
from tests.real.test_media_inlined import Origin, origin, png, requests, said

__all__ = ["origin"]

pytestmark = [pytest.mark.real, pytest.mark.timeout(60)]


@pytest.fixture(scope="module", params=["false", "true"], ids=["closed", "open"])
def seeing(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, chat_model: Path
) -> Iterator[Gateway]:
    """ALLOW_REMOTE_MEDIA closed and open; a projector lies beside the model, so that it sees."""
    folder = tmp_path_factory.mktemp("models") / "seeing"
    folder.mkdir()
    (folder / "model.gguf").symlink_to(chat_model)
    make_projector(folder / "mmproj-model.gguf")
    with running_gateway(
        tmp_path_factory.mktemp("run"), MODEL_PATH=str(folder), ALLOW_REMOTE_MEDIA=request.param
    ) as gateway:
        yield gateway


def test_nothing_on_this_machine_is_fetched(seeing: Gateway, origin: str) -> None:
    pid = seeing.model()["pid"]
    for path, _, body in requests(origin, "<__media__>"):
        for stream in (False, True):
            refused = seeing.request("POST", path, body | {"stream": stream})
            assert refused.status == 400, (path, refused.body)
    assert Origin.hits == []
    assert seeing.model()["pid"] == pid


def test_a_data_url_reaches_the_model(seeing: Gateway) -> None:
    url = "data:image/png;base64," + base64.b64encode(png()).decode()
    answer = seeing.request("POST", "/v1/chat/completions", said({"type": "image_url", "image_url": {"url": url}}))
    assert answer.status == 200, answer.body
    assert seeing.model()["model_id"] == "seeing"


def test_an_image_that_becomes_too_large_is_refused(seeing: Gateway) -> None:
    """420 KB as they come. Sent straight to build 11669: 880 MB, and up to 6 s."""
    pid = seeing.model()["pid"]
    url = "data:image/png;base64," + base64.b64encode(png(12_000)).decode()
    answer = seeing.request("POST", "/v1/chat/completions", said({"type": "image_url", "image_url": {"url": url}}))
    assert "megapixels" in check(answer, 400, "invalid_request", "messages[0].content[0].image_url")
    assert seeing.model()["pid"] == pid
