"""Vision encoders: their families, the depths whose features the LLM gets, and the feature map at each depth.

Shapes: B images, V visual tokens (patches), C encoder width.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import cache
from types import MappingProxyType
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from transformers import (
    Aimv2VisionModel,
    BitImageProcessor,
    CLIPImageProcessor,
    CLIPVisionModel,
    Dinov2Model,
    Dinov2WithRegistersModel,
    DINOv3ViTImageProcessor,
    DINOv3ViTModel,
    IJepaModel,
    PretrainedConfig,
    SiglipImageProcessor,
    SiglipVisionModel,
    ViTImageProcessor,
    ViTModel,
)

from hive_scale.config import ImageMode, ModelConfig
from hive_scale.registry import ENCODERS

Colour = tuple[float, float, float]  # red, green, blue


class EncoderFamily:
    """Base class of a family of transformers' vision encoders; a registered subclass overrides what differs.

    The family's configs have ``hidden_size``, ``num_hidden_layers``, ``image_size`` and ``patch_size``, all integers.
    """

    model: ClassVar[Any]  # transformers' model class
    arguments: ClassVar[Mapping[str, Any]] = MappingProxyType({})  # of the model class, beside the config
    processor: ClassVar[Any]  # transformers' image processor class, which the family was released with
    settings: ClassVar[Mapping[str, Any]] = MappingProxyType({})  # of the image processor, where not its defaults
    num_leading: ClassVar[int] = 0  # tokens before the patches
    blocks_at: ClassVar[str | tuple[str, ...]] = "encoder.layers"  # submodule of the blocks; several if releases differ
    before_blocks: ClassVar[tuple[str, ...]] = ("embeddings.",)  # name prefixes of parameters used before the blocks
    never_read: ClassVar[tuple[str, ...]] = ()  # of these, what only another use of the model reads
    file_prefix: ClassVar[str] = ""  # of names in files, where transformers 4 has another than transformers 5
    key_mapping: ClassVar[Mapping[str, str]] = MappingProxyType(
        {}
    )  # names of a whole checkpoint's tower: pattern -> ours
    any_size: ClassVar[bool] = False  # was released to take images of other sizes than its config's, too

    def leading(self, config: Any) -> int:
        """Number of tokens before the patches: class token and registers."""
        return self.num_leading

    def make(self, config: PretrainedConfig) -> nn.Module:
        """A tower of this family with random weights."""
        return cast(nn.Module, self.model(config, **self.arguments))

    def loading(self) -> dict[str, Any]:
        """Arguments of ``from_pretrained`` for this family."""
        mapping = {"key_mapping": dict(self.key_mapping)} if self.key_mapping else {}
        return {**self.arguments, **mapping}

    def embed(self, tower: Any, pixels_BCHW: Tensor) -> Tensor:
        """The first block's input (B, leading + V, C), from normalised pixels (B, 3, H, W)."""
        # some families leave it to their model's forward to convert pixels to the weights' precision
        hidden: Tensor = tower.embeddings(pixels_BCHW.to(next(tower.embeddings.parameters()).dtype))
        return hidden

    def positions(self, tower: Any, pixels_BCHW: Tensor, hidden: Tensor) -> Any:
        """What each block gets of the patches' places, such as rotary tables; `hidden` is the first block's input."""
        return None

    def blocks(self, tower: nn.Module) -> nn.ModuleList:
        """The blocks, in the order in which they run."""
        *others, last = self._places()
        for at in others:
            with suppress(AttributeError):
                return cast(nn.ModuleList, tower.get_submodule(at))
        return cast(nn.ModuleList, tower.get_submodule(last))

    def _places(self) -> tuple[str, ...]:
        return (self.blocks_at,) if isinstance(self.blocks_at, str) else self.blocks_at

    def run_block(self, block: Any, hidden: Tensor, positions: Any) -> Tensor:
        """Run one block on hidden states (B, leading + V, C); the shape stays. `positions` are this class's own."""
        done: Tensor = block(hidden, None)
        return done

    def num_patches(self, config: Any) -> int:
        """V, the number of patches of one image."""
        side: int = config.image_size // config.patch_size
        return side * side

    def is_read(self, name: str, depths: Sequence[int]) -> bool:
        """True if a model that uses the features at `depths` reads the encoder's parameter `name`."""
        for at in self._places():
            if name.startswith(f"{at}."):
                return int(name.removeprefix(f"{at}.").split(".")[0]) < max(depths)
        return name.startswith(self.before_blocks) and name not in self.never_read

    @classmethod
    @cache
    def _released(cls) -> Any:
        return cls.processor(**cls.settings)

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
    """SigLIP, and SigLIP 2 of fixed size: no class token, no norm before the blocks."""

    model, processor = SiglipVisionModel, SiglipImageProcessor
    file_prefix = "vision_model."


@ENCODERS.register("clip_vision_model")
class Clip(EncoderFamily):
    """CLIP, MetaCLIP, DFN: a class token, and a norm before the first block (which transformers spells `pre_layrnorm`).

    Their activations differ; the config beside the weights tells which.
    """

    model, processor = CLIPVisionModel, CLIPImageProcessor
    num_leading = 1
    before_blocks = ("embeddings.", "pre_layrnorm.")
    file_prefix = "vision_model."

    def embed(self, tower: Any, pixels_BCHW: Tensor) -> Tensor:
        hidden: Tensor = tower.pre_layrnorm(super().embed(tower, pixels_BCHW))
        return hidden


IMAGENET: Mapping[str, Any] = MappingProxyType(
    {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
)


@ENCODERS.register("dinov2")
class Dinov2(EncoderFamily):
    """DINOv2: a class token, and a mask token that only its own training reads."""

    model: ClassVar[Any] = Dinov2Model
    processor: ClassVar[Any] = BitImageProcessor
    settings = IMAGENET
    num_leading = 1
    blocks_at = "encoder.layer"
    never_read = ("embeddings.mask_token",)
    any_size = True

    def run_block(self, block: Any, hidden: Tensor, positions: Any) -> Tensor:
        done: Tensor = block(hidden)
        return done


@ENCODERS.register("dinov2_with_registers")
class Dinov2WithRegisters(Dinov2):
    """DINOv2 with registers between class token and patches."""

    model: ClassVar[Any] = Dinov2WithRegistersModel

    def leading(self, config: Any) -> int:
        return 1 + int(config.num_register_tokens)


@ENCODERS.register("dinov3_vit")
class Dinov3(Dinov2WithRegisters):
    """DINOv3: rotary positions, which are the same in training.

    Its own training scales the places of all patches at random (``pos_embed_rescale``). Here images are of one size,
    and a step must be repeatable.
    """

    model, processor, settings = DINOv3ViTModel, DINOv3ViTImageProcessor, MappingProxyType({})
    blocks_at = "model.layer"

    def positions(self, tower: Any, pixels_BCHW: Tensor, hidden: Tensor) -> Any:
        # transformers' own function keeps what it returned, which in a plan is a tensor without memory
        config, device = tower.config, hidden.device
        width = config.hidden_size // config.num_attention_heads
        frequencies = config.rope_theta ** -torch.arange(0, 1, 4 / width, device=device)
        sides = (side // config.patch_size for side in pixels_BCHW.shape[-2:])
        rows, columns = ((2 * torch.arange(side, device=device) + 1) / side - 1 for side in sides)  # centres in [-1, 1]
        places = torch.stack(torch.meshgrid(rows, columns, indexing="ij"), dim=-1).flatten(0, 1)
        angles = (2 * math.pi * places[:, :, None] * frequencies).flatten(1).tile(2)
        return angles.cos().to(hidden.dtype), angles.sin().to(hidden.dtype)

    def run_block(self, block: Any, hidden: Tensor, positions: Any) -> Tensor:
        done: Tensor = block(hidden, position_embeddings=positions)
        return done


@ENCODERS.register("aimv2_vision_model")
class Aimv2(EncoderFamily):
    """AIMv2: no class token; the norm of the patches is part of the embeddings."""

    model, processor = Aimv2VisionModel, CLIPImageProcessor
    key_mapping = MappingProxyType({r"^vision_model\.": ""})


@ENCODERS.register("ijepa")
class Ijepa(EncoderFamily):
    """I-JEPA: a ViT without class token."""

    model: ClassVar[Any] = IJepaModel
    processor = ViTImageProcessor
    blocks_at = ("layers", "encoder.layer")

    def run_block(self, block: Any, hidden: Tensor, positions: Any) -> Tensor:
        done: Tensor = block(hidden)
        return done


@ENCODERS.register("vit")
class Vit(Ijepa):
    """ViT: a class token. Its pooler, which many checkpoints lack, is left out."""

    model, arguments = ViTModel, MappingProxyType({"add_pooling_layer": False})
    num_leading = 1


# Types that are refused, and why.
REFUSED: Mapping[str, str] = MappingProxyType(
    dict.fromkeys(
        ("siglip2", "siglip2_vision_model"),
        "its images have no fixed size (NaFlex): take a SigLIP 2 of fixed size, as google/siglip2-large-patch16-384",
    )
)


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
    positions = family.positions(tower, pixels_BCHW, states[0])
    for block in family.blocks(tower)[:deepest]:
        states.append(family.run_block(block, states[-1], positions))
    return states


def patches(tower: Any, hidden: Tensor) -> Tensor:
    """The patches' part (B, V, C) of a hidden state, or of its gradient: without class token and registers."""
    return hidden[:, family_of(tower.config).leading(tower.config) :]


def covered(tower: Any) -> int:
    """Side in pixels of the area that patches cover; a remainder at the right and lower edges is never read."""
    config = tower.config
    side: int = config.image_size - config.image_size % config.patch_size
    return side
