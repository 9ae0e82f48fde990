"""Shards made of other things: public sets and your own images, and packages that public registries carry.

    commands   the converters of `prepare_data`: arguments, progress, what came out
    readers    LLaVA JSON, tables, parquet and class folders, streamed
    image_sources  where an image lies: a folder, a zip, a parquet file
    writer     items to shards, by several processes, resumable
    stats      what to know of a set before training on it

    packages   fetch an archive once, check it, read members from it
    emoji      Noto, Twemoji and Fluent drawings with their names
    tuxpaint   stamps, most of them cut-out photographs, with a sentence each
    smollm2    SmolLM2-135M-Instruct as a local Hugging Face directory
    concepts   what must stay on one side of the train / held-out split
    jpeg       any image -> JPEG on white
    records    records -> WebDataset tars, the same bytes each time
    notices    whose work it is, and on what terms: written beside the tars

``launchers/prepare_data.py`` is the way in.
"""
