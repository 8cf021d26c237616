"""One file per served family: what can be said of its pipeline without torch.

    family.py      what a family's file declares
    schedulers.py  which schedulers a family runs with
    classic.py     the family of a pipeline without a file, by its source: pipeline_source.py, source_patterns.py
    lookup.py      finds the family of a model folder

The family's plans are in the file of the same name in `sp_core.models`, how its pipeline runs in that of
`workers.model.adapters`.
"""
