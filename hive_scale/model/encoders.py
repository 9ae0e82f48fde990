"""The encoder's side: which depths are tapped, and the feature map of each.

Shapes: B images, V visual tokens (patches), C encoder width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from hive_scale.config import Depths

# Released preprocessing of the two families (mean, standard deviation per channel, of pixels in [0, 1]).
PIXEL_STATISTICS = {
    "siglip_vision_model": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    "clip_vision_model": ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
}


def mean_colour(model_type: str) -> tuple[int, int, int]:
    """Mean (red, green, blue) of a family's pixels, 0 to 255, rounded down as `LlavaImageProcessor` does."""
    red, green, blue = (int(255 * mean) for mean in PIXEL_STATISTICS[model_type][0])
    return red, green, blue


def group_ends(num_layers: int, num_groups: int) -> tuple[int, ...]:
    """Last index of each of `num_groups` nearly equal runs of ``range(num_layers)``, the longer runs first."""
    size, longer = divmod(num_layers, num_groups)
    return tuple((group + 1) * size + min(group + 1, longer) - 1 for group in range(num_groups))


def encoder_depths(num_layers: int, density: float, rule: Depths) -> tuple[int, ...]:
    """Selected set S of encoder depths, ascending; depth d is the output of block d, 0 the embeddings.

    The last block is never among them, since downstream tasks read the one before it (paper 3.2, 4.5), and the
    embeddings, which no block has seen, are not either: the densest set is that of all depths between, 1 to
    `num_layers` - 1. Raises ValueError for an encoder that has none between.
    """
    if num_layers < 2:
        raise ValueError(f"an encoder of {num_layers} block has no depth to tap below its last: give it 2 or more")
    count = min(max(1, round(density * num_layers)), num_layers - 1)
    if rule == "later":
        return tuple(range(num_layers - count, num_layers))
    return group_ends(num_layers, count)


def hidden_states(vision: nn.Module, pixels_BCHW: Tensor, deepest: int) -> list[Tensor]:
    """Embeddings and the outputs of blocks 1 to `deepest`, (B, V, C) each, a class token before them if there is one.

    `vision` is a SiglipVisionModel or CLIPVisionModel. Blocks above `deepest` are not run.
    """
    tower: Any = vision
    hidden = tower.embeddings(pixels_BCHW)
    if hasattr(tower, "pre_layrnorm"):  # CLIP normalises its embeddings (and spells it so)
        hidden = tower.pre_layrnorm(hidden)
    states = [hidden]
    for layer in tower.encoder.layers[:deepest]:
        states.append(layer(states[-1], None))
    return states


def patches(vision: nn.Module, hidden: Tensor) -> Tensor:
    """Of a hidden state, or its gradient, what belongs to patches: (B, V, C), the class token dropped."""
    tower: Any = vision
    return hidden[:, 1:] if hasattr(tower.embeddings, "class_embedding") else hidden


def covered(vision: nn.Module) -> int:
    """Side in pixels of what the patches cover of an image: a rest at its right and lower edges is never read."""
    config: Any = vision.config
    side: int = config.image_size - config.image_size % config.patch_size
    return side


def reached(name: str, depths: Sequence[int]) -> bool:
    """Whether a model that taps `depths` reads the encoder parameter called `name`."""
    if name.startswith("encoder.layers."):
        return int(name.split(".")[2]) < max(depths)
    return name.startswith(("embeddings.", "pre_layrnorm."))
