"""Settings from the command line, over those of a preset or a settings file."""

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jsonargparse

from examples.workbench.errors import InputError
from examples.workbench.settings import Settings

__all__ = ["PRESETS", "OneLineParser", "read_settings"]

PRESETS = Path(__file__).parent / "presets"


class OneLineParser(argparse.ArgumentParser):
    """A parser of a command's options that raises InputError instead of printing its usage."""

    def __init__(self, command: str, epilog: str | None = None) -> None:
        super().__init__(prog=f"python -m examples.workbench {command}", epilog=epilog, allow_abbrev=False)

    def error(self, message: str) -> Any:
        """Raise the message."""
        raise InputError(message)


def read_settings(arguments: Sequence[str]) -> tuple[Settings, argparse.Namespace]:
    """Parse the options of `train`: the settings, and the options beside them."""
    file = _settings_file(arguments)
    parser = jsonargparse.ArgumentParser(
        prog="python -m examples.workbench train",
        exit_on_error=False,
        allow_abbrev=False,
        default_config_files=[] if file is None else [file],
    )
    parser.add_argument("--preset", metavar="NAME", help=f"settings of the workbench: {', '.join(_presets())}")
    parser.add_argument("--config", metavar="FILE", help="a YAML file of settings")
    parser.add_argument("--data-root", metavar="DIR", type=Path, help="folder of the settings' image folders")
    parser.add_argument("--out", metavar="DIR", help="the run folder")
    parser.add_argument("--init", metavar="FILE", help="short for --network.init")
    parser.add_argument("--resume", action="store_true", help="continue from the run folder's last checkpoint")
    parser.add_argument("--save-predictions", action="store_true", help="write the test set's index masks")
    parser.add_argument("--check", action="store_true", help="check images and weights for a minute, train nothing")
    parser.add_class_arguments(Settings, None)
    try:
        options = parser.instantiate(parser.parse_args(list(arguments)))
        settings = _plain_numbers(Settings(**{part.name: options[part.name] for part in dataclasses.fields(Settings)}))
        if options.init is not None:
            network = dataclasses.replace(settings.network, init=options.init)
            settings = dataclasses.replace(settings, network=network)
    except (argparse.ArgumentError, ValueError) as error:
        message = " ".join(str(error).split())
        raise InputError(f"{message} (with the settings of {file})" if file else message) from error
    return settings, options


def _plain_numbers(value: Any) -> Any:
    """Settings whose numbers are int and float: a checkpoint cannot hold the subclasses that check the ranges."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        parts = {part.name: _plain_numbers(getattr(value, part.name)) for part in dataclasses.fields(value)}
        return dataclasses.replace(value, **parts)
    if isinstance(value, list | tuple):
        return type(value)(map(_plain_numbers, value))
    for kind in (int, float):
        if isinstance(value, kind) and not isinstance(value, bool):
            return kind(value)
    return value


def _settings_file(arguments: Sequence[str]) -> str | None:
    """The preset's file or the given one, known before the settings are parsed, whose options override it."""
    first = OneLineParser("train")
    first.add_argument("--preset")
    first.add_argument("--config")
    chosen, _ = first.parse_known_args([argument for argument in arguments if argument not in ("-h", "--help")])
    preset, file = chosen.preset, chosen.config
    if preset is not None:
        if file is not None:
            raise InputError(f"expected --preset or --config, got both, {preset} and {file}")
        if preset not in _presets():
            raise InputError(f"expected --preset to be one of {', '.join(_presets())}, got {preset}")
        return str(PRESETS / f"{preset}.yaml")
    if file is not None:
        try:
            Path(file).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"expected --config to be a text file in UTF-8, got {file}") from error
    return file  # type: ignore[no-any-return]


def _presets() -> list[str]:
    return sorted(path.stem for path in PRESETS.glob("*.yaml"))
