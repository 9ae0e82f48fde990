"""Prepare shards from public data sets, your own images, and packages of public registries.

    commands   the converters of `prepare_data`: arguments, progress, summary
    items      a sample on its way from a source to a shard
    readers    recognises a file's layout; tables, parquet and class folders, streamed
    text_files, json_stream, delimited  text, JSON and rows, for the readers
    pairs      images and captions side by side, in folders or tars
    record_text  captions, conversation and image name of a record
    published_sets  the paper's data sets: where they come from, are they complete
    next_command  the command that trains on a set
    image_sources  location of an image: in a folder, a zip, a parquet file
    writer     writes items to shards, in several processes, resumable
    stats      statistics of a set, to look at before training on it

    packages   fetches an archive once, verifies it, reads members from it
    emoji      Noto, Twemoji and Fluent drawings with their names
    tuxpaint   stamps, most of them cut-out photographs, with a sentence each
    smollm2    SmolLM2-135M-Instruct as a local Hugging Face directory
    concepts   groups that stay on one side of the train / held-out split
    jpeg       any image to a JPEG on white
    records    records to WebDataset tars, with reproducible bytes
    notices    copyright and licence notices, written beside the tars

The entry point is ``launchers/prepare_data.py``.
"""
