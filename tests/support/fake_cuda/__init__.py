"""CUDA without a GPU: what would go wrong on one, found on torch's build for CPU.

Two stand-ins, for two questions. *Fake* tensors have a shape and a device, but no memory: transformers of full width
run on them, and nothing that depends on a value can. *Pretended* tensors lie on the CPU and say that they are on
cuda:0: tiny models run on them from prompt to picture.

    guard.py       what torch's C++ needs before it believes in CUDA tensors; needs a compiler once
    calls.py       one operator as it is called: does the host wait for it, does it copy, is it attention?
    places.py      which function of which file is running, for reports
    seen.py        what a run was seen to do
    attention.py   the kernels that torch's attention takes on CUDA, and arithmetic in their place
    world.py       one rank of a world of any size, without the others
    families.py    the transformers of all families in full width, and their inputs
    forward.py     one forward of these on fake tensors, watched
    pretend.py     pretended tensors, and the mode that computes with them
    request.py     one request on pretended tensors, on real ranks, from prompt to picture

Neither sees: NCCL itself, streams and what overlaps, the allocator, time, CUDA's random numbers, compiled graphs, what
the attention kernels refuse.
"""
