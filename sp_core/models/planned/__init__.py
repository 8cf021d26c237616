"""Families with a sequence plan that `spray plan` has found, or in the same form. One file per family, with examples.

They are proved on all layouts of 2, 3 and 4 ranks (`tests/sp_core/test_families.py`; most of them in the soak). Unlike
the families in the parent folder they have no tensor plan unless diffusers ships one, no faster replacements, and no
test on fake CUDA tensors.

as_flux.py  the parts that several families share with Flux; as_wan.py: with Wan
"""
