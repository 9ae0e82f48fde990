"""The commands. Each module has `main` and imports torch as late as possible, so that `--help` answers at once."""

COMMANDS = {
    "pretrain": "train every stage of a run",
    "submit_pipeline": "the same on Slurm, a job for each stage",
    "plan": "memory, time and FLOPs of a run before it is launched",
    "prepare_data": "public data sets and your own images into WebDataset tars",
    "probe": "attentive, linear and kNN probes of an encoder",
    "finetune_vlm": "give the encoder to a chat LLM, after LLaVA",
    "evaluate": "MME, GQA, OK-VQA, ScienceQA and easy-vqa",
    "visualize": "gradient maps, attention maps, a report; wandb after the fact",
    "caption": "captions of your images by a trained model, or answers about them",
    "demo": "the same in a browser, with the attention of each word",
    "export": "Hugging Face directories with a model card; verify a run",
    "doctor": "is this cluster fit for a long job? devices, networks, a shared folder",
}
