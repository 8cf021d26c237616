"""sp_core: how one model runs on many ranks. Needs torch; knows nothing of Ray, requests or configuration files.

Reading order, from intent to arithmetic:

    degrees.py        ParallelDegrees: what the operator asks for (standard library only)
    mesh.py           ParallelMesh: the live process groups of those degrees
    sp_plan.py        SequenceParallelInput / Output: where a model's tensors are split and gathered, as data
    tp_plan.py        Columns / Rows: how its weights are shared out, as data
    models/           one file per model family: its plans and its peculiarities; examples.py has them all in small
    parallelize.py    parallelize(model, mesh): the recipe that turns a model into its parallel self, and back
    hooks.py          the sequence plan at work: split and gather at module boundaries
    sp_sharding.py    sp_shard / sp_gather, and the record of what is split in the running forward
    token_layout.py   how token streams lie on the ranks: arithmetic on lengths
    attention/        attention across ranks, and the seam that brings diffusers' attention here
    tensor_parallel.py  the tensor plan at work: parts of layers, summed over the ranks
    lora.py           LoRA adapters beside the linear layers, shared out with them, switched without merging
    cfg_parallel.py   the branches of guidance on separate groups of ranks
    collectives.py    every data-moving collective call in the package
    kernels.py        attention on one device
    verify.py         does a model give the same answer on every layout? divergence.py says where it does not
    rank_pool.py      gloo ranks on this machine, for proofs and measures

This file imports nothing, so that `sp_core.degrees` loads without torch.
"""
