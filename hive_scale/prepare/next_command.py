"""The command that trains on a set that was just written, to be pasted into a shell."""

from __future__ import annotations

import glob
import re
import shlex
import sys
from collections.abc import Sequence
from json import dumps
from pathlib import Path

from hive_scale.data.shards import all_shards, expand

SIMPLE = re.compile(r"[\w./*+-]+", re.ASCII)  # shard patterns that YAML reads as they are
SMALL = 1024  # samples of the largest batch in the paper's recipe: fewer do not fill it
PREFIXED = re.compile(r"[\d.]+ x |[^/]*:|~")  # what a pattern would mean at its beginning


def command_name(name: str) -> str:
    """Return how to call command `name`, as this command was called: a launcher's path, or ``-m hive_scale``."""
    launcher, here = sys.argv[0], "prepare_data.py"
    if not launcher.endswith(here):
        return f"python -m hive_scale {name}"
    return f"python {shlex.quote(launcher.removesuffix(here) + name + '.py')}"


def pretrain_command(output: Path, samples: int, heldout: int) -> str:
    """Return the command that pre-trains on ``train-*.tar`` in `output`, which has `samples` samples.

    Fewer than a batch of the paper's recipe go with the preset debug, a small model without a download.
    """
    preset = "rtx3090" if samples >= SMALL else "debug"
    name = re.sub(r"[^\w.+-]", "_", output.resolve().name)
    words = [f"output=runs/{name}", *data_words(output, heldout)]
    return f"{command_name('pretrain')} --preset {preset} {' '.join(map(shlex.quote, words))}"


def data_words(output: Path, heldout: int, key: str = "data") -> list[str]:
    """Return the words ``data.train=...`` and ``data.heldout=...`` for the tars in `output`."""
    held = f"[{_item(output, 'heldout')}]" if heldout else "none"
    return [f"{key}.train=[{_item(output, 'train')}]", f"{key}.heldout={held}"]


def check_patterns(output: Path, splits: Sequence[str]) -> None:
    """Raise ValueError if the folder's name has characters with which no pattern finds its tars."""
    if "${" in str(output):  # a reference in the config's language
        raise ValueError(f"no shard pattern names the tars in {output}: rename the folder")
    for split in splits:
        tars = sorted(map(str, output.glob(f"{split}-*.tar")))
        try:
            found = [str(Path(one)) for one in all_shards(expand([pattern(output, split)]))]
        except ValueError as error:
            raise ValueError(f"no shard pattern names the tars in {output} ({error}): rename the folder") from None
        if sorted(found) != tars:
            raise ValueError(f"no shard pattern names the tars in {output}: rename the folder")


def pattern(output: Path, split: str) -> str:
    """Return the pattern of a split's tars, in which characters of the folder's name mean themselves."""
    folder = str(output)
    folder = f"./{folder}" if PREFIXED.match(folder) else folder
    folder = glob.escape(folder.replace("\\", "\\\\"))
    return re.sub(r"[{}]", r"\\\g<0>", folder) + f"/{split}-*.tar"


def _item(output: Path, split: str) -> str:
    one = pattern(output, split)
    return one if SIMPLE.fullmatch(one) else dumps(one, ensure_ascii=False, allow_nan=False)
