"""workers: a gang is one model copy on N devices.

    messages.py     what crosses process boundaries: GenerationRequest, StepEvent, GenerationResult
    errors.py       the one tree of errors
    placement.py    ModelSpec -> Serve options: which bundles a gang occupies
    cost.py         what a request costs in seconds, learnt by its gang
    load.py         what a gang tells the autoscaler and the routers
    gang.py         Gang, the Serve deployment: starts the ranks, hands each request to all of them, watches them
    rank.py         Rank, one process on one device: joins the group, loads the model, generates
    pipeline.py     loads a model folder; weights.py reads a transformer's share
    denoising.py    one request in progress, step by step
    recipes.py      what is peculiar to each pipeline
    lora.py         LoRA files: what sp_core.lora takes, from any key format that diffusers converts
    media.py        pictures to PNG, JPEG, WebP
    local.py        a gang without Ray, for `spray generate --local`
    demo_model.py   writes a tiny model, for the demo and the tests to serve
    demo_models/    what it writes, one file per family of models

This file imports nothing, so that `workers.messages` and `workers.gang` load without torch.
"""
