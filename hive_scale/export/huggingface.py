"""Export trained parts as stock Hugging Face directories, which transformers alone loads to identical outputs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from tokenizers import processors
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    CLIPImageProcessor,
    GenerationConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaImageProcessor,
    LlavaProcessor,
    PretrainedConfig,
    SiglipImageProcessor,
)

from hive_scale.chat_template import IMAGE, ChatTemplate, with_image_token
from hive_scale.config import DataConfig, ImageMode, ImagePosition, ModelConfig
from hive_scale.export import portable
from hive_scale.model.build import language_config, on_meta, vision_config
from hive_scale.model.encoders import family_of
from hive_scale.model.transformers_api import HiveProcessor
from hive_scale.registry import FUSIONS, HOSTS

# parameter name prefixes: LlavaForConditionalGeneration's -> ours
LLAVA = {
    "model.vision_tower.": "vision.",
    "model.multi_modal_projector.linear_1.": "projector.0.up.",
    "model.multi_modal_projector.linear_2.": "projector.0.down.",
    "model.language_model.": "language.model.",
    "lm_head.": "language.lm_head.",
}
Weights = Mapping[str, Tensor]


def export_encoder(
    config: ModelConfig, weights: Weights, path: Path, mode: ImageMode, dtype: torch.dtype = torch.float32
) -> None:
    """Write the encoder as a directory of its own class in transformers, with its image processor."""
    vision = vision_config(config.vision)
    family = family_of(vision)
    names = {"": family.file_prefix} if family.file_prefix else None
    _save(lambda: family.make(vision), weights, {"": "vision."}, names, path, dtype)
    image_processor(vision, mode).save_pretrained(path)


def export_llm(
    config: ModelConfig, weights: Weights, path: Path, tokenizer: Any, dtype: torch.dtype = torch.float32
) -> None:
    """Write the causal LM alone, with its tokenizer: the model without an image, for any fusion."""
    language = language_config(config.language)
    auto: Any = AutoModelForCausalLM
    ends = _generation(tokenizer, ChatTemplate(tokenizer).end_ids)
    _save(lambda: auto.from_config(language), weights, {"": "language."}, portable.LLM_FILE, path, dtype, ends)
    portable.save_tokenizer(tokenizer, path)


def why_no_llava(config: ModelConfig) -> str:
    """Why transformers' LLaVA cannot compute what this model does; "" if it can.

    Another fusion, an encoder with registers or without a part, and LLMs with functions that a LLaVA leaves out.
    """
    vision, language = vision_config(config.vision), language_config(config.language)
    family = family_of(vision)
    if not FUSIONS[config.fusion].is_llava:
        return f"a {config.fusion} model is not a LLaVA: export it as hive, or train with fusion=concat"
    if (leading := family.leading(vision)) > 1:
        return f"a LLaVA drops one token before the patches, {vision.model_type} has {leading}: export it as hive"
    if family.arguments:
        parts = ", ".join(family.arguments)
        return f"a LLaVA makes a whole {vision.model_type}, here it lacks a part ({parts}): export it as hive"
    for name, neutral in HOSTS[language.model_type].llava_lacks.items():
        if (value := getattr(language, name)) != neutral:
            return f"a LLaVA has no place for {name}={value} of {language.model_type}: export it as hive"
    return ""


def export_llava(
    config: ModelConfig,
    weights: Weights,
    path: Path,
    tokenizer: Any,
    mode: ImageMode,
    dtype: torch.dtype = torch.float32,
    position: ImagePosition = "user",
) -> None:
    """Write the `concat` model as LlavaForConditionalGeneration, with its processor.

    LLaVA needs the token ``<image>`` in the vocabulary. It gets an embedding row of zeros unless a spare row exists,
    and generation suppresses it. The chat template prompts as training did, with the image at `position`. Raises
    ValueError for a model that is none, see `why_no_llava`.
    """
    if reason := why_no_llava(config):
        raise ValueError(reason)
    vision, language = vision_config(config.vision), language_config(config.language)
    family = family_of(vision)
    num_leading = family.leading(vision)
    template = ChatTemplate(tokenizer)
    tokenizer = _asking(tokenizer, template, position)
    image_id: int = tokenizer.convert_tokens_to_ids(IMAGE)
    language.vocab_size = max(language.vocab_size, image_id + 1)
    (depth,) = FUSIONS[config.fusion].encoder_depths(vision.num_hidden_layers, config)
    strategy: Any = "default" if num_leading else "full"
    settings = LlavaConfig(
        vision_config=vision,
        text_config=language,
        image_token_index=image_id,
        image_seq_length=(vision.image_size // vision.patch_size) ** 2,
        vision_feature_layer=depth - vision.num_hidden_layers - 1,
        vision_feature_select_strategy=strategy,
        tie_word_embeddings=language.tie_word_embeddings,
    )
    generation = _generation(tokenizer, template.end_ids, suppress_tokens=[image_id])
    longer = _lengthened(weights, language.vocab_size)
    names = portable.LLAVA_FILE if family.file_prefix else None
    _save(lambda: LlavaForConditionalGeneration(settings), longer, LLAVA, names, path, dtype, generation)
    images = image_processor(vision, mode)
    cast(Any, LlavaProcessor)(
        image_processor=images,
        tokenizer=tokenizer,
        patch_size=vision.patch_size,
        vision_feature_select_strategy=strategy,
        image_token=IMAGE,
        chat_template=tokenizer.chat_template,
        num_additional_image_tokens=num_leading,
    ).save_pretrained(path)
    images.save_pretrained(path)  # also in a file of its own, which transformers 4 reads
    portable.mend_tokenizer(path)


def hive_processor(config: ModelConfig, data: DataConfig, tokenizer: Any) -> tuple[HiveProcessor, GenerationConfig]:
    """The processor of a whole HIVE, which prompts it as training on `data` did, and how it generates."""
    template, vision = ChatTemplate(tokenizer), vision_config(config.vision)
    asks = data.format == "conversation"
    chat_template = template.exported(data.image_position) if asks else template.captions()
    images = image_processor(vision, data.image_transform)
    processor = HiveProcessor(images, tokenizer, chat_template=chat_template, format=data.format)
    image_id = processor.image_token_id
    spare = {"suppress_tokens": [image_id]} if image_id < language_config(config.language).vocab_size else {}
    return processor, _generation(tokenizer, template.end_ids, **spare)


def _asking(tokenizer: Any, template: ChatTemplate, position: ImagePosition) -> Any:
    """Return a copy of `tokenizer` that makes every tool prompt the model as training did."""
    chat_template, end = template.exported(position), tokenizer.convert_ids_to_tokens(template.end_ids[0])
    tokenizer = with_image_token(tokenizer)
    tokenizer.chat_template = chat_template
    if tokenizer.bos_token is None:
        tokenizer.bos_token = tokenizer.eos_token  # the start token of captions in this case
    tokenizer.eos_token = end  # many tools stop at this token, and ignore generation_config.json
    if tokenizer.is_fast:  # the template writes the start token; otherwise some tools would add a second one
        tokenizer.backend_tokenizer.post_processor = processors.Sequence([])
    for name in ("add_bos_token", "add_eos_token"):
        if hasattr(tokenizer, name):
            setattr(tokenizer, name, False)
    return tokenizer


def _generation(tokenizer: Any, end_ids: list[int], **more: Any) -> GenerationConfig:
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": end_ids, "pad_token_id": tokenizer.pad_token_id}
    return GenerationConfig(**ids, **more)  # type: ignore[no-untyped-call]


def _save(
    make: Callable[[], Any],
    weights: Weights,
    prefixes: Mapping[str, str],
    file_names: Mapping[str, str] | None,
    path: Path,
    dtype: torch.dtype,
    generation: GenerationConfig | None = None,
) -> None:
    """Save a module built on the meta device with tensors from `weights`. `prefixes`: the module's -> ours."""
    module: Any = on_meta(make)
    module.tie_weights()
    tensors = {}
    for name, _ in module.named_parameters():
        theirs, ours = next((a, b) for a, b in prefixes.items() if name.startswith(a))
        tensors[name] = weights[ours + name.removeprefix(theirs)].detach().to(dtype)
    portable.save_model(module, tensors, file_names, path)
    if generation:
        generation.save_pretrained(path)


def _lengthened(weights: Weights, vocab_size: int) -> Weights:
    """Pad embeddings, and the head if it is not tied, with rows of zeros to `vocab_size` rows."""
    longer = dict(weights)
    for name in ("language.model.embed_tokens.weight", "language.lm_head.weight"):
        if name in longer:
            longer[name] = nn.functional.pad(longer[name], (0, 0, 0, vocab_size - len(longer[name])))
    return longer


def image_processor(config: PretrainedConfig, mode: ImageMode) -> Any:
    """Return the stock image processor that transforms images as training did. `config` is the encoder's."""
    family, side = family_of(config), config.image_size
    square = {"height": side, "width": side}
    statistics: dict[str, Any] = {"image_mean": family.pixel_mean, "image_std": family.pixel_std}
    if mode == "crop":
        return CLIPImageProcessor(size={"shortest_edge": side}, crop_size=square, **statistics)
    if mode == "pad":
        return LlavaImageProcessor(size=square, do_pad=True, do_center_crop=False, **statistics)
    return SiglipImageProcessor(size=square, **statistics)
