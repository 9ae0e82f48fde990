"""Vision encoders: their families, the depths whose features the LLM gets, and the feature map at each depth.

Shapes: B images, V visual tokens (patches), C encoder width.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any, ClassVar, cast

from torch import Tensor, nn
from transformers import CLIPImageProcessor, CLIPVisionModel, PretrainedConfig, SiglipImageProcessor, SiglipVisionModel

from hive_scale.config import ImageMode, ModelConfig
from hive_scale.registry import ENCODERS

Colour = tuple[float, float, float]  # red, green, blue


class EncoderFamily:
    """Base class of a family of transformers' vision encoders; a registered subclass overrides what differs.

    The family's configs have ``hidden_size``, ``num_hidden_layers``, ``image_size`` and ``patch_size``, all integers.
    """

    model: ClassVar[Any]  # transformers' model class
    processor: ClassVar[Any]  # transformers' image processor class, which the family was released with
    num_leading: ClassVar[int] = 0  # tokens before the patches: class token and registers
    blocks_at: ClassVar[str] = "encoder.layers"  # submodule that holds the blocks
    before_blocks: ClassVar[tuple[str, ...]] = ("embeddings.",)  # name prefixes of parameters used before the blocks
    file_prefix: ClassVar[str] = "vision_model."  # prefix of names in files, for transformers 4 and 5 both

    def embed(self, tower: Any, pixels_BCHW: Tensor) -> Tensor:
        """The first block's input (B, leading + V, C), from normalised pixels (B, 3, H, W)."""
        hidden: Tensor = tower.embeddings(pixels_BCHW)
        return hidden

    def blocks(self, tower: nn.Module) -> nn.ModuleList:
        """The blocks, in the order in which they run."""
        return cast(nn.ModuleList, tower.get_submodule(self.blocks_at))

    def run_block(self, block: Any, hidden: Tensor) -> Tensor:
        """Run one block on hidden states (B, leading + V, C); the shape stays."""
        done: Tensor = block(hidden, None)
        return done

    def num_patches(self, config: Any) -> int:
        """V, the number of patches of one image."""
        side: int = config.image_size // config.patch_size
        return side * side

    def is_read(self, name: str, depths: Sequence[int]) -> bool:
        """True if a model that uses the features at `depths` reads the encoder's parameter `name`."""
        if name.startswith(f"{self.blocks_at}."):
            return int(name.removeprefix(f"{self.blocks_at}.").split(".")[0]) < max(depths)
        return name.startswith(self.before_blocks)

    @classmethod
    @cache
    def _released(cls) -> Any:
        return cls.processor()

    @property
    def pixel_mean(self) -> Colour:
        """Mean of pixels in [0, 1], by channel, from the family's own image processor."""
        return cast(Colour, tuple(self._released().image_mean))

    @property
    def pixel_std(self) -> Colour:
        """Standard deviation of pixels in [0, 1], by channel, from the family's own image processor."""
        return cast(Colour, tuple(self._released().image_std))

    @property
    def image_mode(self) -> ImageMode:
        """How the family's own image processor makes images square."""
        return "crop" if getattr(self._released(), "do_center_crop", False) else "resize"

    @property
    def mean_colour(self) -> tuple[int, int, int]:
        """`pixel_mean` as (red, green, blue) from 0 to 255, rounded down as in `LlavaImageProcessor`."""
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
    """The family of an encoder's config. Raises ValueError for an unregistered one."""
    made: EncoderFamily = ENCODERS[config.model_type]()
    return made


def group_ends(num_layers: int, num_groups: int) -> tuple[int, ...]:
    """Split ``range(num_layers)`` into `num_groups` nearly equal runs, longer ones first; the last index of each."""
    size, longer = divmod(num_layers, num_groups)
    return tuple((group + 1) * size + min(group + 1, longer) - 1 for group in range(num_groups))


def encoder_depths(num_layers: int, config: ModelConfig) -> tuple[int, ...]:
    """The encoder depth for each fused LLM layer, ascending. Depth d is the output of block d, depth 0 the embeddings.

    Rules select neither the embeddings nor the last block, since downstream tasks read the one before it (paper 3.2,
    4.5); only a ratio of 1, and a list, may have the last. The rule "last" repeats the deepest one that it selects.
    Raises ValueError for an encoder with fewer than 2 blocks, and for a depth that it does not have.
    """
    if num_layers < 2:
        raise ValueError(f"an encoder of {num_layers} block has no depth to tap below its last: give it 2 or more")
    given, ratio = config.encoder_layers, config.encoder_layer_ratio
    if not isinstance(given, str):
        if not 1 <= given[0] <= given[-1] <= num_layers:
            raise ValueError(f"model.encoder_layers={list(given)}: the encoder's layers are 1 to {num_layers}")
        return tuple(given)
    count = min(max(1, round(ratio * num_layers)), num_layers - 1)
    if given == "last":
        return (num_layers - 1,) * count
    if ratio == 1:
        return tuple(range(1, num_layers + 1))
    if given == "later":
        return tuple(range(num_layers - count, num_layers))
    return group_ends(num_layers, count)


def hidden_states(tower: Any, pixels_BCHW: Tensor, deepest: int) -> list[Tensor]:
    """Embeddings and the outputs of blocks 1 to `deepest`, (B, leading + V, C) each. Deeper blocks are not run.

    `tower` is an encoder of a registered family, `pixels_BCHW` are normalised.
    """
    family = family_of(tower.config)
    states = [family.embed(tower, pixels_BCHW)]
    for block in family.blocks(tower)[:deepest]:
        states.append(family.run_block(block, states[-1]))
    return states


def patches(tower: Any, hidden: Tensor) -> Tensor:
    """The patches' part (B, V, C) of a hidden state, or of its gradient: without class token and registers."""
    return hidden[:, family_of(tower.config).num_leading :]


def covered(tower: Any) -> int:
    """Side in pixels of the area that patches cover; a remainder at the right and lower edges is never read."""
    config = tower.config
    side: int = config.image_size - config.image_size % config.patch_size
    return side
