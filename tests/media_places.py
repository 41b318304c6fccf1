"""Every place in a request, dialect by dialect, where media may stand."""

from __future__ import annotations

import base64
import json
from typing import Any, cast

from gateway.pipeline.dialects import Dialect

URL = "https://media.example.org/a.png"
B64 = base64.b64encode(b"\x89PNG").decode()
DATA = f"data:image/png;base64,{B64}"


def said(part: object, role: str = "user") -> dict[str, Any]:
    return {"messages": [{"role": "system", "content": "s"}, {"role": role, "content": [{"type": "text"}, part]}]}


def asked(part: object) -> dict[str, Any]:
    return {"input": [{"role": "user", "content": "s"}, {"role": "user", "content": [{"type": "input_text"}, part]}]}


AT = "messages[1].content[1]"
PARTS: list[tuple[dict[str, Any], bool]] = [
    ({"image_url": {"url": "%", "detail": "low"}}, False),
    ({"image_url": "%"}, False),
    ({"video_url": {"url": "%"}}, False),
    ({"novel_url": {"url": "%"}}, False),
    ({"input_audio": {"data": "%", "format": "wav"}}, True),
    ({"input_audio": {"url": "%"}}, False),
    ({"input_video": {"data": "%"}}, True),
    ({"file": {"url": "%"}}, False),
    ({"file": {"file_data": "%"}}, True),
    ({"image": "%"}, False),
    ({"source": {"type": "url", "url": "%"}}, False),
]
# Where `%` stands for what is referred to: dialect, body, param, whether bare base64 belongs there.
PLACES: list[tuple[Dialect, dict[str, Any], str, bool]] = [
    *(
        (dialect, said({"type": "x"} | part), f"{AT}.{next(iter(part))}", bare)
        for dialect in (Dialect.CHAT, Dialect.APPLY_TEMPLATE, Dialect.MESSAGES, Dialect.COUNT_TOKENS)
        for part, bare in PARTS
    ),
    (Dialect.CHAT, said({"image_url": {"url": "%"}}, "tool"), f"{AT}.image_url", False),
    (Dialect.CHAT, {"messages": [{"role": "user", "content": "", "image_url": "%"}]}, "messages[0].image_url", False),
    (
        Dialect.MESSAGES,
        said({"type": "tool_result", "content": [{"type": "image", "source": {"type": "url", "url": "%"}}]}),
        f"{AT}.content[0].source",
        False,
    ),
    (
        Dialect.MESSAGES,
        said({"type": "document", "source": {"type": "content", "content": [{"source": {"url": "%"}}]}}),
        f"{AT}.source.content[0].source",
        False,
    ),
    (Dialect.MESSAGES, {"system": [{"type": "image", "source": {"url": "%"}}]}, "system[0].source", False),
    (Dialect.RESPONSES, asked({"type": "input_image", "image_url": "%"}), "input[1].content[1].image_url", False),
    (Dialect.RESPONSES, asked({"type": "input_file", "file_url": "%"}), "input[1].content[1].file_url", False),
    (Dialect.RESPONSES, asked({"type": "input_file", "file_data": "%"}), "input[1].content[1].file_data", True),
    (Dialect.RESPONSES, {"input": [{"type": "input_image", "image_url": "%"}]}, "input[0].image_url", False),
    (
        Dialect.RESPONSES,
        {"input": [{"type": "function_call_output", "output": [{"type": "input_image", "image_url": "%"}]}]},
        "input[0].output[0].image_url",
        False,
    ),
    *(
        (dialect, {name: {"prompt_string": "a", "multimodal_data": [B64, "%"]}}, f"{name}.multimodal_data[1]", True)
        for dialect, name in [
            (Dialect.NATIVE, "prompt"),
            (Dialect.COMPLETIONS, "prompt"),
            (Dialect.EMBEDDINGS, "content"),
            (Dialect.EMBEDDINGS, "input"),
            (Dialect.RERANK, "query"),
            (Dialect.TOKENIZE, "content"),
        ]
    ),
    (Dialect.NATIVE, {"prompt": ["a", {"multimodal_data": ["%"]}, [1, 2]]}, "prompt[1].multimodal_data[0]", True),
    (Dialect.RERANK, {"documents": ["a", {"image": "%"}]}, "documents[1].image", False),
    (Dialect.NATIVE, {"prompt": "a", "image_data": [{"id": 1, "data": "%"}]}, "image_data[0]", True),
    (Dialect.NATIVE, {"prompt": "a", "multimodal_data": ["%"]}, "multimodal_data[0]", True),
]


def filled(body: dict[str, Any], value: str) -> dict[str, Any]:
    return cast(dict[str, Any], json.loads(json.dumps(body).replace('"%"', json.dumps(value))))
