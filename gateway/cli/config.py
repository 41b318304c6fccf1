"""`corral config check`, and how every command comes by its configuration."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from pathlib import Path

from gateway.environment import load_settings
from gateway.errors import ConfigError
from gateway.settings import Settings


def load_configuration(file: Path | None = None) -> Settings:
    """Environment, `.env` and the models file (`file`, else CONFIG_PATH). Raises ConfigError."""
    settings = load_settings()
    path = file or settings.config_path
    if path is None:
        return settings
    from gateway.models.file import read_models_file

    content = read_models_file(path)
    if "models" not in content and "CONFIG_PATH" not in settings.explicit and file is None:
        return dataclasses.replace(settings, config_path=None)  # some other config.yaml that lies there
    settings = load_settings(file=content)
    if content.get("models") and settings.named_model:
        warning = f"{path}: its models are ignored, because one model is named"
        settings = dataclasses.replace(settings, warnings=(*settings.warnings, warning))
    elif content.get("models"):
        names = ", ".join(str(name) for name in content["models"])
        raise ConfigError(
            [f"{path}: serving several models is not possible yet; set MODEL_NAME or MODEL_PATH to one ({names})"]
        )
    return settings


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser(
        "config",
        help="check the configuration",
        epilog="example:\n  corral config check",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    check = commands.add_parser(
        "check",
        help="print every problem",
        description="Check the environment, .env and the models file; print every problem, exit 1 if there is any.",
        epilog="example:\n  PORT=80800 corral config check",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    check.add_argument("models_file", nargs="?", type=Path, metavar="FILE", help="a models file; default: CONFIG_PATH")
    check.set_defaults(run=run_check)


def run_check(args: argparse.Namespace) -> int:
    from gateway.runtime import check_configuration

    try:
        settings = load_configuration(args.models_file)
        check_configuration(settings)
    except ConfigError as error:
        for problem in error.problems:
            print(problem, file=sys.stderr)
        return 1
    for warning in settings.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    print("ok")
    return 0
