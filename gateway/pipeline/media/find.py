"""Images, audio and video that a request brings: found, checked, and put into it where it only refers to them.

Why: whatever a URL begins with `http`, llama-server fetches it, redirects and private addresses included, and with
--media-path it reads `file://`; on every route that takes messages, for templates and token counts too (build 11669
with a projector, llama.cpp #25002). So all it ever gets is the media itself.
"""

from __future__ import annotations

import binascii
import re
import string
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import msgspec

from gateway.errors import BadRequest
from gateway.pipeline.call import SLICE_BYTES, Fields, are_plain
from gateway.pipeline.dialects import Dialect
from gateway.pipeline.media.addresses import Refused, parse_target
from gateway.pipeline.media.images import MAX_PIXELS, pixels, pixels_of_base64

if TYPE_CHECKING:
    from gateway.pipeline.media.fetch import MediaFetcher

T = TypeVar("T")
Path = tuple[str | int, ...]

MAX_REFERENCES = 16  # to be fetched for one request
MAX_NESTING = 4  # lists of parts inside parts

# Where a dialect has lists of turns, each of which, and each part of it, may hold media; and where it has prompts: a
# text, tokens, {"prompt_string", "multimodal_data"}, or a list of such.
_PLACES: dict[Dialect, tuple[tuple[str, ...], tuple[str, ...]]] = {
    Dialect.CHAT: (("messages",), ()),
    Dialect.APPLY_TEMPLATE: (("messages",), ()),
    Dialect.MESSAGES: (("messages", "system"), ()),
    Dialect.COUNT_TOKENS: (("messages", "system"), ()),
    Dialect.RESPONSES: (("input",), ()),
    Dialect.COMPLETIONS: ((), ("prompt",)),
    Dialect.NATIVE: ((), ("prompt", "image_data", "multimodal_data")),
    Dialect.EMBEDDINGS: ((), ("input", "content")),
    Dialect.RERANK: ((), ("query", "documents", "texts")),
    Dialect.TOKENIZE: ((), ("content",)),
}
_PARTS = frozenset({"content", "output"})  # lists of further parts, such as a tool's result
_BARE = frozenset({"multimodal_data", "image_data"})  # lists of base64
# In turns and in parts; in parts also what is more common elsewhere, and any other …_url.
_MEDIA = frozenset({"image_url", "video_url", "audio_url", "file_url", "input_image", "input_audio", "input_video"})
_PART_MEDIA = frozenset({"image", "audio", "video", "file", "file_data"})
_INSIDE = ("url", "data", "file_url", "file_data")  # of an object under one of these names
_BASE64_KEYS = frozenset({"data", "file_data"})  # they may hold base64 without `data:` before it

_TYPE = re.compile(r"(?:image|audio|video)/[\w.+-]+", re.ASCII)
_DATA_URL = re.compile(r"data:(?:image|audio|video)/[\w.+-]+(?:;[\w.+-]+=[\w.+-]*)*;base64", re.ASCII)
_BASE64 = (string.ascii_letters + string.digits + "+/").encode()
_MARKER_AT_END = re.compile(r"<__media_\w*_>\Z")  # `<__media__>`, in later builds with random letters
_TEXT, _LIST, _OBJECT, _NULL = b'"[{n'

_turns = msgspec.json.Decoder(list[dict[str, msgspec.Raw]])
_items = msgspec.json.Decoder(list[msgspec.Raw])
_object = msgspec.json.Decoder(dict[str, msgspec.Raw])
_string = msgspec.json.Decoder(str)


@dataclass(frozen=True, slots=True)
class Reference:
    """A URL that stands in `holder[key]`, which may be replaced by what it refers to."""

    url: str
    param: str
    holder: Any
    key: Any
    bare: bool  # base64 alone belongs there, not a data: URL

    def put(self, media_type: str, data: bytes | bytearray) -> None:
        before = b'"' if self.bare else f'"data:{media_type};base64,'.encode()
        self.holder[self.key] = msgspec.Raw(before + binascii.b2a_base64(data, newline=False) + b'"')


class Media(msgspec.Struct):
    """The fields of a request whose media has been checked, and what of it has still to be fetched."""

    fields: Fields
    remote: list[Reference] = []
    roots: dict[str, Any] = {}  # the decoded fields, which the references point into
    pixels: int = 0  # of all its images, without what has still to be fetched

    async def inlined(self, fetcher: MediaFetcher) -> Fields:
        """The fields with the media in the place of its URLs. Raises BadRequest, QueueFull."""
        if not self.remote:
            return self.fields
        for reference, (media_type, data) in zip(self.remote, await fetcher.fetch(self.remote), strict=True):
            self.pixels += pixels(data)
            if self.pixels > MAX_PIXELS:
                raise BadRequest(f"{reference.param}: {_TOO_LARGE}", param=reference.param)
            reference.put(media_type, data)
        return self.fields | _encoded(self.roots)


def find_media(fields: Fields, dialect: Dialect, *, allow_remote: bool) -> Media:
    """Checks all media in a request's fields; nothing is fetched yet. Raises BadRequest.

    The fields that may hold media are encoded anew, so that a name that stands twice in an object, which parsers do
    not agree on, reaches llama-server only as it was checked.
    """
    turns, prompts = _PLACES.get(dialect, ((), ()))
    finder = _Finder(allow_remote)
    for name in turns:
        if (raw := fields.get(name)) is not None and _first(raw) == _LIST and not are_plain(raw):
            finder.roots[name] = finder.parts(raw, (name,), 0)
    for name in prompts:
        if (raw := fields.get(name)) is not None and _first(raw) in (_LIST, _OBJECT):
            finder.prompts(raw, name)
    if not finder.roots:
        return Media(fields)
    known = fields if finder.remote else fields | _encoded(finder.roots)
    return Media(known, finder.remote, finder.roots, finder.pixels)


class _Finder:
    def __init__(self, allow_remote: bool) -> None:
        self.allow_remote = allow_remote
        self.remote: list[Reference] = []
        self.roots: dict[str, Any] = {}
        self.pixels = 0

    def prompts(self, raw: msgspec.Raw, name: str) -> None:
        holder: dict[str, Any] = {name: raw}
        if name in _BARE:
            self.bare(holder, name, (name,))
        elif _first(raw) == _OBJECT:
            holder[name] = self.part(_decode(_object, raw, (name,)), (name,), 1)
        elif b"{" in bytes(raw):  # else texts or tokens, which may be many
            items: list[Any] = _decode(_items, raw, (name,))
            for index, item in enumerate(items):
                if _first(item) == _OBJECT:
                    items[index] = self.part(_decode(_object, item, (name, index)), (name, index), 1)
            holder[name] = items
        if holder[name] is not raw:
            self.roots |= holder

    def parts(self, raw: msgspec.Raw, path: Path, depth: int) -> list[dict[str, Any]]:
        if depth > MAX_NESTING:
            raise BadRequest(f"{_shown(path)} is nested more than {MAX_NESTING} deep", param=_shown(path))
        parts: list[dict[str, Any]] = _decode(_turns, raw, path, "a list of objects")
        for index, part in enumerate(parts):
            self.part(part, (*path, index), depth)
        return parts

    def part(self, part: dict[str, Any], path: Path, depth: int) -> dict[str, Any]:
        """A turn, a part of one, or a prompt: its values are replaced by decoded ones where there may be media."""
        for name, raw in part.items():
            if name in _PARTS:
                if _first(raw) == _LIST:
                    part[name] = self.parts(raw, (*path, name), depth + 1)
            elif name == "source":
                self.source(part, (*path, name), depth)
            elif name in _BARE:
                self.bare(part, name, (*path, name))
            elif name in _MEDIA or (depth and (name in _PART_MEDIA or name.endswith("_url"))):
                self.media(part, name, (*path, name))
        return part

    def media(self, part: dict[str, Any], name: str, path: Path) -> None:
        first = _first(part[name])
        if first == _TEXT:
            self.check(part, name, path)
        elif first == _OBJECT:
            inner = part[name] = _decode(_object, part[name], path)
            for key in _INSIDE:
                if key in inner and _first(inner[key]) != _NULL:
                    self.check(inner, key, path)
        elif first != _NULL:
            raise BadRequest(f"{_shown(path)} must be a string or an object", param=_shown(path))

    def source(self, part: dict[str, Any], path: Path, depth: int) -> None:
        """Anthropic's; of a search result it is a text, of a document it may be a text or parts."""
        if _first(part["source"]) != _OBJECT:
            return
        source: dict[str, Any] = _decode(_object, part["source"], path)
        part["source"] = source
        if "content" in source and _first(source["content"]) == _LIST:
            source["content"] = self.parts(source["content"], (*path, "content"), depth + 1)
        if "url" in source and _first(source["url"]) != _NULL:
            self.check(source, "url", path)
        if "type" in source and "data" in source and _text(source, "type", path) == "base64":
            self.check(source, "data", path)
            if "media_type" in source and not _TYPE.fullmatch(_text(source, "media_type", path)):
                raise _wrong(path, "its media_type must be image/…, audio/… or video/…")

    def bare(self, holder: dict[str, Any], name: str, path: Path) -> None:
        if _first(holder[name]) != _LIST:
            return
        if "prompt_string" in holder and _MARKER_AT_END.search(_text(holder, "prompt_string", path)):
            # GGML_ASSERT(batch.size() > 0), and the whole process ends (run; llama.cpp #15812).
            raise _wrong(path, "a prompt must not end with media; add some text behind it")
        items: list[Any] = _decode(_items, holder[name], path)
        holder[name] = items
        for index, item in enumerate(items):
            if _first(item) != _OBJECT:
                self.check(items, index, (*path, index))
                continue
            inner = items[index] = _decode(_object, item, (*path, index))
            if "data" in inner:
                self.check(inner, "data", (*path, index))

    def check(self, holder: Any, key: str | int, path: Path) -> None:
        """What stands in `holder[key]`: is it media, or a reference that may be fetched? Raises BadRequest."""
        bare = isinstance(key, int) or key in _BASE64_KEYS
        text = _text(holder, key, path)
        if text.startswith("data:"):
            head, _, data = text.partition(",")
            if not _DATA_URL.fullmatch(head):
                raise _wrong(path, "a data: URL must begin with data:, then image/…, audio/… or video/…, then ;base64,")
            if not is_base64(data):
                raise _wrong(path, "its data: URL holds no valid base64")
            self.weigh(data, path)
        elif text[:7].lower() == "http://" or text[:8].lower() == "https://":
            self.refer(Reference(text, _shown(path), holder, key, bare), path)
        elif not bare:
            raise _wrong(path, "only data: URLs and public http(s) URLs are allowed" if self.allow_remote else _ONLY)
        elif not is_base64(text) or text.startswith("http"):  # what begins so llama-server would try to fetch
            raise _wrong(path, "it must be base64")
        else:
            self.weigh(text, path)

    def weigh(self, base64: str, path: Path) -> None:
        self.pixels += pixels_of_base64(base64)
        if self.pixels > MAX_PIXELS:
            raise _wrong(path, _TOO_LARGE)

    def refer(self, reference: Reference, path: Path) -> None:
        if not self.allow_remote:
            raise _wrong(path, _ONLY)
        try:
            parse_target(reference.url)
        except Refused as refused:
            raise _wrong(path, str(refused)) from None
        self.remote.append(reference)
        if len(self.remote) > MAX_REFERENCES:
            raise _wrong(path, f"at most {MAX_REFERENCES} URLs are fetched for one request")


_TOO_LARGE = f"the images of one request may have {MAX_PIXELS // 1_000_000} megapixels at most, all together"
_ONLY = "only data: URLs are allowed; this server fetches no media (its operator can set ALLOW_REMOTE_MEDIA=true)"


def is_base64(text: str) -> bool:
    """In the standard alphabet, padded or not, and not empty; llama-server stops reading at anything else."""
    if not text.isascii():
        return False
    padding = len(text) - len(text.rstrip("="))
    whole = padding <= 2 and (len(text) % 4 == 0 if padding else len(text) % 4 != 1)
    count = len(text) - padding
    slices = (text[start : min(start + SLICE_BYTES, count)].encode() for start in range(0, count, SLICE_BYTES))
    return count > 0 and whole and not any(part.translate(None, _BASE64) for part in slices)


def _first(raw: msgspec.Raw) -> int:
    """The byte a JSON value begins with; not of a copy, for it may have megabytes."""
    return memoryview(raw)[0]


def _decode(decoder: msgspec.json.Decoder[T], raw: msgspec.Raw, path: Path, what: str = "readable JSON") -> T:
    try:
        return decoder.decode(raw)
    except (msgspec.DecodeError, RecursionError):
        raise BadRequest(f"{_shown(path)} must be {what}", param=_shown(path)) from None


def _text(holder: Any, key: str | int, path: Path) -> str:
    return _decode(_string, holder[key], (*path, key) if isinstance(key, str) else path, "a string")


def _encoded(roots: dict[str, Any]) -> Fields:
    return {name: msgspec.Raw(msgspec.json.encode(root)) for name, root in roots.items()}


def _wrong(path: Path, why: str) -> BadRequest:
    return BadRequest(f"{_shown(path)}: {why}", param=_shown(path))


def _shown(path: Sequence[str | int]) -> str:
    """messages[0].content[1].image_url"""
    return "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in path)[1:]
