"""sp_core: how one model runs on many ranks. Needs torch; knows nothing of Ray, requests or configuration files.

Reading order, from intent to arithmetic:

    degrees.py        ParallelDegrees: what the operator asks for (standard library only)
    mesh.py           ParallelMesh: the live process groups of those degrees
    sp_plan.py        SequenceParallelInput / Output: where a model's tensors are split and gathered, as data
    models/           one file per model family: its plan and its peculiarities
    parallelize.py    parallelize(model, mesh): the recipe that turns a model into its parallel self, and back
    hooks.py          the plan at work: split and gather at module boundaries
    sp_sharding.py    sp_shard / sp_gather, and the record of what is split in the running forward
    attention/        attention across ranks, and the seam that brings diffusers' attention here
    collectives.py    every data-moving collective call in the package
    kernels.py        attention on one device

This file imports nothing, so that `sp_core.degrees` loads without torch.
"""
