#!/usr/bin/env python3
"""Finds a llama-server and prints its path; on Debian, where there is none, unpacks Debian sid's into a private folder.

Standard library only. Nothing is installed on the machine: the packages, their libc included, stay in `.cache/llama/`.
"""

import argparse
import fcntl
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

CACHE = Path(__file__).resolve().parent.parent / ".cache" / "llama"
PACKAGES = ("llama.cpp-tools", "patchelf")
KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
MEND = """\
Install it so that it is on PATH, or name it with LLAMA_SERVER_PATH=/path/to/llama-server:
  brew install llama.cpp          (macOS, Linux)
  apt-get install llama.cpp       (Debian and Ubuntu releases that have it)
Or use Corral's container image, which brings it: docker build -t corral ."""


class NoServer(Exception):
    """There is no llama-server here and none could be had; the message says why."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=Path, default=CACHE, help="where a fetched one lies (default: .cache/llama)")
    arguments = parser.parse_args()
    try:
        print(find(os.environ) or fetch(arguments.cache.absolute()))
    except NoServer as problem:
        print(f"llama-server: {problem}", file=sys.stderr)
        return 1
    return 0


def find(environ: Mapping[str, str]) -> Path | None:
    """The llama-server that this machine already has: named, in the official image, or on PATH."""
    if named := environ.get("LLAMA_SERVER_PATH"):
        if not os.access(named, os.X_OK) or not Path(named).is_file():
            raise NoServer(f"LLAMA_SERVER_PATH={named} is not an executable file; correct it or unset it.")
        return Path(named).absolute()
    on_path = shutil.which("/app/llama-server") or shutil.which("llama-server", path=environ.get("PATH"))
    return Path(on_path).absolute() if on_path else None


def fetch(cache: Path) -> Path:
    """Debian's llama-server in `cache`, unpacked there unless it already is."""
    prefix = cache / "debian"
    binary = prefix / "usr" / "bin" / "llama-server"
    if is_complete(prefix):
        return binary
    source = debian_source()
    with locked(cache / "lock"):
        if not is_complete(prefix):
            shutil.rmtree(prefix, ignore_errors=True)
            download(source, cache / "apt", prefix)
            bind(prefix, binary)
            version = subprocess.run([binary, "--version"], capture_output=True, text=True)
            if version.returncode != 0:
                raise NoServer(f"Debian's build does not run here: {version.stderr.strip()[-500:]}\n{MEND}")
            marker(prefix).write_text(f"{prefix}\n")
    return binary


def marker(prefix: Path) -> Path:
    return prefix / ".complete"


def is_complete(prefix: Path) -> bool:
    """Whether all was done, and done here: the paths inside the binaries are absolute, so a moved copy is worthless."""
    try:
        return marker(prefix).read_text() == f"{prefix}\n"
    except OSError:
        return False


@contextmanager
def locked(path: Path) -> Iterator[None]:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def debian_source() -> str:
    """A one-line apt source for sid on the mirror that this machine itself uses."""
    if not (shutil.which("apt-get") and shutil.which("dpkg")):
        raise NoServer(f"there is none on this machine, and it has no apt-get to fetch Debian's with.\n{MEND}")
    for mirror in debian_mirrors(Path("/etc/apt")):
        return f"deb [signed-by={KEYRING}] {mirror} sid main\n"
    raise NoServer(f"there is none on this machine, and its apt sources name no Debian mirror.\n{MEND}")


def debian_mirrors(etc: Path) -> Iterator[str]:
    """Mirrors of Debian's own archive (not of its updates, nor of third parties) that apt's sources name."""
    if not KEYRING.exists():
        return
    for path in sorted(etc.glob("sources.list.d/*.sources")):
        for paragraph in re.split(r"\n\s*\n", path.read_text()):
            fields = deb822_fields(paragraph)
            if "deb" in fields.get("types", []) and fields.get("enabled") != ["no"]:
                yield from archive(fields.get("uris", []), fields.get("suites", []), fields.get("components", []))
    for path in [etc / "sources.list", *sorted(etc.glob("sources.list.d/*.list"))]:
        for line in path.read_text().splitlines() if path.exists() else []:
            if match := re.match(r"deb\s+(?:\[[^]]*]\s+)?(\S+)\s+(\S+)\s+([^#]*)", line.strip()):
                yield from archive([match[1]], [match[2]], match[3].split())


def deb822_fields(paragraph: str) -> dict[str, list[str]]:
    lines = "\n".join(line for line in paragraph.splitlines() if not line.startswith("#"))
    return {match[1].lower(): match[2].split() for match in re.finditer(r"^(\S+):((?:.*)(?:\n[ \t].*)*)", lines, re.M)}


def archive(uris: list[str], suites: list[str], components: list[str]) -> Iterator[str]:
    """Those of a source's addresses that hold Debian's archive: a plain release name, with `main`."""
    if "main" in components and {"stable", "testing", "unstable", "sid", codename()} & set(suites):
        yield from uris


def codename() -> str:
    release = Path("/etc/os-release").read_text() if Path("/etc/os-release").exists() else ""
    fields = dict(line.split("=", 1) for line in release.splitlines() if "=" in line)
    return fields.get("VERSION_CODENAME", "").strip('"') if fields.get("ID", "").strip('"') == "debian" else "sid"


def download(source: str, apt: Path, prefix: Path) -> None:
    """Unpacks the packages and all that they depend on; the empty status file makes apt count nothing as installed."""
    shutil.rmtree(apt, ignore_errors=True)
    (apt / "lists" / "partial").mkdir(parents=True)
    (apt / "cache" / "archives" / "partial").mkdir(parents=True)
    (apt / "sources.list").write_text(source)
    (apt / "status").touch()
    options = {
        "Dir::Etc::SourceList": apt / "sources.list",
        "Dir::Etc::SourceParts": "/dev/null",
        "Dir::Etc::Preferences": "/dev/null",
        "Dir::Etc::PreferencesParts": "/dev/null",
        "Dir::State::Lists": apt / "lists",
        "Dir::State::status": apt / "status",
        "Dir::Cache": apt / "cache",
        "Acquire::Check-Valid-Until": "false",
        "Acquire::Languages": "none",
        "Acquire::Retries": "3",
        "Acquire::IndexTargets::deb::DEP-11::DefaultEnabled": "false",
        "APT::Install-Recommends": "false",
        "APT::Sandbox::User": "",
        "Debug::NoLocking": "true",
    }
    apt_get = ["apt-get", "-qq", *(part for name, value in options.items() for part in ("-o", f"{name}={value}"))]
    say("fetching Debian's llama-server (20 MB) …")
    run([*apt_get, "update"])
    run([*apt_get, "--yes", "--download-only", "install", *PACKAGES])
    for package in sorted((apt / "cache" / "archives").glob("*.deb")):
        run(["dpkg", "-x", str(package), str(prefix)])
    shutil.rmtree(apt)


def bind(prefix: Path, binary: Path) -> None:
    """Makes the binary use the prefix's loader, libc and libraries, and find its CPU back ends."""
    loader = next((prefix / "usr" / "lib").glob("*-linux-gnu*/ld-linux-*.so.*"))
    libraries = loader.parent
    backends = sorted((libraries / "ggml").glob("backends*/*.so"))
    ours = [*libraries.glob("lib*.so.*"), *(libraries / "llama").glob("*.so*"), *backends]
    ours = [path for path in ours if path.name.startswith(("libllama", "libggml", "libmtmd")) and not path.is_symlink()]
    # The packages' own patchelf needs the packages' own libc: run it through their loader.
    patchelf = [str(loader), "--library-path", str(libraries), str(prefix / "usr" / "bin" / "patchelf")]
    # DT_RPATH, unlike DT_RUNPATH, also serves the libraries' libraries.
    rpath = ["--force-rpath", "--set-rpath", f"{libraries}:{libraries / 'llama'}"]
    run([*patchelf, "--set-interpreter", str(loader), *rpath, str(binary)])
    run([*patchelf, *rpath, *map(str, ours)])
    for backend in backends:
        (binary.parent / backend.name).symlink_to(backend)


def run(command: list[str]) -> None:
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode != 0:
        raise NoServer(f"`{Path(command[0]).name} … {command[-1]}` failed: {done.stdout.strip()[-1000:]}\n{MEND}")


def say(message: str) -> None:
    print(f"llama-server: {message}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
