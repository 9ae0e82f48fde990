"""Keys of a config that people know from other programs, and where ours are."""

from __future__ import annotations

import re
from collections.abc import Sequence
from difflib import get_close_matches

# name elsewhere -> ends of our keys
MEANT = {
    **dict.fromkeys(("learning_rate", "learning_rates", "base_lr", "max_lr", "peak_lr", "rate"), "lr"),
    **dict.fromkeys(("batch_size", "batch", "bs", "train_batch_size", "global_batch_size"), "global_batch micro_batch"),
    **dict.fromkeys(("per_device_train_batch_size", "per_gpu_batch_size", "micro_batch_size", "mbs"), "micro_batch"),
    **dict.fromkeys(("epoch", "num_epochs", "num_train_epochs", "n_epochs", "max_epochs"), "epochs"),
    **dict.fromkeys(("steps", "num_steps", "max_iters", "iterations", "max_train_steps", "total_steps"), "max_steps"),
    **dict.fromkeys(("output_dir", "out", "out_dir", "outdir", "save_dir", "run_dir", "logdir", "log_dir"), "output"),
    **dict.fromkeys(("run_name", "experiment", "exp_name", "wandb_name", "job_name"), "name"),
    **dict.fromkeys(("data", "dataset", "train_data", "data_path", "data_dir", "train_file", "shards"), "data.train"),
    **dict.fromkeys(("val", "val_data", "eval_data", "valid_data", "validation", "test_data"), "data.heldout"),
    **dict.fromkeys(("model", "model_name", "model_name_or_path", "model_path"), "vision.path language.path"),
    **dict.fromkeys(("encoder", "vision_tower", "vision_model", "vision_encoder", "vit", "backbone"), "vision.path"),
    **dict.fromkeys(("llm", "lm", "language_model", "text_model", "base_model"), "language.path"),
    **dict.fromkeys(("tokenizer", "tokenizer_path", "tokenizer_name"), "tokenizer.path"),
    **dict.fromkeys(("dtype", "torch_dtype", "mixed_precision", "amp"), "precision"),
    **dict.fromkeys(("wd", "decay"), "weight_decay"),
    **dict.fromkeys(("warmup", "warmup_steps", "warmup_iters", "lr_warmup_steps"), "warmup_ratio"),
    **dict.fromkeys(("grad_clip", "clip_grad", "clip_grad_norm", "gradient_clipping", "max_norm"), "max_grad_norm"),
    **dict.fromkeys(("num_workers", "dataloader_num_workers", "n_workers"), "workers"),
    **dict.fromkeys(("max_length", "max_seq_length", "max_seq_len", "seq_len", "context_length"), "data.max_tokens"),
    **dict.fromkeys(("image_resolution", "img_size", "resolution"), "vision.config.image_size"),
    **dict.fromkeys(("save_steps", "save_every", "checkpoint_interval", "checkpoint_every"), "save_interval"),
    **dict.fromkeys(("eval_steps", "eval_every", "val_interval", "evaluation_steps"), "eval_interval"),
    **dict.fromkeys(("gradient_checkpointing", "activation_checkpointing", "recompute"), "checkpointing.vision"),
    **dict.fromkeys(("report_to", "wandb_mode", "tracker"), "log.wandb"),
    **dict.fromkeys(("optim", "optimiser"), "optimizer"),
    **dict.fromkeys(("torch_compile", "use_compile"), "engine.compile"),
    **dict.fromkeys(("random_seed", "manual_seed"), "seed"),
    **dict.fromkeys(("offload", "cpu_offloading"), "cpu_offload"),
    **dict.fromkeys(("adam_beta1", "adam_beta2", "beta1", "beta2"), "betas"),
    **dict.fromkeys(("adam_eps", "adam_epsilon", "epsilon"), "eps"),
    "save_total_limit": "keep.last",
}
# what has no key of its own
ADVICE = {
    **dict.fromkeys(
        ("resume", "resume_from", "resume_from_checkpoint", "auto_resume", "checkpoint"),
        "the same command resumes a run; --config RUN/config.yaml resumes it elsewhere",
    ),
    **dict.fromkeys(
        ("gradient_accumulation_steps", "gradient_accumulation", "grad_accum", "accum_iter", "accumulate_grad_batches"),
        "accumulation follows from stages.*.global_batch, stages.*.micro_batch and the number of processes",
    ),
    **dict.fromkeys(
        ("gpus", "num_gpus", "n_gpus", "devices", "num_processes", "nproc_per_node", "world_size", "nnodes"),
        "start several processes: torchrun --nproc_per_node 2 -m hive_scale pretrain ...",
    ),
    **dict.fromkeys(("bf16", "use_bf16", "fp32"), "give engine.precision=bf16, or engine.precision=fp32"),
    **dict.fromkeys(("fp16", "half"), "fp16 is not supported: give engine.precision=bf16"),
    **dict.fromkeys(("deepspeed", "zero", "zero_stage", "ds_config"), "give --ds_config zero2, zero3 or a file"),
    **dict.fromkeys(("preset", "config", "overwrite", "quiet", "log_level"), "it is an option, with -- before it"),
    **dict.fromkeys(
        ("freeze", "unfreeze", "trainable", "freeze_vision", "freeze_llm"), "parameters in no group are frozen"
    ),
    **dict.fromkeys(("device", "cuda"), "the device is found; CUDA_VISIBLE_DEVICES chooses among several"),
    "gpu": "start one process for each GPU; CUDA_VISIBLE_DEVICES chooses among several",
}
NEAR = 0.85  # similarity of a typo to what was meant


def guess(key: str, keys: Sequence[str]) -> str:
    """What was meant by `key`, which is none of `keys` (all dotted), as the end of a message; "" if that is unclear."""
    inside, _, name = key.lower().replace("-", "_").rpartition(".")
    ends = [one.rpartition(".")[2] for one in keys]
    near = name if name in MEANT or name in ADVICE else next(iter(get_close_matches(name, ends, 1, NEAR)), "")
    near = near or next(iter(get_close_matches(name, [*MEANT, *ADVICE], 1, NEAR)), "")
    if near in ADVICE:
        return ADVICE[near]
    wanted = MEANT.get(near, near).split()
    found = [one for one in keys if f".{one}".endswith(f".{key}")]  # vision.path
    found = found or [one for end in wanted for one in keys if f".{one}".endswith(f".{end}")]
    found = [one for one in found if {*inside.split(".")} <= {*one.split(".")}] or found
    if len(found) <= 2:
        return f"did you mean {' or '.join(found)}?" if found else ""
    kinds = dict.fromkeys(re.sub(r"(?<=groups\.)[^.]+", "GROUP", one) for one in found)
    if len({one.split(".")[1] for one in found if one.startswith("stages.")}) > 1:
        kinds = dict.fromkeys(re.sub(r"(?<=stages\.)[^.]+", "STAGE", one) for one in kinds)
    return f"did you mean {' or '.join(kinds)}, such as {found[-1]}?"


def is_known_elsewhere(name: str) -> bool:
    """True if other programs have an option called `name`."""
    return name.lower().replace("-", "_") in MEANT.keys() | ADVICE.keys()
