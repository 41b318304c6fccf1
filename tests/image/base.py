"""A stand-in for llama.cpp's official images: Debian sid and its llama-server, where the official ones have theirs.

It stays on this machine and may know it: its Debian mirror, its certificates, its package index.
"""

from __future__ import annotations

import hashlib
import re
import subprocess
import sys
from pathlib import Path

from scripts.fetch_llama_server import debian_mirrors
from tests.image.engine import Engine

NAMES = ("ghcr.io/ggml-org/llama.cpp:server", "ghcr.io/ggml-org/llama.cpp:server-cuda")
CERTIFICATES = Path("/etc/ssl/certs/ca-certificates.crt")
# The official images have curl, and with it ca-certificates; as all images of Debian and Ubuntu, no documentation.
RECIPE = (
    "--quiet",
    "--variant=apt",
    "--include=llama.cpp-tools,ca-certificates",
    '--aptopt=Acquire::Check-Valid-Until "false"',
    '--aptopt=APT::Install-Recommends "false"',
    *(f"--dpkgopt=path-exclude=/usr/share/{part}/*" for part in ("doc", "man", "locale", "info")),
    '--customize-hook=mkdir "$1/app"',
    '--customize-hook=ln -s /usr/bin/llama-server "$1/app/llama-server"',
)
CHANGES = ('ENTRYPOINT ["/app/llama-server"]', "WORKDIR /app", "ENV LLAMA_ARG_HOST=0.0.0.0")


def provide_base(engine: Engine) -> None:
    """Both official names stand for the stand-in. Made anew only if what it is made of has changed."""
    mirror = next(debian_mirrors(Path("/etc/apt")), None)
    assert mirror, "this machine's apt sources name no Debian mirror"
    pip = pip_configuration()
    made_of = repr((RECIPE, CHANGES, mirror, pip)).encode() + CERTIFICATES.read_bytes()
    archive = engine.cache / f"{hashlib.sha256(made_of).hexdigest()[:16]}.tar"
    if not archive.exists():
        for old in engine.cache.glob("*.tar"):
            old.unlink()
        make_archive(archive, mirror, pip)
    label = f"corral.base={archive.stem}"
    known = engine.podman("images", "--filter", f"label={label}", "--format", "{{.Repository}}:{{.Tag}}").split()
    if not set(NAMES) <= set(known):
        changes = [part for change in (*CHANGES, f"LABEL {label}") for part in ("--change", change)]
        image = engine.podman("import", "--quiet", *changes, str(archive)).split()[-1]
        for name in NAMES:
            engine.podman("tag", image, name)


def make_archive(archive: Path, mirror: str, pip: str) -> None:
    partial, configuration = archive.with_suffix(".partial"), archive.with_suffix(".pip")
    configuration.write_text(pip)
    hooks = (
        f"--customize-hook=upload {CERTIFICATES} {CERTIFICATES}",
        f"--customize-hook=upload {configuration} /etc/pip.conf",
    )
    command = ["mmdebstrap", "--format=tar", *RECIPE, *hooks, "sid", str(partial), mirror]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"mmdebstrap: {done.stderr[-4000:]}"
    partial.replace(archive)
    configuration.unlink()


def pip_configuration() -> str:
    """Where pip finds packages on this machine, whichever file or variable says so."""
    listed = subprocess.run(
        [sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True, check=True
    ).stdout
    found = dict(re.findall(r"^[\w:]+\.((?:extra-)?index-url|trusted-host|proxy)='(.*)'$", listed, re.MULTILINE))
    return "[global]\n" + "".join(f"{name} = {value}\n" for name, value in sorted(found.items()))
