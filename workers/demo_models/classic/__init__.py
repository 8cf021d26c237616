"""Demo models of families without an adapter of their own: one file each, named as the family's in `sp_core.models`.

Each has `demo_pipeline()`, which makes a classic pipeline of diffusers with the same weights at every call. Found by
`workers.demo_models.writer`.
"""
