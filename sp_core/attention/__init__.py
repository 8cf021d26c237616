"""Attention whose sequence lies on many ranks.

hybrid.py           Ulysses inside, ring outside: attention over all sequence ranks of a mesh
ulysses.py          trades sequence for heads: two exchanges a layer
ring.py             passes keys and values round: P - 1 shifts a layer, each behind a chunk's computation
diffusers_seam.py   brings the attention calls of diffusers' models here, and lets them go again
"""
