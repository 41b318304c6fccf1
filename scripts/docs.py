"""Rewrites what README.md and .env.example tell of the variables, which are declared in gateway/settings.py.

In README.md that is everything between the two `variables` markers; .env.example is written as a whole.
Run it as: .venv/bin/python -m scripts.docs
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterator
from pathlib import Path

from gateway.settings import Variable, variables

ROOT = Path(__file__).resolve().parent.parent
README, EXAMPLE = ROOT / "README.md", ROOT / ".env.example"
BEGIN, END = "<!-- variables: written by scripts/docs.py -->", "<!-- /variables -->"

# The first variable of each section → its title; the order is that of their declarations.
SECTIONS = {
    "MODEL_NAME": "The model",
    "LLAMA_SERVER_PATH": "llama-server",
    "PORT": "Listeners",
    "AUTH_ENABLED": "Keys and limits",
    "MAX_CONCURRENT_REQUESTS": "Queue",
    "MAX_REQUEST_BODY_SIZE": "Sizes and times of a request",
    "VRAM_BUDGET_MB": "Memory and idleness",
    "AUDIT_DB": "Records, cache, other machines",
    "LOG_FORMAT": "Logs and state",
}

EXAMPLE_HEAD = """\
# Corral reads this file as `.env` from the directory that it is started in; real variables win over it.
# Every line that is commented out shows the default. An empty value counts as unset.
# Sizes are bytes and times seconds unless a name says otherwise. `planned`: read and checked, but without effect yet.
# Written by scripts/docs.py from gateway/settings.py.
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if something is out of date")
    check = parser.parse_args().check
    stale = {path: text for path, text in wanted().items() if not path.exists() or path.read_text() != text}
    for path, text in stale.items():
        if not check:
            path.write_text(text)
        print(f"{'out of date' if check else 'written'}: {path.relative_to(ROOT)}")
    return 1 if stale and check else 0


def wanted() -> dict[Path, str]:
    """The files and what should be in them."""
    return {README: with_tables(README.read_text()), EXAMPLE: example()}


def with_tables(readme: str) -> str:
    before, begin, rest = readme.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"README.md lacks the markers {BEGIN} and {END}")
    return f"{before}{begin}\n\n{tables()}\n{end}{after}"


def sections() -> Iterator[tuple[str, list[Variable]]]:
    title, members = "", list[Variable]()
    for var in variables():
        if var.name in SECTIONS:
            if members:
                yield title, members
            title, members = SECTIONS[var.name], []
        members.append(var)
    yield title, members


def planned() -> frozenset[str]:
    """Variables that nothing reads yet: neither as `settings.name` in the gateway nor by name before it starts."""
    gateway = [path for path in (ROOT / "gateway").rglob("*.py") if path.name != "settings.py"]
    read = {name for path in gateway for name in re.findall(r"settings\.([a-z0-9_]+)", path.read_text())}
    before = "".join(path.read_text() for path in [ROOT / "entrypoint.sh", *(ROOT / "health").glob("*.py")])
    unread = {v.name for v in variables() if v.name.lower() not in read and not re.search(rf"\b{v.name}\b", before)}
    if not (ROOT / "gateway" / "cli" / "worker.py").exists():
        unread.add("WORKER_MODE")  # entrypoint.sh reads it, but there is only one mode to run
    return frozenset(unread)


def tables() -> str:
    not_yet = planned()
    parts = []
    for title, members in sections():
        rows = [f"| `{var.name}` | {_default(var)} | {_meaning(var, var.name in not_yet)} |" for var in members]
        parts.append("\n".join([f"**{title}**\n", "| variable | default | meaning |", "|---|---|---|", *rows, ""]))
    return "\n".join(parts)


def example() -> str:
    not_yet = planned()
    lines = [EXAMPLE_HEAD]
    for title, members in sections():
        lines.append(f"\n# ---- {title} ----\n")
        for var in members:
            value = "" if var.shown is not None or var.shown_default == "–" else var.shown_default
            lines += [f"# {_plain(var, var.name in not_yet)}", f"#{var.name}={value}\n"]
    return "\n".join(lines)


def _default(var: Variable) -> str:
    if var.shown is not None:
        return _marked(var.shown)
    return var.shown_default if var.shown_default == "–" else f"`{var.shown_default}`"


def _meaning(var: Variable, not_yet: bool) -> str:
    return ("*planned:* " if not_yet else "") + "; ".join([_marked(var.help), *_more(var, "`")])


def _plain(var: Variable, not_yet: bool) -> str:
    shown = [f"default: {var.shown}"] if var.shown else []
    return ("planned: " if not_yet else "") + "; ".join([var.help.replace("`", ""), *_more(var, ""), *shown])


def _more(var: Variable, quote: str) -> Iterator[str]:
    """What may be set, and the older names."""
    if var.choices:
        yield "one of " + ", ".join(f"{quote}{choice}{quote}" for choice in var.choices)
    if var.aliases:
        yield ", ".join(f"{quote}{name}{quote}" for name in var.aliases) + " works too"
    if var.deprecated:
        yield ", ".join(f"{quote}{name}{quote}" for name in var.deprecated) + " is its deprecated name"


def _marked(text: str) -> str:
    """Markdown of a help text: names of variables and paths as code."""
    names = "|".join(sorted((var.name for var in variables()), key=len, reverse=True))
    code = re.compile(rf"`[^`]*`|(?<![\w$/])(?:[$/][\w./{{}},$-]*[\w}}]|(?:{names})(?!\w))")
    return code.sub(lambda match: match[0] if match[0].startswith("`") else f"`{match[0]}`", text)


if __name__ == "__main__":
    sys.exit(main())
