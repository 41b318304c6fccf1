"""What llama-server is given in place of a URL, on each route that takes media; needs a projector, which is a toy.

Why the shield: sent straight to build 11669, each of these (but the last) made llama-server itself get the URL from
127.0.0.1, also behind a redirect, written with escapes (`image\\u005furl`), in tool, system and assistant messages, as
`video_url` and `input_video`, and for /apply-template and /v1/messages/count_tokens, which generate nothing. `file://`
was refused for want of --media-path, `HTTP://` and ` http://` read as base64, `httpAAAA` a 500.
"""

from __future__ import annotations

import struct
import threading
import zlib
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import msgspec
import pytest

from gateway.errors import BadRequest
from gateway.pipeline.call import parse_json_object
from gateway.pipeline.dialects import Dialect
from gateway.pipeline.media.fetch import MediaFetcher
from gateway.pipeline.media.find import find_media
from tests.fields import decoded
from tests.real.llama import Llama, running_llama
from tests.real.projector import make_projector

pytestmark = pytest.mark.real


def png(side: int = 28) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    rows = (b"\0" + b"\x80" * (3 * side)) * side
    head = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


class Origin(BaseHTTPRequestHandler):
    hits: list[str]

    def do_GET(self) -> None:
        self.hits.append(self.headers.get("User-Agent", ""))
        body = png()
        self.send_response(200)
        self.send_header("Content-Type", "image/png")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture(scope="module")
def seeing(tmp_path_factory: pytest.TempPathFactory, chat_model: Path) -> Iterator[Llama]:
    projector = tmp_path_factory.mktemp("projector") / "mmproj.gguf"
    make_projector(projector)
    with running_llama(chat_model, "--mmproj", str(projector)) as llama:
        yield llama


@pytest.fixture
def origin() -> Iterator[str]:
    """Its URL; `Origin.hits` says who has asked it."""
    Origin.hits = []
    with ThreadingHTTPServer(("127.0.0.1", 0), Origin) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/a.png"
        server.shutdown()


def said(part: dict[str, Any], role: str = "user") -> dict[str, Any]:
    return {"max_tokens": 1, "messages": [{"role": role, "content": [part, {"type": "text", "text": "?"}]}]}


def asked(*items: dict[str, Any]) -> dict[str, Any]:
    return {"max_output_tokens": 1, "input": [{"role": "user", "content": "?"}, *items]}


def requests(url: str, marker: str) -> list[tuple[str, Dialect, dict[str, Any]]]:
    image = {"type": "image", "source": {"type": "url", "url": url}}
    result = {"type": "tool_result", "tool_use_id": "a", "content": [image]}
    picture = {"type": "input_image", "image_url": url}
    return [
        ("/v1/chat/completions", Dialect.CHAT, said({"type": "image_url", "image_url": {"url": url}})),
        ("/v1/chat/completions", Dialect.CHAT, said({"type": "image_url", "image_url": {"url": url}}, "system")),
        ("/apply-template", Dialect.APPLY_TEMPLATE, said({"type": "image_url", "image_url": {"url": url}})),
        ("/v1/messages", Dialect.MESSAGES, said(image)),
        ("/v1/messages", Dialect.MESSAGES, said(result)),
        ("/v1/messages/count_tokens", Dialect.COUNT_TOKENS, said(image)),
        ("/v1/responses", Dialect.RESPONSES, asked({"role": "user", "content": [picture]})),
        (
            "/v1/responses",
            Dialect.RESPONSES,
            asked({"type": "function_call_output", "call_id": "a", "output": [picture]}),
        ),
        (
            "/completion",
            Dialect.NATIVE,
            {"n_predict": 1, "prompt": {"prompt_string": f"{marker}?", "multimodal_data": [url]}},
        ),
    ]


async def test_llama_server_takes_what_was_fetched_for_it(seeing: Llama, origin: str) -> None:
    fetcher = MediaFetcher(allowed=lambda address: address == "127.0.0.1")
    marker = msgspec.json.decode(seeing.request("GET", "/props")[1])["media_marker"]
    sent = requests(origin, marker)
    for path, dialect, body in sent:
        fields = parse_json_object(msgspec.json.encode(body))
        with pytest.raises(BadRequest, match=r"data: URLs|base64"):
            find_media(fields, dialect, allow_remote=False)
        inlined = await find_media(fields, dialect, allow_remote=True).inlined(fetcher)
        status, answer = seeing.post(path, decoded(inlined))
        assert status == 200, (path, answer)
    assert Origin.hits == ["corral"] * len(sent)
