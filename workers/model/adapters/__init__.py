"""Pipeline adapters, one file per served family: how its pipeline is run step by step, and its demo model.

classic.py           any pipeline without a file of its own, through its classic call
pipeline_adapter.py  the methods that an adapter can override, with the behavior of most pipelines
lookup.py            finds the adapter of a model folder
"""
