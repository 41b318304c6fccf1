"""Which model is meant: names, folders, shards, projectors; and what a start that cannot know says."""

from __future__ import annotations

from pathlib import Path

import pytest

from gateway.environment import load_settings
from gateway.errors import ConfigError, ModelNotFound
from gateway.models.configured.scan import find_models
from gateway.models.configured.template import PromptTemplate
from gateway.models.registry import ModelSpec, Registry, build_registry


def files(folder: Path, *names: str) -> Path:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"GGUF")
    return folder


def only(models_dir: Path, **variables: str) -> ModelSpec:
    environ = {"MODELS_DIR": str(models_dir), "DATA_DIR": str(models_dir), **variables}
    registry = build_registry(load_settings(environ, None))
    assert registry.single
    (spec,) = registry.specs.values()
    return spec


def problem(models_dir: Path, **variables: str) -> str:
    with pytest.raises(ConfigError) as raised:
        only(models_dir, **variables)
    (line,) = raised.value.problems
    assert "\n" not in line
    return line


@pytest.mark.parametrize(
    ("there", "name", "id", "file"),
    [
        (["a.gguf", "b.gguf"], "a", "a", "a.gguf"),
        (["a.gguf", "b.gguf"], "a.gguf", "a", "a.gguf"),
        (["a.Q4_K_M.gguf"], "a.Q4_K_M", "a.Q4_K_M", "a.Q4_K_M.gguf"),
        (["a/x.gguf", "b.gguf"], "a", "x", "a/x.gguf"),
        (["a/model.gguf", "b.gguf"], "a", "a", "a/model.gguf"),
        (["a/x.gguf", "a/y.gguf"], "a/y", "y", "a/y.gguf"),
        (["a/x.gguf", "a/y.gguf"], "a/y.gguf", "y", "a/y.gguf"),
        (["a-00001-of-00002.gguf", "a-00002-of-00002.gguf"], "a", "a", "a-00001-of-00002.gguf"),
        (["a-00001-of-00002.gguf", "a-00002-of-00002.gguf"], "a-00001-of-00002", "a", "a-00001-of-00002.gguf"),
        (["a/q-00001-of-00002.gguf", "a/q-00002-of-00002.gguf"], "a", "q", "a/q-00001-of-00002.gguf"),
        (["x[1]-00001-of-00001.gguf", "x1-00001-of-00001.gguf"], "x[1]", "x[1]", "x[1]-00001-of-00001.gguf"),
        (["a/x.gguf", "a/mmproj-x.gguf"], "a", "x", "a/x.gguf"),
        (["bin.dat"], "bin.dat", "bin.dat", "bin.dat"),
        # none is named, and one is there
        (["a.gguf"], "", "a", "a.gguf"),
        (["a/model.gguf"], "", "a", "a/model.gguf"),
        (["a-00001-of-00002.gguf", "a-00002-of-00002.gguf"], "", "a", "a-00001-of-00002.gguf"),
        (["as/deep/as/b.gguf"], "", "b", "as/deep/as/b.gguf"),
        (["a.gguf", "mmproj-a.gguf", "notes.txt", ".hub/b.gguf", ".b.gguf"], "", "a", "a.gguf"),
    ],
)
def test_a_model_by_name(tmp_path: Path, there: list[str], name: str, id: str, file: str) -> None:
    spec = only(files(tmp_path, *there), MODEL_NAME=name)
    assert (spec.id, spec.path) == (id, tmp_path / file)
    assert (spec.url, spec.download_url, spec.hf) == (None, None, None)


@pytest.mark.parametrize(
    ("there", "path", "id"),
    [(["x/a.gguf"], "x/a.gguf", "a"), (["x/a.gguf"], "x", "a"), (["x/model.gguf"], "x/model.gguf", "x")],
)
def test_a_model_by_path_wins_over_its_name(tmp_path: Path, there: list[str], path: str, id: str) -> None:
    files(tmp_path, *there)
    spec = only(tmp_path / "models", MODEL_PATH=str(tmp_path / path), MODEL_NAME="other")
    assert (spec.id, spec.path) == (id, tmp_path / there[0])


@pytest.mark.parametrize(
    ("there", "model", "projector"),
    [
        (["v/a.gguf", "v/mmproj-F16.gguf"], "v/a", "v/mmproj-F16.gguf"),
        (["v/a-00001-of-00002.gguf", "v/a-00002-of-00002.gguf", "v/mmproj.gguf"], "v/a", "v/mmproj.gguf"),
        (["a.gguf", "b.gguf", "mmproj-a.gguf"], "a", "mmproj-a.gguf"),
        (["a.gguf", "b.gguf", "mmproj-a-f16.gguf", "mmproj-b-f16.gguf"], "b", "mmproj-b-f16.gguf"),
        (["a.gguf", "b.gguf", "mmproj-a.gguf"], "b", None),
        (["a.gguf", "a2.gguf", "mmproj-a2.gguf"], "a", None),
        (["a.gguf", "ba.gguf", "mmproj-ba.gguf"], "a", None),
        (["v/a.gguf", "v/mmproj-1.gguf", "v/mmproj-2.gguf"], "v/a", None),  # which one?
        (["a.gguf"], "a", None),
    ],
)
def test_a_projector_is_paired_where_it_can_be_meant(
    tmp_path: Path, there: list[str], model: str, projector: str | None
) -> None:
    spec = only(files(tmp_path, *there), MODEL_NAME=model)
    assert spec.mmproj == (tmp_path / projector if projector else None)


def test_no_model(tmp_path: Path) -> None:
    message = problem(tmp_path)
    assert all(word in message for word in ("MODEL_NAME", "MODEL_PATH", "MODEL_URL", str(tmp_path)))
    assert problem(tmp_path / "is not there").startswith("no model")
    assert problem(files(tmp_path, "mmproj-a.gguf", "readme.md")).startswith("no model")


SEVERAL = [
    "a.gguf",
    "s-00001-of-00002.gguf",
    "s-00002-of-00002.gguf",
    "f/model.gguf",
    "g/model.gguf",
    "g2/x.gguf",
    "g2/t-00001-of-00002.gguf",
]


def test_a_wrong_name_is_told_the_names_that_MODEL_NAME_can_take(tmp_path: Path) -> None:
    wrong = problem(files(tmp_path, *SEVERAL), MODEL_NAME="nope")
    start, _, listed = wrong.partition("; there is: ")
    assert start == f"MODEL_NAME='nope': no such model in {tmp_path}"
    names = listed.split(", ")
    assert names == ["a", "f/model", "g/model", "g2/t", "g2/x", "s"]
    assert [only(tmp_path, MODEL_NAME=name).path for name in names] == find_models(tmp_path)


def test_several_models_are_a_herd(tmp_path: Path) -> None:
    files(tmp_path, *SEVERAL)
    environ = {"MODELS_DIR": str(tmp_path), "DATA_DIR": str(tmp_path)}
    registry = build_registry(load_settings(environ, None))
    assert not registry.single
    assert sorted(registry.specs) == ["a", "f", "g", "s", "t", "x"]
    assert (registry.default, registry.preload, registry.max_models, registry.vram_multiplier) == (None, (), None, 1.1)
    assert build_registry(load_settings(environ | {"DEFAULT_MODEL": "s"}, None)).default == "s"
    with pytest.raises(ConfigError) as raised:
        build_registry(load_settings(environ | {"DEFAULT_MODEL": "q"}, None))
    assert raised.value.problems == ["DEFAULT_MODEL='q' is no model; there are: a, f, g, s, t, x"]


def test_one_model_is_preloaded(tmp_path: Path) -> None:
    registry = build_registry(load_settings({"DATA_DIR": str(tmp_path), "MODEL_HF": "user/Repo"}, None))
    assert (registry.preload, registry.preload_all, registry.default) == (("Repo",), False, "Repo")


def test_a_prompt_template_beside_the_one_model(tmp_path: Path) -> None:
    template = files(tmp_path, "a/a.gguf") / "a" / "prompt_template.json"
    template.write_text('{"user_prefix": "U:", "_comment": 1}')
    found = only(tmp_path, MODEL_NAME="a").prompt_template
    assert found == PromptTemplate(user_prefix="U:") == only(tmp_path).prompt_template
    template.write_text("{")
    assert problem(tmp_path, MODEL_NAME="a").startswith(f"{template}: is not JSON: ")


@pytest.mark.parametrize(
    ("variables", "says"),
    [
        ({"MODEL_NAME": "x"}, "MODEL_NAME='x': no such model in {}; there is: no model"),
        ({"MODEL_NAME": "dir"}, "MODEL_NAME='{}/dir': the folder must hold exactly one model; it holds: none"),
        ({"MODEL_NAME": "two"}, "MODEL_NAME='{}/two': the folder must hold exactly one model; it holds: a, b"),
        ({"MODEL_NAME": "x" * 300}, f"MODEL_NAME='{'x' * 59}: File name too long"),
        ({"MODEL_PATH": "/" + "x" * 300}, f"MODEL_PATH='/{'x' * 198}: File name too long"),
        *(
            ({"MODEL_HF": name}, f"MODEL_HF={name!r}: must be user/repo or user/repo:quant")
            for name in ("noslash", "a/b/c", "a/b:", "https://huggingface.co/a/b")
        ),
        ({"MODEL_PATH": "{}/x.gguf"}, "MODEL_PATH='{}/x.gguf': no such file"),
        ({"MODEL_PATH": "{}/two"}, "MODEL_PATH='{}/two': the folder must hold exactly one model; it holds: a, b"),
    ],
)
def test_a_name_that_is_not_there_or_not_clear(tmp_path: Path, variables: dict[str, str], says: str) -> None:
    (tmp_path / "dir").mkdir()
    if "two" in str(variables):
        files(tmp_path, "two/a.gguf", "two/b.gguf")
    given = {name: value.format(tmp_path) for name, value in variables.items()}
    assert problem(tmp_path, **given) == says.format(tmp_path)


@pytest.mark.parametrize(
    ("variables", "spec"),
    [
        ({"LLAMA_URL": "http://x:1"}, ModelSpec(id="default", url="http://x:1")),
        ({"LLAMA_URL": "http://x:1", "MODEL_NAME": "m"}, ModelSpec(id="m", url="http://x:1")),
        (
            {"MODEL_URL": "https://x/y/q.gguf?token=1", "MODEL_SHA256": "a" * 64},
            ModelSpec(id="q", download_url="https://x/y/q.gguf?token=1", sha256="a" * 64),
        ),
        (
            {"MODEL_URL": "https://x/q-00001-of-00002.gguf"},
            ModelSpec(id="q", download_url="https://x/q-00001-of-00002.gguf"),
        ),
        ({"MODEL_URL": "https://x/d/a%20b.gguf"}, ModelSpec(id="a b", download_url="https://x/d/a%20b.gguf")),
        ({"MODEL_URL": "https://x/get"}, ModelSpec(id="get", download_url="https://x/get")),
        ({"MODEL_URL": "https://x/"}, ModelSpec(id="model", download_url="https://x/")),
        ({"MODEL_URL": "https://x/", "MODEL_NAME": "m"}, ModelSpec(id="m", download_url="https://x/")),
        ({"MODEL_HF": "user/Repo-GGUF:Q4_K_M"}, ModelSpec(id="Repo-GGUF-Q4_K_M", hf="user/Repo-GGUF:Q4_K_M")),
        ({"MODEL_HF": "user/Repo"}, ModelSpec(id="Repo", hf="user/Repo")),
        ({"MODEL_HF": "user/Repo", "MODEL_NAME": "m"}, ModelSpec(id="m", hf="user/Repo")),
    ],
)
def test_models_that_are_not_here_yet(tmp_path: Path, variables: dict[str, str], spec: ModelSpec) -> None:
    assert only(tmp_path, **variables) == spec


def test_one_model_answers_to_every_name() -> None:
    registry = Registry([ModelSpec(id="a", aliases=("alias",))], single=True)
    assert {registry.resolve(name).id for name in (None, "a", "alias", "gpt-4", "")} == {"a"}
    assert registry.named("alias").id == "a"
    with pytest.raises(ModelNotFound, match="gpt-4"):
        registry.named("gpt-4")


def test_among_several_a_name_must_be_an_id_or_an_alias() -> None:
    specs = [ModelSpec(id="a", aliases=("x",)), ModelSpec(id="b"), ModelSpec(id="c", aliases=("a",))]
    registry = Registry(specs, single=False, default="b")
    assert [registry.resolve(name).id for name in ("a", "x", "b", None)] == ["a", "a", "b", "b"]
    for name in ("A", "", "gpt-4", "\n"):
        with pytest.raises(ModelNotFound) as raised:
            registry.resolve(name)
        error = raised.value
        assert (error.status, error.code, error.param) == (404, "model_not_found", "model")
        assert "a, b, c" in error.message and "\n" not in error.message
    with pytest.raises(ModelNotFound, match=r"names no model.*a, b, c"):
        Registry(specs, single=False).resolve(None)
    for visible, known in (("bc", "b, c"), ("", "none for this key")):
        with pytest.raises(ModelNotFound, match=f"there are: {known}$"):
            registry.resolve("gpt-4", visible.__contains__)
