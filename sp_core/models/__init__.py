"""One file per model family, all plain data: its plans, its peculiarities, and the examples that prove them.

family.py   what a family's file declares
lookup.py   finds the family of a transformer class
vaes.py     how VAEs decode, whatever family has them

A family that spray serves also has a file of the same name in `deploy.families` and in `workers.model.adapters`. If its
pipelines run through their classic call, it has a demo model of the same name in `workers.demo_models` instead.
"""
