"""Command-line arguments that name a run, shared by all commands. It imports nothing slow, to keep `--help` fast."""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Sequence
from dataclasses import fields
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from hive_scale.key_guesses import ADVICE, is_known_elsewhere

if TYPE_CHECKING:
    from hive_scale.config import Config

DS_CONFIGS = Path(__file__).parent / "ds_configs"  # in a checkout, a link to the top-level folder


class Parser(argparse.ArgumentParser):
    """argparse's parser, with options anywhere among the words, and the nearest option for an unknown one.

    If the words are keys of a config (`add_run_arguments`), `--key=value` and `--key value` are such words, too.
    """

    takes_keys = False

    def __init__(self, *args: Any, **settings: Any) -> None:
        self._options: dict[str, bool] = {}  # option -> does it take a value?
        self._has_commands = self._is_mixing = False
        settings.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(*args, **settings)
        self.register("type", Path, lambda text: Path(os.path.expanduser(text)))  # shells leave the ~ of --output=~/x

    def add_argument(self, *names: Any, **settings: Any) -> argparse.Action:
        action = super().add_argument(*names, **settings)
        self._options.update(dict.fromkeys(action.option_strings, action.nargs != 0))
        return action

    def add_subparsers(self, **settings: Any) -> Any:
        self._has_commands = True
        return super().add_subparsers(**settings)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As argparse's, which parses a subcommand by it, too."""
        if self._has_commands or self._is_mixing:
            return super().parse_known_args(args, namespace)
        return self.parse_known_intermixed_args(args, namespace)

    def parse_known_intermixed_args(self, args: Any = None, namespace: Any = None) -> Any:
        self._is_mixing = True  # argparse does it by two calls of `parse_known_args`
        try:
            words = self._plain(sys.argv[1:] if args is None else args)
            return super().parse_known_intermixed_args(words, namespace)
        finally:
            self._is_mixing = False

    def parse_args(self, args: Any = None, namespace: Any = None) -> argparse.Namespace:  # type: ignore[override]
        found: argparse.Namespace
        found, rest = self.parse_known_args(args, namespace)
        if rest:
            self.error(f"unrecognized arguments: {' '.join(rest)}{self._hint(rest[0])}")
        return found

    def error(self, message: str) -> NoReturn:
        """Print usage and `message`, to which the nearest choice is added, and exit with 2."""
        if choice := re.search(r"invalid choice: '(.*?)' \(choose from (.*)\)", message):
            near = get_close_matches(choice[1], re.findall(r"[^',\s]+", choice[2]), n=1, cutoff=0.5)
            message += f": did you mean {near[0]}?" if near else ""
        super().error(message)

    def _plain(self, args: Sequence[str]) -> list[str]:
        """The arguments without unknown options: those that are keys of the config become words, which stand last."""
        plain: list[str] = []
        words: list[str] = []
        left = list(args)
        while left and left[0] != "--":
            one = left.pop(0)
            name, has_value, _ = one.partition("=")
            if self._knows(name):
                plain.append(one)
                if left and not has_value and self._options.get(name, True):
                    plain.append(left.pop(0))
            elif _is_option(name):
                words.append(self._word(one, left))
            elif has_value and re.fullmatch(r"[\w.-]+", name) and not os.path.exists(one):
                if not self.takes_keys and f"--{name}" in self._options:
                    self.error(f"unrecognized arguments: {one}: did you mean --{one}?")
                (words if self.takes_keys else plain).append(one)
            else:
                plain.append(one)
        return [*plain, *words, *left]

    def _knows(self, name: str) -> bool:
        """True if `name` is an option, or the beginning of one."""
        return _is_option(name) and any(option.startswith(name) for option in (*self._options, *self._listed()))

    def _listed(self) -> list[str]:
        return re.findall(r"--[\w-]+", self.format_usage())  # those of groups, too, but not the hidden ones

    def _word(self, option: str, left: list[str]) -> str:
        """The word of the config that an unknown option means; its value may be the next of the arguments `left`."""
        name, has_value, value = option.partition("=")
        hint = self._hint(name)
        if not hint and not self.takes_keys:
            hint = f": there are {', '.join(self._listed())}"
        if not hint and not has_value and _spelled(name) in ADVICE:
            hint = f": {ADVICE[_spelled(name)]}"
        if hint:
            self.error(f"unrecognized arguments: {name}{hint}")
        if not has_value and (not left or left[0].startswith("--") or "=" in left[0]):
            self.error(f"{name} has no value: keys of the config are words, such as {name.lstrip('-')}=VALUE")
        return f"{name.lstrip('-')}={value if has_value else left.pop(0)}"

    def _hint(self, given: str) -> str:
        """The option that was meant by `given`, as the end of a message; "" if it is a key, or nothing is near."""
        name = _spelled(given.partition("=")[0])
        options = {_spelled(option): option for option in sorted({*self._options, *self._listed()})}
        if self.takes_keys and name not in options and _is_key(name):
            return ""
        near = get_close_matches(name, options, n=1, cutoff=0.85 if is_known_elsewhere(name) else 0.7)
        return f": did you mean {options[near[0]]}?" if near else ""


def _spelled(option: str) -> str:
    return option.lstrip("-").replace("-", "_").lower()


def _is_option(name: str) -> bool:
    """True for ``--name`` and ``-name``; False for ``-1``, a word, or text that begins with a dash."""
    return bool(re.fullmatch(r"--[A-Za-z][\w.-]*|-[A-Za-z][\w.-]*", name))


def _is_key(name: str) -> bool:
    """True if `name` begins like a key that some command's words may have."""
    from hive_scale.config import Config  # imported here, since it takes longer than all else that parses

    first = name.split(".")[0]
    own = {*(one.name for one in fields(Config)), *Config.OLD_NAMES, "fusion", "encoder", "llm_only"}
    return first in own | {"slurm", "after", "then"}


def count(text: str) -> int:
    """The whole number that an option's `text` means: 60000, 60_000, 60k, 1.5M. Raises ArgumentTypeError."""
    found = re.fullmatch(r"([\d_,]*\d(?:\.\d+)?)([kKmM]?)", text)
    value = float(re.sub("[_,]", "", found[1])) * {"": 1, "k": 1e3, "m": 1e6}[found[2].lower()] if found else 0.5
    if value != round(value):
        raise argparse.ArgumentTypeError(f"'{text}' is no whole number: give one, such as 60000, 60k or 3M")
    return round(value)


def add_run_arguments(
    parser: Parser, keys: str = "any key of the config, such as output=DIR", default: str = "debug"
) -> None:
    """Add the arguments that name a run. `keys` is the help of the words, `default` the preset if none is named."""
    parser.set_defaults(default_preset=default)
    parser.takes_keys = True
    parser.add_argument("--preset", help=f"a run by its name (default {default}): see docs/index.md")
    parser.add_argument("--config", type=Path, metavar="FILE", help="YAML: a saved run, or changes to a preset")
    shipped = ", ".join(sorted(path.stem for path in DS_CONFIGS.glob("*.json")))
    parser.add_argument(
        "--ds_config", metavar="JSON", help=f"DeepSpeed ZeRO and offload: a file, or {shipped}; without: FSDP2"
    )
    parser.add_argument(
        "--ds_config_owned",
        choices=("refuse", "ignore"),
        help="what it fixes otherwise than the config, such as the batch: refuse it (default), or say so and go on",
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help=keys)


def add_training_arguments(parser: Parser) -> None:
    """Add the arguments of every command that trains."""
    parser.add_argument("--print_config", action="store_true", help="print the resolved config and stop")
    parser.add_argument(
        "--overwrite", action="store_true", help="move the run that is there to <output>.old-DATE and start over"
    )
    # a separate option, since --overwrite with an optional value would take a following key=value word for it
    parser.add_argument(
        "--overwrite=delete", dest="overwrite", action="store_const", const="delete", help="remove it instead"
    )
    parser.add_argument("--quiet", action="store_true", help="show warnings and errors only")
    levels = ("debug", "info", "warning", "error")
    parser.add_argument("--log_level", choices=levels, default="warning", help="of what libraries say (warning)")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # passed by the deepspeed launcher; unused


def named_run(arguments: argparse.Namespace, words: Sequence[str]) -> Config:
    """The config that `arguments` name, overridden by `words`. Raises ValueError with the remedy."""
    from hive_scale import credentials, presets
    from hive_scale.rundir import at_home

    for word in words:
        if "=" not in word:
            raise ValueError(f"config: '{credentials.hide(word)}' is not key=value{_meant_by(word)}")
    given = {"ds_config": arguments.ds_config and find_ds_config(arguments.ds_config)}
    given |= {"ds_config_owned": arguments.ds_config_owned}
    engine = [f"engine.{name}={value}" for name, value in given.items() if value]
    preset = arguments.preset or (None if arguments.config else arguments.default_preset)  # a file may name a preset
    config = presets.load(preset, arguments.config, [*words, *engine])
    if arguments.config and not any(word.startswith(("output=", "name=")) for word in words):
        config = at_home(config, arguments.config)
    if (named := credentials.variables()) and os.environ.get("RANK", "0") == "0":
        print(f"the command's shards read environment variables: {', '.join(named)}", file=sys.stderr)
    return config


def check_new_run(config: Config) -> None:
    """Raises ValueError if a new run's models or prepared sets are missing, before torch is imported, which takes long.

    Other runs may need none of them any more: they are checked when that is known.
    """
    from hive_scale.locate import check_sources

    if not config.run_dir.exists() and os.environ.get("RANK", "0") == "0":
        check_sources(config)


def _meant_by(word: str) -> str:
    from hive_scale.presets import PRESETS

    if word in PRESETS:
        return f": did you mean --preset {word}?"
    return f": did you mean --config {word}?" if word.endswith((".yaml", ".yml")) else ""


def find_ds_config(given: str) -> str:
    """Path of the DeepSpeed JSON `given`: a file, or one of the package ("zero2", "ds_configs/zero2.json").

    Anything else is returned unchanged, so that the engine refuses it.
    """
    path = Path(given)
    shipped = DS_CONFIGS / f"{path.stem}.json"
    by_name = path.name == path.stem or path.parent.name == DS_CONFIGS.name
    return str(shipped) if by_name and not path.exists() and shipped.is_file() else given
