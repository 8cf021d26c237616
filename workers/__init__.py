"""workers: a gang is one model copy on N devices.

    messages.py     what crosses process boundaries: GenerationRequest, StepEvent, GenerationResult
    errors.py       the one tree of errors
    placement.py    ModelSpec -> Serve options: which bundles a gang occupies, and why they cannot be had
    gang.py         Gang, the Serve deployment: its life, one request at a time, what it reports
    metrics.py      every metric by name; exporter.py lets Prometheus read them, one port per node
    cost.py         seconds that a request costs, learnt from those that were run; load.py how they are reported
    rank_group.py   the processes of a gang: starts them, hands each request to all of them, watches them
    rank_actor.py   Rank as a Ray actor
    rank.py         Rank, one process on one device: joins the group, loads the model, generates
    warm_up.py      what a rank runs at its start
    sources.py      where a model's files are on this node: fetched from the hub once, checked once
    pipeline.py     loads a model folder; weights.py reads a transformer's share
    denoising.py    one request in progress, step by step
    out_of_tree.py  what a deployment names as package.module:NAME: a transformer's class, its plan
    recipes.py      what is peculiar to each pipeline
    lora.py         LoRA files: what sp_core.lora takes, from any key format that diffusers converts
    media.py        pictures to PNG, JPEG, WebP; videos to MP4
    local.py        a gang without Ray, for `spray generate --local`
    demo_model.py   writes a tiny model, for the demo and the tests to serve
    demo_models/    what it writes, one file per family of models

This file imports nothing, so that `workers.messages` and `workers.gang.gang` load without torch.
"""
