"""Prepare easy-vqa: the package's own files, and its training questions as tars of conversations."""

from __future__ import annotations

import json
from pathlib import Path

from hive_scale.chat_template import IMAGE
from hive_scale.data.messages import SHORT
from hive_scale.prepare.packages import Package, fetch, members
from hive_scale.prepare.readers import table
from hive_scale.prepare.writer import ShardLayout, convert

WHEEL = Package("pypi", "easy-vqa", "1.0", "fcb51b309b78c7b00f97b64cdbcbcf5c105f94da1b39c0796cee5a787c4f650f")
_ROOT = "easy_vqa/data/"


def prepare(output: Path, cache: Path, overwrite: bool = False) -> dict[str, int]:
    """Write ``train/`` and ``test/`` as in the package, and the tars of `conversations`; return samples per split.

    Raises what `conversations` and `fetch` raise.
    """
    for name, content in members(fetch(WHEEL, cache), lambda name: _ROOT in name).items():
        path = output / name.removeprefix(_ROOT)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return conversations(output, overwrite)


def conversations(folder: Path, overwrite: bool = False) -> dict[str, int]:
    """Write the questions of ``train/`` to ``train-*.tar`` and ``heldout-*.tar``, one per conversation.

    Returns the number of samples per split. Each image is held out with all its questions. Raises ValueError if
    `folder` holds another set of tars.
    """
    asked = json.loads((folder / "train" / "questions.json").read_text())
    records = [
        {
            "id": str(place),
            "image": f"{number}.png",
            "conversations": [
                {"from": "human", "value": f"{IMAGE}\n{question}{SHORT}"},
                {"from": "gpt", "value": answer},
            ],
        }
        for place, (question, answer, number) in enumerate(asked)
    ]
    told = folder / "train" / "llava.json"
    told.write_text(json.dumps(records, allow_nan=False))
    source = table(told, folder / "train" / "images")
    samples = dict.fromkeys(("train", "heldout"), 0)
    for shard in convert(source, folder, ShardLayout(heldout=0.01), 1, overwrite):
        samples[shard.name.split("-")[0]] += shard.samples
    return samples
