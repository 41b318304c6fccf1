"""Media in requests of every dialect: found, checked, and replaced where it is only referred to."""

from __future__ import annotations

import base64
import json
import subprocess
import sys
from collections.abc import Sequence
from typing import Any, cast

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.errors import BadRequest
from gateway.pipeline.call import parse_json_object
from gateway.pipeline.dialects import Dialect
from gateway.pipeline.media.fetch import Fetched, MediaFetcher
from gateway.pipeline.media.find import MAX_NESTING, MAX_REFERENCES, Media, Reference, find_media, is_base64
from tests.fields import decoded
from tests.media_places import AT, B64, DATA, PLACES, URL, asked, filled, said

FETCHED = f"data:image/webp;base64,{base64.b64encode(b'fetched').decode()}"
BARE = base64.b64encode(b"fetched").decode()


class FakeFetcher:
    async def fetch(self, references: Sequence[Reference]) -> list[Fetched]:
        self.urls = [reference.url for reference in references]
        return [("image/webp", bytearray(b"fetched")) for _ in references]


def find(dialect: Dialect, body: object, *, allow_remote: bool = False) -> Media:
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    return find_media(parse_json_object(raw), dialect, allow_remote=allow_remote)


@pytest.mark.parametrize(("dialect", "body", "param", "bare"), PLACES)
def test_only_data_urls_unless_allowed(dialect: Dialect, body: dict[str, Any], param: str, bare: bool) -> None:
    for value in (
        URL,
        "HTTP://127.0.0.1/",
        "http://169.254.169.254/latest/meta-data",
        "file:///etc/passwd",
        "/etc/passwd.png",
    ):
        with pytest.raises(BadRequest) as refused:
            find(dialect, filled(body, value))
        assert refused.value.param == param
        assert "ALLOW_REMOTE_MEDIA" in refused.value.message or (bare and "base64" in refused.value.message)
    for value in (DATA, "data:audio/wav;base64,AAAA", "data:video/mp4;codecs=avc1;base64,AAA"):
        kept = find(dialect, filled(body, value))
        assert decoded(kept.fields) == filled(body, value)
        assert not kept.remote


@pytest.mark.parametrize(("dialect", "body", "param", "bare"), PLACES)
async def test_references_are_replaced(dialect: Dialect, body: dict[str, Any], param: str, bare: bool) -> None:
    media = find(dialect, filled(body, URL), allow_remote=True)
    assert [reference.param for reference in media.remote] == [param]
    fetcher = FakeFetcher()
    fields = await media.inlined(cast(MediaFetcher, fetcher))
    assert fetcher.urls == [URL]
    assert decoded(fields) == filled(body, BARE if bare else FETCHED)


@pytest.mark.parametrize(("dialect", "body", "param", "bare"), PLACES)
def test_base64_alone(dialect: Dialect, body: dict[str, Any], param: str, bare: bool) -> None:
    if bare:
        assert decoded(find(dialect, filled(body, B64)).fields) == filled(body, B64)
        values = ["", "=", "!!!!", f"{B64}\n", "-_-_", "httpAAAA", "https+++", "ÄÖÜß"]
    else:
        values = ["", B64, "iVBORw0KGgo="]
    for value in values:
        with pytest.raises(BadRequest) as refused:
            find(dialect, filled(body, value), allow_remote=True)
        assert refused.value.param == param


@pytest.mark.parametrize(
    "url",
    [
        "data:",
        "data:,",
        "data:image/png",
        "data:image/png,AAAA",
        "data:image/png;base64",
        "data:image/png;base64,",
        "data:image/png;base64,====",
        "data:image/png;base64,A",
        "data:image/png;base64,AA=",
        "data:image/png;base64,A===",
        "data:image/png;base64,AA==AA==",
        "data:image/png;base64,AA AA",
        "data:image/png;base64,AAAA\n",
        "data:image/png;base64,AA-_",
        "data:image/png;base64,AAAA,AAAA",
        "data:image/png;base64,%41%41%41%41",
        "data:image/png;base64;base64,AAAA",
        "data:image/;base64,AAAA",
        "data:;base64,AAAA",
        "data:base64,AAAA",
        "data:text/html;base64,AAAA",
        "data:application/pdf;base64,AAAA",
        "data:application/octet-stream;base64,AAAA",
        "DATA:image/png;base64,AAAA",
        "Data:image/png;base64,AAAA",
        " data:image/png;base64,AAAA",
        "data: image/png;base64,AAAA",
        "data:image/png;base64 ,AAAA",
        "data:imäge/png;base64,AAAA",
        "data:image/png;base64,ÄAAA",
    ],
)
@pytest.mark.parametrize("allow_remote", [False, True])
def test_data_urls_that_are_none(url: str, allow_remote: bool) -> None:
    with pytest.raises(BadRequest) as refused:
        find(Dialect.CHAT, said({"type": "image_url", "image_url": {"url": url}}), allow_remote=allow_remote)
    assert refused.value.param == f"{AT}.image_url"


@pytest.mark.parametrize(
    "url",
    [
        "https://u:p@a.org/",
        "http://2130706433/",
        "http://localhost/",
        "http://a.org:22/",
        "file:///x",
        "ftp://a.org/",
        "a.png",
    ],
)
def test_bad_urls_are_refused_before_anything_is_fetched(url: str) -> None:
    with pytest.raises(BadRequest) as refused:
        find(Dialect.CHAT, said({"type": "image_url", "image_url": {"url": url}}), allow_remote=True)
    assert refused.value.param == f"{AT}.image_url"


@pytest.mark.parametrize(
    "body",
    [
        b'{"messages":[{"role":"user","content":[{"type":"image_url","image\\u005furl":{"ur\\u006c":"%"}}]}]}',
        b'{"messages":[{"role":"user","c\\u006fntent":[{"type":"image_url","image_url":{"url":"\\u0068ttp\\u003a//a.org"}}]}]}',
        b'{"m\\u0065ssages":[{"role":"user","content":[{"type":"image_url","image_url":{"url":"%"}}]}]}',
        b'{"messages" : [ { "content" :\n[\t{"image_url"\r: { "url" : "%" } } ] } ] }',
    ],
)
def test_escapes_and_spaces_hide_nothing(body: bytes) -> None:
    with pytest.raises(BadRequest, match="only data: URLs"):
        find(Dialect.CHAT, body.replace(b"%", URL.encode()))


@pytest.mark.parametrize(
    ("dialect", "body", "left"),
    [
        (
            Dialect.CHAT,
            b'{"messages":[{"content":[{"image_url":{"url":"http://a"},"image_url":{"url":"http://b","url":"%"}}]}]}',
            b'{"messages":[{"content":[{"image_url":{"url":"%"}}]}]}',
        ),
        (
            Dialect.CHAT,
            b'{"messages":[{"content":[{"image_url":{"url":"http://a"}}],"content":"text"}]}',
            b'{"messages":[{"content":"text"}]}',
        ),
        (
            Dialect.MESSAGES,
            b'{"messages":[{"content":[{"source":{"type":"url","url":"http://a","type":"base64","url":null,"data":"AAAA"}}]}]}',
            b'{"messages":[{"content":[{"source":{"type":"base64","url":null,"data":"AAAA"}}]}]}',
        ),
        (
            Dialect.NATIVE,
            b'{"prompt":{"multimodal_data":["http://a"],"multimodal_data":["AAAA"]}}',
            b'{"prompt":{"multimodal_data":["AAAA"]}}',
        ),
    ],
)
def test_of_repeated_names_only_the_one_that_was_checked_goes_on(dialect: Dialect, body: bytes, left: bytes) -> None:
    fields = find(dialect, body.replace(b"%", DATA.encode())).fields
    assert msgspec.json.encode(fields) == left.replace(b"%", DATA.encode())


@pytest.mark.parametrize(
    ("dialect", "body"),
    [
        (Dialect.CHAT, {}),
        (Dialect.CHAT, {"messages": None}),
        (Dialect.CHAT, {"messages": []}),
        (Dialect.CHAT, {"messages": [{"role": "user", "content": "see http://127.0.0.1/ and data:"}]}),
        (Dialect.CHAT, {"messages": [{"role": "user", "content": None}, {"role": "assistant", "audio": {"id": "a"}}]}),
        (Dialect.CHAT, {"messages": [{"role": "user", "content": "x", "avatar_url": URL, "file": "a.txt"}]}),
        (Dialect.CHAT, said({"type": "text", "text": URL})),
        (Dialect.CHAT, said({"type": "image_url"})),
        (Dialect.CHAT, said({"type": "image_url", "image_url": None})),
        (Dialect.CHAT, said({"type": "image_url", "image_url": {"url": None}})),
        (Dialect.CHAT, said({"type": "file", "file": {"file_id": "f"}})),
        (
            Dialect.CHAT,
            {"messages": [{"role": "assistant", "tool_calls": [{"function": {"arguments": {"image_url": URL}}}]}]},
        ),
        (
            Dialect.CHAT,
            {"tools": [{"function": {"parameters": {"properties": {"image_url": {"url": URL}}}}}], "messages": []},
        ),
        (Dialect.MESSAGES, {"system": "x", "messages": [{"role": "user", "content": "x"}]}),
        (Dialect.MESSAGES, said({"type": "tool_use", "input": {"image_url": URL, "content": [{"image_url": URL}]}})),
        (Dialect.MESSAGES, said({"type": "search_result", "source": URL, "content": [{"type": "text", "text": "a"}]})),
        (
            Dialect.MESSAGES,
            said({"type": "web_search_tool_result", "content": [{"type": "web_search_result", "url": URL}]}),
        ),
        (
            Dialect.MESSAGES,
            said({"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": B64}}),
        ),
        (Dialect.MESSAGES, said({"type": "image", "source": {"type": "base64", "data": B64}})),
        (
            Dialect.MESSAGES,
            said({"type": "document", "source": {"type": "text", "media_type": "text/plain", "data": "hi!"}}),
        ),
        (Dialect.RESPONSES, {"input": "http://a.org/"}),
        (Dialect.RESPONSES, asked({"type": "output_text", "annotations": [{"type": "url_citation", "url": URL}]})),
        (Dialect.RESPONSES, {"input": [{"type": "function_call", "arguments": '{"image_url": 1}'}]}),
        (Dialect.NATIVE, {"prompt": "http://a.org/"}),
        (Dialect.NATIVE, {"prompt": [1, 2, 3]}),
        (Dialect.NATIVE, {"prompt": ["a {", [1], 2]}),
        (Dialect.NATIVE, {"prompt": {"prompt_string": "{}"}, "image_data": [], "multimodal_data": {}}),
        (Dialect.EMBEDDINGS, {"input": ["a", "b"], "messages": said({"image_url": URL})["messages"]}),
        (Dialect.DETOKENIZE, {"tokens": [1], "content": {"image_url": URL}}),
        (Dialect.TRANSCRIPTIONS, {}),
    ],
)
def test_what_is_none_of_our_business_passes_unchanged(dialect: Dialect, body: dict[str, Any]) -> None:
    assert decoded(find(dialect, body).fields) == body


@pytest.mark.parametrize(
    ("dialect", "body", "param"),
    [
        (Dialect.CHAT, {"messages": ["x"]}, "messages"),
        (Dialect.CHAT, {"messages": [{"content": ["x"]}]}, "messages[0].content"),
        (Dialect.CHAT, {"messages": [{"content": [[{"image_url": URL}]]}]}, "messages[0].content"),
        (Dialect.CHAT, said({"image_url": [URL]}), f"{AT}.image_url"),
        (Dialect.CHAT, said({"image_url": 1}), f"{AT}.image_url"),
        (Dialect.CHAT, said({"image_url": {"url": {"url": URL}}}), f"{AT}.image_url.url"),
        (Dialect.CHAT, said({"input_audio": {"data": False}}), f"{AT}.input_audio.data"),
        (Dialect.MESSAGES, said({"source": {"type": 1, "data": URL}}), f"{AT}.source.type"),
        (Dialect.MESSAGES, said({"source": {"type": "base64", "data": URL}}), f"{AT}.source"),
        (
            Dialect.MESSAGES,
            said({"source": {"type": "base64", "data": B64, "media_type": "application/pdf"}}),
            f"{AT}.source",
        ),
        (
            Dialect.MESSAGES,
            said({"source": {"type": "base64", "data": B64, "media_type": "image/png;x"}}),
            f"{AT}.source",
        ),
        (Dialect.NATIVE, {"prompt": {"multimodal_data": [1]}}, "prompt.multimodal_data[0]"),
    ],
)
def test_wrong_types(dialect: Dialect, body: dict[str, Any], param: str) -> None:
    with pytest.raises(BadRequest) as refused:
        find(dialect, body)
    assert refused.value.param == param


@pytest.mark.parametrize("marker", ["<__media__>", "<__media_DjR1hsxRdC62jl3a4znRV8Fnf1x9pnmQ__>"])
def test_a_prompt_that_ends_with_media_would_end_llama_server(marker: str) -> None:
    """Sent straight to build 11669: GGML_ASSERT(batch.size() > 0) failed, and the process is gone."""
    find(Dialect.NATIVE, {"prompt": {"prompt_string": f"{marker} a", "multimodal_data": [B64]}})
    deadly = {"prompt_string": f"a {marker}", "multimodal_data": [B64]}
    for prompt in (deadly, ["b", deadly]):
        with pytest.raises(BadRequest, match="must not end with media"):
            find(Dialect.NATIVE, {"prompt": prompt})


def test_lone_surrogates_are_a_bad_request() -> None:
    with pytest.raises(BadRequest):
        find(Dialect.CHAT, b'{"messages":[{"content":[{"image_url":{"url":"\\ud800"}}]}]}')


def test_nesting_is_bounded() -> None:
    part: dict[str, Any] = {"image_url": DATA}
    for _ in range(MAX_NESTING - 1):
        part = {"content": [part]}
    find(Dialect.MESSAGES, said(part))
    with pytest.raises(BadRequest, match="nested"):
        find(Dialect.MESSAGES, said({"content": [part]}))


def test_references_are_counted() -> None:
    part = {"image_url": {"url": URL}}
    many = {"messages": [{"content": [part] * MAX_REFERENCES}]}
    assert len(find(Dialect.CHAT, many, allow_remote=True).remote) == MAX_REFERENCES
    many["messages"].append({"content": [part]})
    with pytest.raises(BadRequest, match="at most 16"):
        find(Dialect.CHAT, many, allow_remote=True)
    data = {"messages": [{"content": [{"image_url": {"url": DATA}}] * 100}]}
    assert not find(Dialect.CHAT, data, allow_remote=True).remote


def test_the_request_itself_is_not_changed() -> None:
    fields = parse_json_object(json.dumps(said({"image_url": {"url": DATA}})).encode())
    before = dict(fields)
    find_media(fields, Dialect.CHAT, allow_remote=False)
    assert fields == before


@given(st.binary(max_size=50))
def test_base64_of_anything(data: bytes) -> None:
    text = base64.b64encode(data).decode()
    assert is_base64(text) is bool(data)
    assert is_base64(text.rstrip("=")) is bool(data)


def test_importing_it_does_not_import_the_client() -> None:
    code = (
        "import sys, gateway.pipeline.media.find\n"
        "from gateway.pipeline.media.fetch import MediaFetcher\nMediaFetcher()\n"
        "sys.exit(bool({'aiohttp', 'yarl'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
