"""Families whose sequence plan `spray plan` has found, or that were written like those; one file each, with examples.

They are proved on all layouts of 2, 3 and 4 ranks (`tests/sp_core/test_families.py`; most of them in the soak). Unlike
the files beside this folder they have no tensor plan unless diffusers ships one, nothing is replaced by something
faster, and nobody has looked at them on a pretended GPU.

as_flux.py  what several of them share with Flux; as_wan.py: with Wan
"""
