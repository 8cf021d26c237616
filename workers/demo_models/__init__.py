"""The demo models: tiny pipelines with random weights, offline, from a seed. They draw patterns, not things.

    __main__.py    python -m workers.demo_models OUT --family NAME
    writer.py      writes one as a model folder
    pipelines.py   which of them a pipeline is proved with, and what it is asked for there
    parts.py       what several of them share: gains on weights, the image VAE
    clip_vision.py  a CLIP and a SigLIP that look at pictures
    vision_language.py  models that read pictures together with prompts
    classic/       those of families without an adapter of their own
    vocabulary.py  tokenizers made in memory, without files or network

What a family's model is made of is in its file in `workers.model.adapters`, or in `classic/`. All have 12 attention
heads, so that 1, 2, 3 and 4 ranks can share them, and the real models' reduction of sizes.
"""
