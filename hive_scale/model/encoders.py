"""The encoder's side: families of vision encoders, which depths are tapped, and the feature map of each.

Shapes: B images, V visual tokens (patches), C encoder width.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any, ClassVar, cast

from torch import Tensor, nn
from transformers import CLIPImageProcessor, CLIPVisionModel, PretrainedConfig, SiglipImageProcessor, SiglipVisionModel

from hive_scale.config import Depths, ImageMode
from hive_scale.registry import ENCODERS

Colour = tuple[float, float, float]  # red, green, blue


class EncoderFamily:
    """What is asked about one family of transformers' vision encoders: an entry answers what differs from here.

    Its configs have ``hidden_size``, ``num_hidden_layers``, ``image_size`` and ``patch_size``, one number each.
    """

    model: ClassVar[Any]  # the class of transformers
    processor: ClassVar[Any]  # the class of the image processor that the family was released with
    num_leading: ClassVar[int] = 0  # tokens before the patches: class and registers
    blocks_at: ClassVar[str] = "encoder.layers"  # where a tower has its blocks
    before_blocks: ClassVar[tuple[str, ...]] = ("embeddings.",)  # parameters of what the first block takes
    file_prefix: ClassVar[str] = "vision_model."  # in files, for transformers 4 and 5 both

    def embed(self, tower: Any, pixels_BCHW: Tensor) -> Tensor:
        """What the first block takes, (B, leading + V, C), of normalised pixels."""
        hidden: Tensor = tower.embeddings(pixels_BCHW)
        return hidden

    def blocks(self, tower: nn.Module) -> nn.ModuleList:
        """In the order in which they run."""
        return cast(nn.ModuleList, tower.get_submodule(self.blocks_at))

    def run_block(self, block: Any, hidden: Tensor) -> Tensor:
        """(B, leading + V, C) to the same shape."""
        done: Tensor = block(hidden, None)
        return done

    def num_patches(self, config: Any) -> int:
        """V, of an image."""
        side: int = config.image_size // config.patch_size
        return side * side

    def is_read(self, name: str, depths: Sequence[int]) -> bool:
        """Whether a model that taps `depths` reads the tower's parameter called `name`."""
        if name.startswith(f"{self.blocks_at}."):
            return int(name.removeprefix(f"{self.blocks_at}.").split(".")[0]) < max(depths)
        return name.startswith(self.before_blocks)

    @classmethod
    @cache
    def _released(cls) -> Any:
        return cls.processor()

    @property
    def pixel_mean(self) -> Colour:
        """Of pixels in [0, 1], by channel, as the family's own image processor has it."""
        return cast(Colour, tuple(self._released().image_mean))

    @property
    def pixel_std(self) -> Colour:
        """Of pixels in [0, 1], by channel."""
        return cast(Colour, tuple(self._released().image_std))

    @property
    def image_mode(self) -> ImageMode:
        """How the family's own image processor makes a square of an image."""
        return "crop" if getattr(self._released(), "do_center_crop", False) else "resize"

    @property
    def mean_colour(self) -> tuple[int, int, int]:
        """(red, green, blue) of the mean, 0 to 255, rounded down as `LlavaImageProcessor` does."""
        red, green, blue = (int(255 * mean) for mean in self.pixel_mean)
        return red, green, blue


@ENCODERS.register("siglip_vision_model")
class Siglip(EncoderFamily):
    """SigLIP: no class token, no norm before the blocks."""

    model, processor = SiglipVisionModel, SiglipImageProcessor


@ENCODERS.register("clip_vision_model")
class Clip(EncoderFamily):
    """CLIP: a class token, and a norm before the first block (which transformers spells ``pre_layrnorm``)."""

    model, processor = CLIPVisionModel, CLIPImageProcessor
    num_leading = 1
    before_blocks = ("embeddings.", "pre_layrnorm.")

    def embed(self, tower: Any, pixels_BCHW: Tensor) -> Tensor:
        hidden: Tensor = tower.pre_layrnorm(tower.embeddings(pixels_BCHW))
        return hidden


def family_of(config: PretrainedConfig) -> EncoderFamily:
    """The entry of an encoder's config. Raises ValueError for a family that is not there."""
    made: EncoderFamily = ENCODERS[config.model_type]()
    return made


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


def hidden_states(tower: Any, pixels_BCHW: Tensor, deepest: int) -> list[Tensor]:
    """Embeddings and the outputs of blocks 1 to `deepest`, (B, leading + V, C) each.

    `tower` is an encoder of a registered family, `pixels` are normalised. Blocks above `deepest` are not run.
    """
    family = family_of(tower.config)
    states = [family.embed(tower, pixels_BCHW)]
    for block in family.blocks(tower)[:deepest]:
        states.append(family.run_block(block, states[-1]))
    return states


def patches(tower: Any, hidden: Tensor) -> Tensor:
    """Of a hidden state, or its gradient, what belongs to patches: (B, V, C)."""
    return hidden[:, family_of(tower.config).num_leading :]


def covered(tower: Any) -> int:
    """Side in pixels of what the patches cover of an image: a rest at its right and lower edges is never read."""
    config = tower.config
    side: int = config.image_size - config.image_size % config.patch_size
    return side
