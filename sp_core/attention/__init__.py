"""Attention whose sequence lies on many ranks. In the order of a call, after the two files that prepare it:

discovery.py           which modules of a model attend, and what cannot go across ranks
diffusers_backend.py   brings the attention of diffusers' models here, and lets it go again
layer.py               SequenceParallelAttention, for models written with spray
region_attention.py    across the ranks inside a region, local outside one; the operator that torch.compile sees
linear.py              attention without softmax: one sum over the ranks, instead of the two below
masks.py               what a model's mask means when its tokens lie on many ranks
hybrid.py              Ulysses inside, ring outside: attention over all sequence ranks of a mesh
ulysses.py             trades sequence for heads: two exchanges a layer
ring.py                passes keys and values round: P - 1 shifts a layer, each during a chunk's computation
"""
