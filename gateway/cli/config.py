"""`corral config check`, and how every command comes by its configuration."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Iterable
from pathlib import Path

from gateway.crosscheck import without_password
from gateway.environment import models_files_in, read_settings
from gateway.errors import ConfigError
from gateway.models.spec import ModelSpec
from gateway.settings import Settings


def load_configuration(file: Path | None = None) -> Settings:
    """Environment, `.env` and the models file (`file`, else CONFIG_PATH). Raises ConfigError with all that is wrong.

    What only `check_configuration` can find is among it if there is anything else wrong, and left to it otherwise.
    """
    settings, problems = _read(file)
    if problems:
        from gateway.runtime.configuration import check_configuration

        try:
            check_configuration(settings)
        except ConfigError as error:
            problems += (problem for problem in error.problems if problem not in problems)
        raise ConfigError(problems)
    return settings


def _read(file: Path | None) -> tuple[Settings, list[str]]:
    settings, problems = read_settings()
    if (path := file or settings.config_path) is None:
        return settings, problems
    from gateway.models.configured.file import find_models_file, read_models_file

    found, warnings, with_models = None, list[str](), not settings.named_model
    try:
        if file is not None or "CONFIG_PATH" in settings.explicit:
            found = read_models_file(path, with_models=with_models)
        else:
            found, warnings = find_models_file(models_files_in(settings.data_dir), with_models=with_models)
    except ConfigError as error:
        raise ConfigError(problems + error.problems) from None
    if found is None:  # only other programs' files
        return dataclasses.replace(settings, config_path=None, warnings=(*settings.warnings, *warnings)), problems
    settings, problems = read_settings(file=found.content, origin=f"{found.path}: ")
    warnings = [*settings.warnings, *warnings, *found.warnings]
    if found.has_models and settings.named_model:
        warnings.append(f"{found.path}: its models are ignored, because one model is named")
    settings = dataclasses.replace(settings, config_path=found.path, warnings=tuple(warnings))
    return settings, [*problems, *found.problems]


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser(
        "config",
        help="check the configuration",
        epilog="example:\n  corral config check models.yaml",
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
    from gateway.runtime.configuration import check_configuration

    try:
        settings = load_configuration(args.models_file)
        registry, _ = check_configuration(settings)
        if registry.warnings:  # at a start these are the models' own problems; here they are what was asked for
            raise ConfigError(registry.warnings)
    except ConfigError as error:
        for problem in error.problems:
            print(problem, file=sys.stderr)
        return 1
    for warning in settings.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    for line in summary(registry.specs.values()):
        print(line)
    print("ok")
    return 0


def summary(specs: Iterable[ModelSpec]) -> list[str]:
    """A line for each model: its id, where it comes from, its other names."""
    rows = []
    for spec in specs:
        url = spec.url and without_password(spec.url)  # it has no business on a screen
        source = spec.path or url or (f"hf: {spec.hf}" if spec.hf else "MODEL_URL")
        rows.append((spec.id, str(source), f"also {', '.join(spec.aliases)}" if spec.aliases else ""))
    widths = [max((len(row[column]) for row in rows), default=0) for column in (0, 1)]
    return [f"{name:<{widths[0]}}  {source:<{widths[1]}}  {also}".rstrip() for name, source, also in rows]
