"""Attention whose sequence lies on many ranks.

layer.py            SequenceParallelAttention, for models written with spray
diffusers_seam.py   brings the attention calls of diffusers' models here, and lets them go again
region.py           across the ranks inside a region, local outside one; the operator that torch.compile sees
masks.py            what a model's mask means when its tokens lie on many ranks
hybrid.py           Ulysses inside, ring outside: attention over all sequence ranks of a mesh
ulysses.py          trades sequence for heads: two exchanges a layer
ring.py             passes keys and values round: P - 1 shifts a layer, each behind a chunk's computation
"""
