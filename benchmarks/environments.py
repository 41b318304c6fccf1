"""What the benchmark builds and installs for itself, all of it under .cache/bench/."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from benchmarks.processes import BenchError

CACHE = Path(__file__).parents[1] / ".cache" / "bench"
_SOURCES = Path(__file__).parent / "c"


def compiled(name: str) -> Path:
    """The C program `name`, built anew when its source has changed. Raises BenchError."""
    source, program = _SOURCES / f"{name}.c", CACHE / name
    if program.exists() and program.stat().st_mtime >= source.stat().st_mtime:
        return program
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        raise BenchError("a C compiler is needed: sudo apt-get install gcc libc6-dev")
    CACHE.mkdir(parents=True, exist_ok=True)
    fresh = program.with_suffix(f".{os.getpid()}")  # another run may be using the old one, or be making one too
    built = _run([compiler, "-O2", "-o", str(fresh), str(source)], 120)
    if built.returncode:
        raise BenchError(f"{source.name} does not compile: {built.stderr}")
    fresh.replace(program)
    return program


def program(environment: str, name: str) -> Path:
    return CACHE / environment / "bin" / name


def lacking(environment: str, requirement: str) -> str:
    """Installs a peer from PyPI into an environment of its own, once; why that did not work, or nothing."""
    folder = CACHE / environment
    if (folder / "installed").exists():
        return ""
    print(f"installing {requirement} into {folder} …", file=sys.stderr)
    python = getattr(sys, "_base_executable", sys.executable)
    for command in (
        [python, "-m", "venv", "--clear", str(folder)],
        [str(folder / "bin" / "pip"), "install", "--quiet", "--disable-pip-version-check", requirement],
    ):
        done = _run(command, 600)
        if done.returncode:
            reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
            return f"{requirement} could not be installed: {reason}"
    (folder / "installed").touch()
    return ""


def installed(python: str | Path, package: str) -> str:
    code = f"import importlib.metadata; print(importlib.metadata.version({package!r}))"
    return f"{package} {_run([str(python), '-c', code], 30).stdout.strip()}"


def first_line(program: str, *arguments: str) -> str:
    done = _run([program, *arguments], 10)
    return ((done.stdout + done.stderr).strip().splitlines() or [""])[0]


def revision(root: Path) -> str:
    """The commit that is measured, and whether the tree has more than it."""
    commit = first_line("git", "-C", str(root), "rev-parse", "--short", "HEAD")
    changed = first_line("git", "-C", str(root), "status", "--porcelain", "--", "gateway")
    return f"Corral {commit}" + (" with changes" if changed else "")


def _run(command: list[str], seconds: float) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=seconds, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return subprocess.CompletedProcess(command, 1, "", str(error))
