"""Settings from the command line, which override those of a preset or a settings file."""

import argparse
import dataclasses
import re
import textwrap
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import jsonargparse
import yaml

from examples.workbench.errors import InputError
from examples.workbench.plain import flatten
from examples.workbench.settings import METHODS, Settings
from examples.workbench.spelling import did_you_mean, find_mistake, is_setting, setting_types

__all__ = ["PRESETS", "OneLineParser", "read_settings"]

PRESETS = Path(__file__).parent / "presets"

_HELP = """usage: python -m examples.workbench train [OPTIONS]

Train one method on the built-in scenes, on a preset, or on your own images.

  --preset NAME          {presets}
  --config FILE          a YAML file of your own settings
  --data-root DIR        folder that contains the settings' image folders
  --out DIR              the run folder (default: a folder in runs/)
  --resume               continue from the last checkpoint of the run folder
  --check                check images and weights for a minute; do not train
  --init FILE            weights to start from; short for --network.init
  --save-predictions     also write the predicted masks of the test images

  --method METHOD        {methods}
                         (default: {defaults.method})
  --labelled LABELLED    which target images keep their labels: a number, or a
                         file of names (default: all; built-in scenes: 4)
  --steps N              number of training steps (default: {defaults.steps})
  --seed N               random seed of the run (default: {defaults.seed})
  --log_every N          steps between two rows of the log (default: {defaults.log_every})
  --save_every N         steps between two checkpoints (default: {defaults.save_every})
  --validate_every N     steps between two validations; 0: none (default: {defaults.validate_every})
  --precision NAME       64-true, 32-true or bf16-mixed (default: {defaults.precision})
  --accelerator NAME     auto, cpu, cuda or mps (default: {defaults.accelerator})

Other settings, as --GROUP.NAME VALUE (two values: '[96, 128]') or in the file:
  data                   classes, image folders, sizes, augmentation
  network                the segmenter and the weights it starts from
  optimiser              learning rate, batch sizes
  global_alignment       the global discriminator and its weight
  semantic_alignment     the semantic discriminator and its weight
  self_training          the teacher of self-training and ass-plus

--help-all lists all settings, with their values in --preset or --config.
--data.target.help lists the settings of an image folder, such as colours.
"""


class OneLineParser(argparse.ArgumentParser):
    """A parser of a command's options that raises InputError; argparse would print the usage and exit."""

    def __init__(self, command: str, epilog: str | None = None) -> None:
        super().__init__(prog=f"python -m examples.workbench {command}", epilog=epilog, allow_abbrev=False)

    def parse_args(self, arguments: Sequence[str]) -> argparse.Namespace:  # type: ignore[override]
        """Parse all arguments. Unknown options are refused first, since one may be a misspelt required option."""
        for option in (argument.partition("=")[0] for argument in arguments):
            if option.startswith("--") and option not in self._option_string_actions:
                self.error(f"unrecognized arguments: {option}")
        return super().parse_args(arguments)

    def error(self, message: str) -> Any:
        """Raise the message, and suggest the most similar option or choice if one is misspelt."""
        if unknown := re.fullmatch(r"unrecognized arguments: (--[^ =]+).*", message):
            message += did_you_mean(unknown[1], self._option_string_actions)
        elif choice := re.fullmatch(r".*invalid choice: '(.*)' \(choose from (.*)\)", message):
            message += did_you_mean(choice[1], choice[2].replace("'", "").split(", "))
        raise InputError(message)


def read_settings(arguments: Sequence[str]) -> tuple[Settings, argparse.Namespace]:
    """Parse the options of `train`. Return the settings, and the options that are no settings."""
    if {"-h", "--help"} & set(arguments):
        print(_describe_options(), end="")
        raise SystemExit(0)
    file = _settings_file(arguments)
    parser = jsonargparse.ArgumentParser(
        prog="python -m examples.workbench train",
        exit_on_error=False,
        allow_abbrev=False,
        default_config_files=[] if file is None else [file],
    )
    preset_help, root_help = f"one of {', '.join(_presets())}", "folder that contains the settings' image folders"
    parser.add_argument("--preset", metavar="NAME", help=preset_help)
    parser.add_argument("--config", metavar="FILE", help="a YAML file of your own settings")
    parser.add_argument("--data-root", metavar="DIR", type=Path, help=root_help)
    parser.add_argument("--out", metavar="DIR", help="the run folder; by default a folder in runs/")
    parser.add_argument("--init", metavar="FILE", help="weights to start from; short for --network.init")
    parser.add_argument("--resume", action="store_true", help="continue from the last checkpoint of the run folder")
    predictions_help = "also write the predicted masks of the test images"
    parser.add_argument("--save-predictions", action="store_true", help=predictions_help)
    parser.add_argument("--check", action="store_true", help="check images and weights for a minute; do not train")
    parser.add_class_arguments(Settings, None)
    if "--help-all" in arguments:
        parser.print_help()
        raise SystemExit(0)
    try:
        options = parser.instantiate(parser.parse_args(list(arguments)))
        settings = _plain_numbers(Settings(**{part.name: options[part.name] for part in dataclasses.fields(Settings)}))
        if options.init is not None:
            network = dataclasses.replace(settings.network, init=options.init)
            settings = dataclasses.replace(settings, network=network)
    except (argparse.ArgumentError, ValueError) as error:
        known = [option for action in parser._actions for option in action.option_strings]
        message = _find_mistake(arguments, file, known) or " ".join(str(error).split())
        raise InputError(f"{message} (in {file} or on the command line)" if file else message) from error
    return settings, options


def _find_mistake(arguments: Sequence[str], file: str | None, options: Sequence[str]) -> str | None:
    """An error message that corrects a misspelt name or choice, which the parser's own message does not do."""
    known = setting_types(Settings)
    beside = dict.fromkeys(option.lstrip("-").replace("-", "_") for option in options)
    values: dict[str, Any] = {}
    for argument, following in zip(arguments, [*arguments[1:], ""]):
        if argument.startswith("--"):
            option, _, value = argument.partition("=")
            setting = option.removeprefix("--").removesuffix("+")
            if option not in options and not is_setting(setting, known):
                meant = did_you_mean(option, [*options, *(f"--{name}" for name in known)])
                return f"train has no option {option}{meant}"
            if setting in known:
                values[setting] = _parse(value or following)
    written = _parse(Path(file).read_text(encoding="utf-8")) if file is not None else None
    given = flatten({**(written if isinstance(written, dict) else {}), **values})
    return find_mistake(given, {**beside, **known})


def _parse(text: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        return text


def _describe_options() -> str:
    """Help for the options of `train` that most runs need; it fits on one screen."""

    def wrap(names: Iterable[str]) -> str:
        return ("\n" + 25 * " ").join(textwrap.wrap(", ".join(names), 55, break_on_hyphens=False))

    return _HELP.format(presets=wrap(_presets()), methods=wrap(METHODS), defaults=Settings())


def _plain_numbers(value: Any) -> Any:
    """Settings with plain int and float numbers: a checkpoint cannot hold the subclasses that check the ranges."""
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
    """The file of the preset or of `--config`. It is read first, since other options override its settings."""
    first = OneLineParser("train")
    first.add_argument("--preset")
    first.add_argument("--config")
    chosen, _ = first.parse_known_args([argument for argument in arguments if argument != "--help-all"])
    preset, file = chosen.preset, chosen.config
    if preset is not None:
        if file is not None:
            raise InputError(f"expected either --preset or --config, got both: {preset} and {file}")
        if preset not in _presets():
            names, meant = ", ".join(_presets()), did_you_mean(preset, _presets())
            raise InputError(f"expected --preset to be one of {names}, got {preset}{meant}")
        return str(PRESETS / f"{preset}.yaml")
    if file is not None:
        if not Path(file).is_file():
            raise InputError(f"expected --config to be a YAML file, got {file}, which is not a file")
        try:
            Path(file).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"expected --config to be a text file in UTF-8, got {file}") from error
    return file  # type: ignore[no-any-return]


def _presets() -> list[str]:
    return sorted(path.stem for path in PRESETS.glob("*.yaml"))
