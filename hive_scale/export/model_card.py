"""Model card of an export: what it is, how it was trained, how to load it, and its limits."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass

from huggingface_hub import EvalResult, ModelCardData

from hive_scale.checkpoint.run_reader import Run
from hive_scale.config import Config, PartConfig
from hive_scale.locate import is_hub_name
from hive_scale.observability.metrics import read_metrics
from hive_scale.registry import FUSIONS
from hive_scale.strangers import printable
from hive_scale.strict_json import dumps
from hive_scale.version import code_version

MARKUP = re.compile(r"[\\`*_\[\]<>|&$~]")  # characters with a meaning in Markdown, HTML or mathematics
BORDER = r"\|"
HUB_DATA = re.compile(r"huggingface\.co/datasets/([^/\s]+/[^/\s]+)/")  # a set's name on the hub, in the URL of a file
PAPER = "[Hierarchical Pre-Training of Vision Encoders with Large Language Models](https://arxiv.org/abs/2604.00086)"


@dataclass(frozen=True)
class KindText:
    """What the card of one kind of export says."""

    what: str  # one or two sentences
    usage: str  # Python that loads it from "."
    pipeline_tag: str  # the hub's name of its task
    library_name: str = "transformers"
    parts: tuple[str, ...] = ("vision", "language")  # of what was pretrained, those that it holds


KINDS = {
    "encoder": KindText(
        "The vision encoder of a HIVE. Read `hidden_states[-2]`: the block after it is never trained.",
        """\
from transformers import AutoImageProcessor, AutoModel

encoder = AutoModel.from_pretrained(".")
inputs = AutoImageProcessor.from_pretrained(".")(images=image, return_tensors="pt")
features = encoder(**inputs, output_hidden_states=True).hidden_states[-2]""",
        "image-feature-extraction",
        parts=("vision",),
    ),
    "llm": KindText(
        "The language model of a HIVE, alone: without an image it says what the whole model says.",
        """\
from transformers import AutoModelForCausalLM, AutoTokenizer

llm, tokenizer = AutoModelForCausalLM.from_pretrained("."), AutoTokenizer.from_pretrained(".")""",
        "text-generation",
        parts=("language",),
    ),
    "hive": KindText(
        "A HIVE: a vision encoder and an LLM joined by hierarchical cross-attention.",
        """\
from transformers import AutoModelForImageTextToText, AutoProcessor

import hive_scale.model.transformers_api  # makes it known to transformers

hive, processor = AutoModelForImageTextToText.from_pretrained("."), AutoProcessor.from_pretrained(".")
inputs = processor(images=image, text="")  # text: the beginning of the caption, or a question
written = hive.generate(**inputs, max_new_tokens=40)
caption = processor.decode(written[0], skip_special_tokens=True)""",
        "image-text-to-text",
        "hive_scale",
    ),
    "llava": KindText(
        "The self-attention baseline of HIVE, whose visual tokens run through the LLM, as a LLaVA.",
        """\
from transformers import AutoProcessor, LlavaForConditionalGeneration

llava, processor = LlavaForConditionalGeneration.from_pretrained("."), AutoProcessor.from_pretrained(".")
start = processor.tokenizer.bos_token or processor.tokenizer.eos_token
inputs = processor(images=image, text=f"{start}<image>", add_special_tokens=False, return_tensors="pt")
caption = processor.decode(llava.generate(**inputs)[0], skip_special_tokens=True)""",
        "image-text-to-text",
    ),
    "dcp": KindText(
        "The tensors of a HIVE by name, as a torch.distributed.checkpoint.",
        """\
import torch
import torch.distributed.checkpoint as dcp

metadata = dcp.FileSystemReader(".").read_metadata().state_dict_metadata
state = {name: torch.empty(one.size, dtype=one.properties.dtype) for name, one in metadata.items()}
dcp.load(state, checkpoint_id=".")""",
        "image-to-text",
        "pytorch",
    ),
    "adapter": KindText(
        "What a stage's adapter has learned, in `language` for the LLM and in `vision` for the encoder that the stage "
        "began with: `export.py llm` and `export.py encoder` write those, with `--stage` and the stage before.",
        """\
from peft import PeftModel
from transformers import AutoModelForCausalLM

base = AutoModelForCausalLM.from_pretrained("llm")  # by export.py llm; for "vision" an AutoModel of the encoder
adapted = PeftModel.from_pretrained(base, "language")""",
        "text-generation",
        "peft",
    ),
}


def card(kind: str, run: Run, stage: str, identity: str, dtype: str, ema: bool = False) -> str:
    """Return the text of an export's README.md. `identity` is the hash of the weights it was made from.

    With `ema` these are the average of the stage's weights.
    """
    config, about = run.config, KINDS[kind]
    averaged = (
        f" The weights are an exponential moving average over the stage, decay {config.stages[stage].ema:g} per step;"
        " the losses below are those of the weights that were not averaged."
        if ema
        else ""
    )
    return f"""\
---
{_metadata(kind, run, stage, ema).to_yaml()}
---

# {_plain(config.name)}: {kind} after stage {_plain(stage)}{", averaged" if ema else ""}

{about.what} After {PAPER}. The weights are in {dtype}.{averaged}

```python
{about.usage}
```

## Training

{_stages(run, stage)}

| what | from |
|---|---|
| encoder | {_part(config.model.vision)} |
| LLM | {_part(config.model.language)} |
| fusion | {_plain(FUSIONS[config.model.fusion].describe(config.model))} |
| images and captions | {", ".join(map(_plain, config.data.train))} |
| tokenizer | {_plain(config.data.tokenizer.path)} |
| weights | xxh3-128 {identity} |
| code | {", ".join(f"{name} {version}" for name, version in code_version().items())} |

## Limits

It has learned from captions, and repeats what is wrong or one-sided in them. It has not been tested for any use in
which errors do harm. Licences of the pretrained parts and of the data go with it; none is granted here.
"""


def _metadata(kind: str, run: Run, stage: str, ema: bool) -> ModelCardData:
    """What the hub reads. Names that only this machine knows are left out: the hub would refuse them."""
    config, about = run.config, KINDS[kind]
    bases = [part.path for name in about.parts if _is_on_hub((part := getattr(config.model, name)).path)]
    # the loss of the whole model, and not of averaged weights, which nothing has measured
    losses = _losses(run, stage) if len(about.parts) > 1 and not ema else []
    result = EvalResult(
        task_type=about.pipeline_tag,
        dataset_type="held-out",
        dataset_name="held-out part of the data",
        metric_type="loss",
        metric_name="nats per token",
        metric_value=round(losses[-1], 4) if losses else None,
    )
    return ModelCardData(
        license="other",
        license_name="as-of-its-parts",  # none is granted here
        library_name=about.library_name,
        pipeline_tag=about.pipeline_tag,
        tags=["hive", "vision"],
        base_model=bases or None,
        datasets=_hub_data(config) or None,
        metrics=["loss"] if losses else None,
        model_name=config.name if losses else None,
        eval_results=[result] if losses else None,
    )


def _is_on_hub(path: str) -> bool:
    return bool(path) and is_hub_name(path) and not os.path.exists(path)


def _hub_data(config: Config) -> list[str]:
    return sorted({name for one in config.data.train for name in HUB_DATA.findall(one)})


def _losses(run: Run, stage: str) -> list[float]:
    """Held-out losses of a stage, in nats per token, in order."""
    if stage not in run.config.stages:
        return []
    return [line["eval_loss"] for line in read_metrics(run.dir / stage / "metrics.jsonl") if "eval_loss" in line]


def _stages(run: Run, last: str) -> str:
    names = list(run.config.stages)
    rows = ["| stage | steps | global batch | trained | held-out loss, nats per token |", "|---|---|---|---|---|"]
    for name in names[: names.index(last) + 1] if last in names else ():
        stage = run.config.stages[name]
        lines = read_metrics(run.dir / name / "metrics.jsonl")
        losses = [line["eval_loss"] for line in lines if "eval_loss" in line]
        globs = ", ".join(_code(glob) for group in stage.groups.values() for glob in group.parameters)
        loss = f"{losses[-1]:.4f}" if losses else "not measured"
        rows.append(
            f"| {_plain(name)} | {lines[-1]['step'] if lines else '?'} | {stage.global_batch} | {globs} | {loss} |"
        )
    return "\n".join(rows) if len(rows) > 2 else "Not trained: these are the weights that the first stage starts from."


def _part(part: PartConfig) -> str:
    return _plain(part.path) or f"from scratch: {_code(dumps(part.config, sort_keys=True))}"


def _plain(text: str) -> str:
    """Escape `text` for a Markdown heading or table cell: no markup, no HTML, no links."""
    return MARKUP.sub(r"\\\g<0>", printable(text))


def _code(text: str) -> str:
    """Format `text` as inline code in Markdown, where only a table's borders can be escaped."""
    inside = printable(text).replace("`", "'").replace("|", BORDER)
    return f"`{inside}`"
