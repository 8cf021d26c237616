"""Attention over a sequence that is divided among ranks. Two files prepare it; the others are in the order of a call:

discovery.py           which modules of a model attend, and what cannot go across ranks
diffusers_backend.py   routes the attention of diffusers' models here, and undoes that
layer.py               SequenceParallelAttention, for models written with spray
region_attention.py    across the ranks inside a region, local outside one; the operator that torch.compile sees
linear.py              attention without softmax: one sum over the ranks, instead of the two below
masks.py               turns a model's mask into the one for this rank's tokens
hybrid.py              Ulysses inside, ring outside: attention over all sequence ranks of a mesh
ulysses.py             trades sequence for heads: two exchanges a layer
ring.py                passes keys and values round: P - 1 shifts a layer, each while a chunk is computed
"""
