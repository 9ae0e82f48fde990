"""What a pre-trained model makes of held-out images: loss, whether a caption fits its own image best, captions."""

from __future__ import annotations

import argparse
import sys
from itertools import islice
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch

from hive_scale.distributed import World
from hive_scale.evaluate.captions import matched_share, write
from hive_scale.preflight import open_data
from hive_scale.report.summary import heldout_losses
from hive_scale.run import open_hive
from hive_scale.strict_json import dumps

PAIRS, BATCH, SHOWN = 512, 32, 8


def measure(run: Path) -> dict[str, object]:
    """Held-out loss in nats per token, share of captions likelier with their own image, captions beside the true ones.

    Raises ValueError if the run has no held-out samples.
    """
    config, stage, model = open_hive(run)
    data = open_data(config, stage)
    if not data.heldout:
        raise ValueError(f"{run} holds nothing out: set data.heldout")
    world = World(0, 1, torch.device("cpu"))
    share = matched_share(model, islice(data.heldout.once(batch_size=BATCH, world=world), PAIRS // BATCH))
    pairs = list(data.heldout.spread(SHOWN))
    written = write(model, data.tokenizer, [pixels for pixels, _ in pairs])
    captions = [{"truth": truth, "model": text} for (_, truth), text in zip(pairs, written, strict=True)]
    return {"loss": heldout_losses(config)[stage][-1], "own image": 100 * share, "captions": captions}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    found = measure(arguments.run)
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(dumps(found, indent=1) + "\n")
