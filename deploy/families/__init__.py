"""One file per served family: the facts about its pipeline that need no torch.

    family.py      what a family's file declares
    schedulers.py  which schedulers a family runs with
    classic.py     the family of a pipeline without a file, by its source: pipeline_source.py, source_patterns.py
    lookup.py      finds the family of a model folder

The file of the same name in `sp_core.models` has the family's plans; the one in `workers.model.adapters` says how its
pipeline runs.
"""
