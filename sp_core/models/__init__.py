"""One file per model family: its sequence plan, and what is peculiar to it. `family.py` says what a family is."""
