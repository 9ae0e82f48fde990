"""Pre-train a starting encoder: a ViT from scratch that predicts hidden patches of an image from the others.

Half the patches of an image are greyed out, and a linear layer on the last block's output predicts their pixels. No
labels or captions are used, so that the effect of pre-training can be told from the starting point.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import replace
from math import isqrt
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hive_scale import presets
from hive_scale.config import PartConfig, TokenizerConfig
from hive_scale.data.loader import Loader
from hive_scale.data.tokenizer import open_tokenizer
from hive_scale.distributed import World
from hive_scale.export.huggingface import export_encoder
from hive_scale.model import build
from hive_scale.model.encoders import hidden_states
from hive_scale.model.encoders import patches as of_patches
from hive_scale.schedule import lr_factor

BATCH, PEAK = 64, 1e-3


def train(encoder: Path, shards: list[str], steps: int, seed: int, output: Path) -> None:
    """Train the encoder that the JSON file `encoder` describes, and write it to `output` as a stock directory."""
    config = replace(presets.debug().model, vision=PartConfig(config=json.loads(encoder.read_text())))
    model = build.init_model(config, seed)
    layers, patch = model.vision.config.num_hidden_layers, model.vision.config.patch_size
    data = replace(presets.debug().data, train=shards)
    loader = Loader(data, shards, open_tokenizer(TokenizerConfig()), image_size=build.image_size(config))
    world = World(0, 1, torch.device("cpu"))
    batches = loader.steps(global_batch=BATCH, accumulation=1, seed=seed, start=0, world=world)
    draw = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        predict = nn.Linear(model.vision.config.hidden_size, 3 * patch * patch)
    parameters = [*model.vision.parameters(), *predict.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=PEAK, betas=(0.9, 0.95), weight_decay=0.05)
    for step in range(steps):
        [batch] = next(batches)
        pixels = (batch.pixels.float() - model.pixel_mean) / model.pixel_std
        patches = _patches(pixels, patch)
        hidden = torch.rand(patches.shape[:2], generator=draw) < 0.5
        states = hidden_states(model.vision, _greyed(pixels, hidden, patch), layers)
        features = of_patches(model.vision, states[-1])
        loss = F.mse_loss(predict(features)[hidden], patches[hidden])
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.param_groups[0]["lr"] = PEAK * lr_factor(step, steps, 0.05, 0.01)
        optimizer.step()
        if step % 50 == 0 or step + 1 == steps:
            print(f"base {step + 1}/{steps}  loss {loss.item():.4f}", flush=True)
    export_encoder(config, {name: p.detach() for name, p in model.named_parameters()}, output, "resize")


def _patches(pixels_BCHW: Tensor, patch: int) -> Tensor:
    """Split images into patches (B, V, 3 * patch * patch), in the order of the encoder's tokens."""
    return F.unfold(pixels_BCHW, patch, stride=patch).transpose(1, 2)


def _greyed(pixels_BCHW: Tensor, hidden_BV: Tensor, patch: int) -> Tensor:
    side = isqrt(hidden_BV.shape[1])
    mask = hidden_BV.view(-1, 1, side, side).repeat_interleave(patch, 2).repeat_interleave(patch, 3)
    return pixels_BCHW.masked_fill(mask, 0.0)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--encoder", type=Path, required=True)
    parser.add_argument("--shards", nargs="+", required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    train(arguments.encoder, arguments.shards, arguments.steps, arguments.seed, arguments.output)
