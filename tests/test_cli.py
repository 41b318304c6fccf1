"""The root of the `corral` command: usage errors, help, exit codes. What the subcommands do is tested with them."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from gateway import __version__
from gateway.cli import main
from tests.house import ROOT

LEVELS: list[tuple[str, ...]] = [
    (),
    ("serve",),
    ("keys",),
    *(("keys", command) for command in ("generate", "list", "rotate", "remove", "check")),
    ("logs",),
    ("config",),
    ("config", "check"),
]


def corral(
    *argv: str, folder: Path = ROOT, humble: bool = False, **environment: str
) -> subprocess.CompletedProcess[str]:
    """In a process of its own, with nothing of our environment, and without root's rights to any file if `humble`."""
    command = [sys.executable, "-m", "gateway", *argv]
    if humble and os.geteuid() == 0:
        command = ["setpriv", "--bounding-set=-dac_override,-dac_read_search", "--inh-caps=-all", *command]
    environment = {"PYTHONPATH": str(ROOT), "COLUMNS": "100", **environment}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


def ran(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, str, str]:
    try:
        code = main(argv)
    except SystemExit as left:
        code = int(left.code or 0)
    return (code, *capsys.readouterr())


def test_no_words_at_all_print_the_help(tmp_path: Path) -> None:
    done = corral(folder=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("usage: corral ")
    assert "examples:" in done.stderr


@pytest.mark.parametrize("level", LEVELS, ids=" ".join)
def test_help_has_examples(capsys: pytest.CaptureFixture[str], level: tuple[str, ...]) -> None:
    code, out, err = ran(capsys, *level, "--help")
    assert (code, err) == (0, "")
    assert out.startswith(f"usage: {' '.join(('corral', *level))}")
    assert "corral" in out.partition("example")[2]


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert ran(capsys, "--version") == (0, f"corral {__version__}\n", "")


@pytest.mark.parametrize(
    ("argv", "who", "says"),
    [
        ("frob", "corral", "invalid choice: 'frob' (choose from "),
        ("--bogus", "corral", "required: COMMAND"),
        ("keys", "corral keys", "required: COMMAND"),
        ("keys frob", "corral keys", "invalid choice: 'frob'"),
        ("keys generate", "corral keys generate", "required: --name"),
        ("keys generate --name", "corral keys generate", "expected one argument"),
        ("keys generate --name a --rate-limit many", "corral keys generate", "must be a whole number"),
        ("keys generate --name a --rate-limit 1\n2", "corral keys generate", "not '1 2'"),
        ("keys generate --name a --priority urgent", "corral keys generate", "(choose from "),
        ("keys list --bogus", "corral keys list", "unrecognized arguments: --bogus"),
        ("--json keys list --bogus more", "corral keys list", "unrecognized arguments: --bogus more"),
        ("keys check", "corral keys check", "required: KEY"),
        ("logs --since yesterday", "corral logs", "must be such as 1h, 30m or an ISO time, not 'yesterday'"),
        ("logs --status bad", "corral logs", "must be such as 429 or 5xx, not 'bad'"),
        ("serve --port 1", "corral serve", "unrecognized arguments: --port 1"),
        ("config", "corral config", "required: COMMAND"),
        ("config check a b", "corral config check", "unrecognized arguments: b"),
    ],
)
def test_wrong_usage_is_told_in_one_line(capsys: pytest.CaptureFixture[str], argv: str, who: str, says: str) -> None:
    code, out, err = ran(capsys, *argv.split(" "))
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith(f"{who}: ")
    assert err.endswith(f"; see: {who} --help\n")
    assert says in err


def test_wrong_usage_as_a_process(tmp_path: Path) -> None:
    done = corral("keys", "frob", folder=tmp_path)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)


@pytest.mark.parametrize("before", [0, 1, 2, 4])
def test_options_of_keys_may_stand_anywhere(capsys: pytest.CaptureFixture[str], tmp_path: Path, before: int) -> None:
    file = tmp_path / "keys.txt"
    words = ["keys", "generate", "--name", "a"]
    options = ["--json", "--quiet", "--file", str(file)]
    code, out, err = ran(capsys, *words[:before], *options, *words[before:])
    assert (code, err) == (0, "")
    assert f'"file": "{file}"' in out
    assert file.exists()


def test_options_of_keys_may_be_scattered(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "keys.txt"
    code, out, err = ran(capsys, "--file", str(file), "keys", "--json", "generate", "--name", "a", "--quiet")
    assert (code, err) == (0, "")
    assert f'"file": "{file}"' in out


def test_a_wrong_variable_is_no_wrong_usage(tmp_path: Path) -> None:
    done = corral("keys", "list", folder=tmp_path, PORT="none", CTX="-1", DATA_DIR=str(tmp_path))
    assert (done.returncode, done.stdout) == (1, "")
    lines = done.stderr.splitlines()
    assert len(lines) == 2
    assert all(line.startswith("corral: ") for line in lines)
    assert not corral("keys", "list", "--file", "k", folder=tmp_path, PORT="none").returncode, "it needs no settings"


@pytest.fixture
def closed(tmp_path: Path) -> Iterator[Path]:
    """A folder that its owner may not look into, not even root."""
    folder = tmp_path / "closed"
    folder.mkdir(mode=0)
    yield folder
    folder.chmod(0o700)


COMMANDS = ["keys list", "config check", "serve", "logs", "worker nats", "models list"]


@pytest.mark.parametrize("command", COMMANDS)
def test_a_data_folder_that_cannot_be_looked_into_is_one_line(command: str, closed: Path, tmp_path: Path) -> None:
    for folder, why in ((closed, "Permission denied"), (tmp_path / ("a" * 300), "File name too long")):
        done = corral(
            *command.split(), folder=tmp_path, humble=True, DATA_DIR=str(folder), LLAMA_URL="http://127.0.0.1:1"
        )
        assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1), done.stderr
        assert done.stderr.removeprefix("corral: ").startswith("DATA_DIR='/") and done.stderr.endswith(f"{why}\n")


@pytest.mark.parametrize("name", ["MODEL_PATH", "CONFIG_PATH", "MODELS_DIR"])
def test_a_path_that_cannot_be_looked_at_is_one_line(name: str, closed: Path, tmp_path: Path) -> None:
    where = {"DATA_DIR": str(tmp_path / "data"), "LLAMA_SERVER_PATH": "/bin/true", name: str(closed / "x.gguf")}
    done = corral("config", "check", folder=tmp_path, humble=True, **where)
    assert (done.returncode, done.stdout) == (1, "") and "Traceback" not in done.stderr
    assert len([line for line in done.stderr.splitlines() if str(closed) in line]) == 1


def test_env_files_and_variables_say_which_keys_file(tmp_path: Path) -> None:
    (tmp_path / ".env").write_text("DATA_DIR=here\n")
    assert corral("keys", "generate", "--name", "a", folder=tmp_path).returncode == 0
    assert (tmp_path / "here" / "api_keys.txt").exists()
    assert corral("keys", "generate", "--name", "a", folder=tmp_path, DATA_DIR="there").returncode == 0
    assert (tmp_path / "there" / "api_keys.txt").exists()


def test_a_reader_who_has_left_is_no_traceback(tmp_path: Path) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "gateway", "keys", "list", "--json", "--quiet", "--file", "none"]
    environment = {"PYTHONPATH": str(ROOT)}
    with os.fdopen(writing, "wb") as nobody:
        done = subprocess.run(
            command, cwd=tmp_path, env=environment, stdout=nobody, stderr=subprocess.PIPE, check=False
        )
    assert (done.returncode, done.stderr) == (1, b"")


def redirected(redirection: str, *argv: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """With what a shell makes of its standard streams."""
    command = ["sh", "-c", f'exec "$@" {redirection}', "sh", sys.executable, "-m", "gateway", *argv]
    environment = {"PYTHONPATH": str(ROOT), "DATA_DIR": str(folder)}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("redirection", [">&-", ">/dev/full"])
@pytest.mark.parametrize("words", ["keys list --json --quiet", "config check good.yaml"])
def test_output_that_cannot_be_written_is_told_in_one_line(tmp_path: Path, words: str, redirection: str) -> None:
    (tmp_path / "good.yaml").write_text("models:\n  far: {url: 'http://127.0.0.1:9'}\n")
    done = redirected(redirection, *words.split(), folder=tmp_path)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1)
    assert done.stderr.startswith("corral: nothing more can be shown (")


def test_a_closed_stderr_does_not_end_up_in_stdout(tmp_path: Path) -> None:
    done = redirected("2>&-", "keys", "generate", "--name", "a", folder=tmp_path)
    assert (done.returncode, done.stdout.count("\n")) == (0, 1)
    assert done.stdout.startswith("sk-a-")


@pytest.mark.parametrize("redirection", [">&-", ">/dev/full"])
def test_a_key_that_could_not_be_shown_is_told_to_be_stored(tmp_path: Path, redirection: str) -> None:
    for words in (["keys", "generate", "--name", "a"], ["keys", "rotate", "--name", "a"]):
        done = redirected(redirection, *words, folder=tmp_path)
        assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1)
        assert f"key 'a' is in {tmp_path / 'api_keys.txt'}, but could not be shown (" in done.stderr
        assert done.stderr.endswith("corral keys rotate --name a\n")


@pytest.mark.parametrize("words", ["keys check -", "keys generate --name a --secret -"])
def test_a_closed_stdin_is_told_in_one_line(tmp_path: Path, words: str) -> None:
    done = redirected("<&-", *words.split(), folder=tmp_path)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1)
    assert done.stderr.startswith("corral keys: stdin is closed")
