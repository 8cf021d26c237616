"""Prepares a process that will be one rank, before anything in it imports diffusers or transformers.

Called by `workers.gang.rank_actor` after the model is fetched, and by the child processes of `workers.gang.local`.
"""

import os

import huggingface_hub.constants


def set_up_rank_process() -> None:
    """Work offline, and keep diffusers and transformers quiet. Call it once per process; it takes seconds.

    A rank reads only files that are there: without this, the libraries would ask the hub for what a folder lacks, each
    rank for itself. The operator's HF_HUB_OFFLINE wins.
    """
    offline = os.environ.setdefault("HF_HUB_OFFLINE", "1")
    # Whoever fetched the model has loaded huggingface_hub, which reads the variable only at import.
    huggingface_hub.constants.HF_HUB_OFFLINE = offline.upper() in huggingface_hub.constants.ENV_VARS_TRUE_VALUES

    import diffusers  # here: both copy hub's answer when they are imported
    import transformers

    diffusers.logging.set_verbosity_error()
    diffusers.logging.disable_progress_bar()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
