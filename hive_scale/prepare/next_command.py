"""The command that trains on a set that was just written, to be pasted into a shell."""

from __future__ import annotations

import glob
import re
import shlex
from collections.abc import Callable, Sequence
from json import dumps
from pathlib import Path

from hive_scale.data.shards import all_shards, expand
from hive_scale.locate import command_name
from hive_scale.strangers import printable

SIMPLE = re.compile(r"[\w./*+-]+", re.ASCII)  # shard patterns that YAML reads as they are
SMALL = 1024  # samples of the largest batch in the paper's recipe: fewer do not fill it
PREFIXED = re.compile(r"[\d.]+ x |[^/]*:|~")  # what a pattern would mean at its beginning


def next_step(
    output: Path, samples: int, heldout: int, command: Callable[[Path, int, int], str], encoder: str = ""
) -> str:
    """Return lines with the command that trains on the tars in `output`, or with what prevents it; "" without samples.

    `command` makes it of `output`, the number of samples to train on and the number of held-out samples. `encoder` is
    the run that must be there for it.
    """
    if not samples:
        return ""
    try:
        check_patterns(output, ["train", *["heldout"] * bool(heldout)])
    except ValueError as error:  # the set itself is complete
        return printable(error)
    needed = f", with the encoder of {encoder}" if encoder else ""
    return f"train on it{needed}:\n  {printable(command(output, samples, heldout))}"


def pretrain_command(output: Path, samples: int, heldout: int, preset: str = "", run: str = "") -> str:
    """Return the command that pre-trains `run` (by the folder's name) on ``train-*.tar`` in `output`.

    Without `preset`, fewer samples than a batch of the paper's recipe go with debug, a small model without a download,
    and others with rtx3090.
    """
    preset = preset or ("rtx3090" if samples >= SMALL else "debug")
    name = run or re.sub(r"[^\w.+-]", "_", output.resolve().name)
    words = ["--preset", preset, f"output=runs/{name}", *data_words(output, heldout)]
    return f"{command_name('pretrain')} {shlex.join(words)}"


def finetune_command(output: Path, samples: int, heldout: int, words: Sequence[str], key: str = "data") -> str:
    """Return the command that fine-tunes a VLM; `words` name the encoder and the run, `key` the data's option."""
    return f"{command_name('finetune_vlm')} {shlex.join([*words, *data_words(output, heldout, key)])}"


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
