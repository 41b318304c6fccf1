import json
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.pipeline.frames import Frame, FrameParser, FrameTooLarge


def parse(data: bytes, cuts: list[int] | None = None, **kwargs: int) -> list[Frame]:
    parser = FrameParser(**kwargs)
    edges = [0, *sorted(cut % (len(data) + 1) for cut in cuts or []), len(data)]
    return [frame for begin, end in pairwise(edges) for frame in parser.feed(data[begin:end])]


@pytest.mark.parametrize(
    ("data", "frames"),
    [
        (b"data: a\n\n", [Frame(None, b"a")]),
        (b"data:a\n\ndata:  b\n\n", [Frame(None, b"a"), Frame(None, b" b")]),
        (b"event: error\ndata: {}\n\n", [Frame("error", b"{}")]),
        (b"event: error\r\ndata: {}\r\n\r\n", [Frame("error", b"{}")]),
        (b"data: a\ndata: b\n\n", [Frame(None, b"a\nb")]),
        (b": ping\n\n: ping\ndata: a\n\n", [Frame(None, b"a")]),
        (b"id: 7\nretry: 5\nunknown\ndata: a\n\n", [Frame(None, b"a")]),
        (b"event: lost\n\ndata: a\n\n", [Frame(None, b"a")]),
        (b"data\n\n", [Frame(None, b"")]),
        (b"data: [DONE]\n\n\n\n", [Frame(None, b"[DONE]")]),
        (b"data: half", []),
        (b"data: no blank line\n", []),
        (b"", []),
    ],
)
def test_frames(data: bytes, frames: list[Frame]) -> None:
    assert parse(data) == frames
    assert parse(data, list(range(len(data)))) == frames


def test_pending_tells_of_an_unfinished_frame() -> None:
    parser = FrameParser()
    assert not parser.pending
    for piece, pending in ((b"da", True), (b"ta: x\n", True), (b"\n", False), (b"event: e\n", True), (b"\n", False)):
        parser.feed(piece)
        assert parser.pending is pending


@pytest.mark.parametrize("piece", [b"x" * 10, b"data: " + b"x" * 30 + b"\n", b"event: xx\n"])
def test_a_frame_has_a_bound(piece: bytes) -> None:
    parser = FrameParser(max_frame=100)
    with pytest.raises(FrameTooLarge):
        for _ in range(100):
            parser.feed(piece)


def test_many_frames_have_no_bound_together() -> None:
    parser = FrameParser(max_frame=100)
    for _ in range(100):
        assert parser.feed(b": a comment of some length\ndata: " + b"x" * 80) == []
        assert len(parser.feed(b"\n\n")) == 1


names = st.one_of(st.none(), st.text("abc._", min_size=1))
payloads = st.recursive(st.none() | st.text(), lambda inner: st.lists(inner), max_leaves=5).map(json.dumps)


@settings(deadline=None)  # a busy machine is no failure
@given(
    events=st.lists(st.tuples(names, payloads, st.sampled_from(["\n", "\r\n"]), st.booleans())),
    cuts=st.lists(st.integers(0, 10_000)),
)
def test_cut_anywhere(events: list[tuple[str | None, str, str, bool]], cuts: list[int]) -> None:
    text = ""
    for name, payload, newline, ping in events:
        text += f": ping{newline}{newline}" if ping else ""
        text += f"event: {name}{newline}" if name else ""
        text += f"data: {payload}{newline}{newline}"
    expected = [Frame(name, payload.encode()) for name, payload, *_ in events]
    assert parse(text.encode(), cuts) == expected


@settings(deadline=None)  # a busy machine is no failure
@given(st.binary(), st.lists(st.integers(0, 10_000)))
def test_garbage_cut_anywhere_is_read_the_same(data: bytes, cuts: list[int]) -> None:
    assert parse(data, cuts) == parse(data)
