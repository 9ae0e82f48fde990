"""easy-vqa as its package carries it, and its training questions as a set of tars with conversations."""

from __future__ import annotations

import json
from pathlib import Path

from hive_scale.chat_template import IMAGE
from hive_scale.data.conversation import SHORT
from hive_scale.prepare.packages import Package, fetch, members
from hive_scale.prepare.readers import table
from hive_scale.prepare.writer import ShardLayout, convert

WHEEL = Package("pypi", "easy-vqa", "1.0", "fcb51b309b78c7b00f97b64cdbcbcf5c105f94da1b39c0796cee5a787c4f650f")
_ROOT = "easy_vqa/data/"


def prepare(output: Path, cache: Path, overwrite: bool = False) -> dict[str, int]:
    """Write ``train/`` and ``test/`` as the package has them, and the tars of `conversations`.

    Raises what `conversations` and `fetch` raise.
    """
    for name, content in members(fetch(WHEEL, cache), lambda name: _ROOT in name).items():
        path = output / name.removeprefix(_ROOT)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return conversations(output, overwrite)


def conversations(folder: Path, overwrite: bool = False) -> dict[str, int]:
    """The questions of ``train/`` as ``train-*.tar`` and ``heldout-*.tar``, one a conversation; samples of each.

    Images are held out with all their questions. Raises ValueError if `folder` holds another set of tars.
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
