"""sp_core: how one model runs on many ranks. Needs torch; knows nothing of Ray, requests or configuration files.

Reading order, from intent to arithmetic (README.md says how to add a model):

    degrees.py        ParallelDegrees: what the operator asks for (standard library only)
    mesh.py           ParallelMesh: the live process groups of those degrees
    sp_plan.py        SequenceParallelInput / Output: where a model's tensors are split and gathered, as data
    tp_plan.py        Colwise / Rowwise: how its weights are divided, as data
    models/           one file per model family: its plans and its peculiarities
    SUPPORT.md        which pipelines of diffusers are served; support.json: the same for programs
    parallelize.py    parallelize(model, mesh): makes a model parallel
    handle.py         the way back to the plain model
    module_paths.py   finds the modules that a plan's keys name
    hooks.py          applies the sequence plan: split and gather at module boundaries
    region.py         what is split in a running forward: SequenceContext, RunningForward, Region
    sp_sharding.py    sp_shard / sp_gather, for models that shard themselves; the operators that torch.compile sees
    token_layout.py   which tokens each rank holds: arithmetic on lengths
    replacements.py   exchanges parts for faster ones, as the family's file declares
    real_rotation.py  one of them: rotations without complex numbers in compiled blocks
    shared_modulation.py  another: modulation computed once a step
    fused_gelu.py     another: GELU inside the product before it, on CUDA
    attention/        attention across ranks, and how a model's attention is routed there
    compiled_blocks.py    which parts of a model are compiled
    grid_convolution.py   convolutions over tokens, with those of neighboring ranks
    tensor_parallel.py  applies the tensor plan: parts of layers, summed over the ranks
    lora.py           LoRA adapters beside the linear layers, shared like them, switched without merging
    cfg_parallel.py   the branches of guidance on separate groups of ranks
    batched_guidance.py  the branches of guidance as one batch
    tile_parallel.py  the tiles of a VAE's decode shared among all ranks
    stand_in.py       what stands in for a part of a pipeline, such as its VAE
    collectives.py    every data-moving collective call in the package
    traffic.py        what they send, and how long a step spends in them
    probe.py          tries every group once before it is used
    kernels.py        attention on one device
    cuda_kernels.py   the kernels to choose from on CUDA
    kernel_choice.py  chooses one of them for all ranks
    torchvision_operators.py  makes torchvision importable beside a CPU build of torch
    diffusers_private.py, torch_private.py   the private names of these libraries that sp_core uses
    verify/           does a model give the same answer on every layout, and a gang the answer of one rank?
    planner/          finds where to split a model's sequence by observing forwards; `verify` proves it

This file imports nothing, so that `sp_core.degrees` loads without torch.
"""
