"""No answer but those that are described: schemathesis asks a real gateway before real llama-servers."""

from __future__ import annotations

import copy
import json
import subprocess
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema_rs
import pytest

from gateway.http.openapi.document import document
from scripts.make_model import make_model
from tests.house import ADMIN, ROOT, Gateway, eventually, running_gateway
from tests.real.herd import SMALL
from tests.real.scrape import Scrape

pytestmark = pytest.mark.real

DOCUMENT = document()
MODELS = ["tiny", "embed"]
# They end with the gateway; their events are looked at below.
ENDLESS = [path for path in ("/v1/models/status/stream", "/metrics/stream") if path in DOCUMENT["paths"]]
# Some headers are everywhere the same: what they may hold is tried here, once for each of the gateway's two ways.
NAMED = [("get", "/v1/models"), ("post", "/v1/chat/completions")]
EVERYWHERE = [
    f"#/components/parameters/{name}"
    for name in (
        "request_id",
        "traceparent",
        "priority",
        "timeout",
        "cache_control",
        "log_level",
        "log_query",
        "log_infer",
    )
]
CHECKS = [
    "status_code_conformance",
    "content_type_conformance",
    "response_headers_conformance",
    "response_schema_conformance",
    "unsupported_method",
    "allow_header_conformance",
    "ignored_auth",
    # Left out: not_a_server_error (501 and 503 are described; 500 and 502 are looked for below);
    # negative_data_rejection and positive_data_acceptance (what a field may hold is llama-server's matter, and a valid
    # prompt may be too long); missing_required_header (there are none); use_after_free, ensure_resource_availability
    # and object_level_authorization (they need links between operations).
]

# `GET /v1/models/load` asks for a model of that name: 404, not 405.
CONFIGURATION = """
[[operations]]
include-path = ["/v1/models/load", "/v1/models/eject"]
phases.coverage.unexpected-methods = ["put", "patch", "delete", "trace"]
"""


@pytest.fixture(scope="module")
def asked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    folder = tmp_path_factory.mktemp("asked")
    models = folder / "models"
    models.mkdir()
    make_model(models / "tiny.gguf", seed=1)
    make_model(models / "embed.gguf", seed=2, embedding=True)
    more = {
        "MODELS_DIR": str(models),
        "DEFAULT_MODEL": "tiny",
        "MAX_TOKENS_LIMIT": "16",
        "QUEUE_TIMEOUT_SECONDS": "5",
        "TRUSTED_PROXIES": "127.0.0.1/32",
        "LOG_LEVEL": "error",
    }
    with running_gateway(folder, SMALL | more) as running:
        grammar = {"name": "yes-no", "content": 'root ::= "yes" | "no"'}
        assert running.request("POST", "/grammars", grammar, key=ADMIN).status == 201
        yield running


def described(part: str) -> dict[str, Any]:
    """The document with models that exist, and of its operations one part: see `part_of`."""
    tree: dict[str, Any] = copy.deepcopy(DOCUMENT)
    components = tree["components"]
    components["parameters"]["model"]["schema"] = {"enum": MODELS}
    components["parameters"]["grammar"]["schema"] = {"enum": ["yes-no", "yes-no@1"]}
    components["schemas"]["ModelName"] = {"enum": [*MODELS, None]}
    components["schemas"]["ModelCommand"]["properties"]["model"] = {"enum": MODELS}
    components["schemas"]["EjectCommand"]["properties"]["model"] = {"enum": MODELS}
    for path, item in list(tree["paths"].items()):
        for method, operation in list(item.items()):
            if (method == "get" and path in ENDLESS) or part_of(method, operation) != part:
                del item[method]
            elif (method, path) not in NAMED:
                operation["parameters"] = [one for one in operation["parameters"] if one.get("$ref") not in EVERYWHERE]
        if not item:
            del tree["paths"][path]
    return tree


# Their bodies are tried with the routes of the same kind that generate, or in OpenAI's shape.
ALIKE = {"post_apply_template", "post_v1_messages_count_tokens", "post_embeddings"}


def part_of(method: str, operation: dict[str, Any]) -> str:
    """One of three. HEAD, the other names of an operation, and those of a kind are tried less."""
    if method == "head" or "x-alias-of" in operation or operation["operationId"] in ALIKE:
        return "again"
    return "generation" if operation["tags"] == ["Generation"] else "rest"


@pytest.mark.slow
@pytest.mark.timeout(120)
@pytest.mark.parametrize(
    ("part", "phases", "examples"),
    [
        ("generation", "examples,coverage,fuzzing", 5),
        ("rest", "examples,coverage,fuzzing", 5),
        ("again", "examples,fuzzing", 2),
    ],
)
def test_every_answer_is_described(asked: Gateway, tmp_path: Path, part: str, phases: str, examples: int) -> None:
    (tmp_path / "openapi.json").write_text(json.dumps(described(part)))
    (tmp_path / "schemathesis.toml").write_text(CONFIGURATION)
    done = subprocess.run(
        [
            str(ROOT / ".venv" / "bin" / "schemathesis"),
            *("run", "openapi.json", "--url", asked.url, "--header", f"Authorization: Bearer {ADMIN}"),
            *("--checks", ",".join(CHECKS), "--phases", phases, "--max-examples", str(examples)),
            *("--seed", "1", "--generation-deterministic", "--no-shrink"),
            *("--continue-on-failure", "--request-timeout", "20", "--suppress-health-check", "all", "--no-color"),
        ],
        cwd=tmp_path,
        env=asked.environment | {"SCHEMATHESIS_HOOKS": "tests.openapi.hooks", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-12_000:] + done.stderr[-2000:]
    assert asked.process.poll() is None
    scrape = Scrape(asked)
    for status in ("500", "502"):
        assert scrape.total("gateway_requests_total", status=status) == 0, status


def test_the_served_document_is_this_one(asked: Gateway) -> None:
    for path in ("/openapi.json", "/swagger/doc.json"):
        reply = asked.get(path, key=None)
        assert (reply.status, reply.headers["content-type"]) == (200, "application/json")
        assert reply.json() == DOCUMENT


@pytest.mark.parametrize("path", ENDLESS)
def test_events_of_endless_streams(asked: Gateway, path: str) -> None:
    content = DOCUMENT["paths"][path]["get"]["responses"]["200"]["content"]["text/event-stream"]
    sides = {side["properties"]["event"]["const"]: side["properties"]["data"] for side in content["schema"]["anyOf"]}
    request = urllib.request.Request(asked.url + path, headers={"Authorization": f"Bearer {ADMIN}"})
    with urllib.request.urlopen(request, timeout=5) as reply:
        seen = 0
        name = "message"
        if path == "/v1/models/status/stream":
            asked.request("POST", "/v1/models/load", {"model": "tiny"}, key=ADMIN)
            eventually(lambda: asked.get("/v1/models/status/tiny", key=ADMIN).json()["status"] == "ready")
            asked.request("POST", "/v1/models/eject", {"model": "tiny"}, key=ADMIN)
        while seen < 3:
            line = reply.readline().decode()
            if line.startswith("event: "):
                name = line[7:].strip()
            elif line.startswith("data: "):
                schema = sides[name]["contentSchema"] | {"components": DOCUMENT["components"]}
                jsonschema_rs.validate(schema, json.loads(line[6:]))
                seen += 1
