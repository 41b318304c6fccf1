"""Prompt templates as llama-server itself applies them."""

from __future__ import annotations

import contextlib
import json
import subprocess
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from gateway.errors import ConfigError
from gateway.models.configured.template import PromptTemplate, read_template
from tests.house import eventually, free_port, llama_server, running_gateway

ODD = PromptTemplate(
    user_prefix="<|u|>\n'quote' \"double\" \\n back\\slash\t",
    user_suffix="{{ x }} {% if %} }} %} {# c #}\r\n",
    model_prefix="<|a|>ä日😀%(s)s %%",
    model_suffix="</s>\n",
)
PLAIN = PromptTemplate(user_prefix="[U]", user_suffix="[/U]", model_prefix="[M]", model_suffix="[/M]")


@contextlib.contextmanager
def serving(model: Path, template: PromptTemplate) -> Iterator[str]:
    port = free_port()
    argv = [str(llama_server()), "-m", str(model), "--host", "127.0.0.1", "--port", str(port), "-c", "512", "-t", "1"]
    process = subprocess.Popen(
        [*argv, "--jinja", "--chat-template", template.jinja()], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        eventually(lambda: urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).status == 200)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.kill()
        process.wait()


def post(url: str, body: Any) -> Any:
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=10) as reply:
        return json.load(reply)


@pytest.fixture(scope="module")
def plain(chat_model: Path) -> Iterator[str]:
    with serving(chat_model, PLAIN) as url:
        yield url


def turn(role: str, content: Any) -> dict[str, Any]:
    return {"role": role, "content": content}


@pytest.mark.real
@pytest.mark.parametrize(
    ("messages", "prompt"),
    [
        ([turn("user", "hi")], "[U]hi[/U][M]"),
        (
            [turn("user", "a"), turn("assistant", "b"), turn("user", " c ")],
            "[U]a[/U][M]b[/M][U] c [/U][M]",
        ),
        ([turn("system", "S"), turn("user", "a")], "[U]S\n\na[/U][M]"),
        ([turn("system", "S"), turn("system", "T"), turn("user", "a")], "[U]S\n\nT\n\na[/U][M]"),
        (
            [turn("user", "a"), turn("assistant", "b"), turn("system", "S"), turn("user", "c")],
            "[U]a[/U][M]b[/M][U]S\n\nc[/U][M]",
        ),
        ([turn("system", "S")], "[U]S\n\n[/U][M]"),
        ([turn("user", [{"type": "text", "text": "part"}])], "[U]part[/U][M]"),
        ([turn("user", "{{ 7 * 7 }} {% raw %}")], "[U]{{ 7 * 7 }} {% raw %}[/U][M]"),
    ],
)
def test_turns(plain: str, messages: list[dict[str, Any]], prompt: str) -> None:
    assert post(f"{plain}/apply-template", {"messages": messages})["prompt"] == prompt


@pytest.mark.real
def test_any_text_comes_out_as_it_is(chat_model: Path) -> None:
    with serving(chat_model, ODD) as url:
        messages = [turn("user", "a"), turn("assistant", "b"), turn("user", "c")]
        prompt = post(f"{url}/apply-template", {"messages": messages})["prompt"]
        assert prompt == (
            f"{ODD.user_prefix}a{ODD.user_suffix}{ODD.model_prefix}b{ODD.model_suffix}"
            f"{ODD.user_prefix}c{ODD.user_suffix}{ODD.model_prefix}"
        )
        answer = post(f"{url}/v1/chat/completions", {"messages": messages, "max_tokens": 3})
        assert answer["usage"]["completion_tokens"] == 3


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("{", "is not JSON: "),
        ('{"user_prefix": 5}', "user_prefix: must be text"),
        ('{"user_prefix": "\\u0000"}', "user_prefix: must be text"),
        ('{"_only": "a comment"}', "must have at least one of "),
        ("[]", "must be a section with keys"),
        ("[" * 100_000, "is "),
        ('{"user_prefix": "' + "x" * 70_000 + '"}', "is larger than 64 KiB"),
    ],
)
def test_a_file_that_is_no_template(tmp_path: Path, text: str, problem: str) -> None:
    path = tmp_path / "prompt_template.json"
    path.write_text(text)
    with pytest.raises(ConfigError) as raised:
        read_template(path)
    (said,) = raised.value.problems
    assert said.startswith(str(path)) and problem in said


@pytest.mark.real
def test_a_template_of_the_models_file_is_the_models(tmp_path: Path, chat_model: Path) -> None:
    models = {
        "plain": {"model_path": str(chat_model), "prompt_template": {"user_prefix": "[U]", "model_prefix": "[M]"}},
        "file": {"model_path": str(chat_model), "chat_template_file": "t.jinja"},
    }
    (tmp_path / "t.jinja").write_text("{% for m in messages %}<{{ m['content'] }}>{% endfor %}")
    (tmp_path / "config.json").write_text(json.dumps({"models": models}))
    with running_gateway(tmp_path / "gateway", CONFIG_PATH=str(tmp_path / "config.json")) as gateway:
        body = {"messages": [turn("user", "hi")]}
        for model, prompt in (("plain", "[U]hi[M]"), ("file", "<hi>")):
            answer = gateway.request("POST", "/apply-template", body | {"model": model})
            assert (answer.status, answer.json()["prompt"]) == (200, prompt)
