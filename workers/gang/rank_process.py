"""Prepares a process that will be one rank, before anything in it imports diffusers or transformers.

Used by `workers.gang.rank_actor` after the model is fetched, and by the child processes of `workers.gang.local`.
"""

import gc
import os
from typing import TYPE_CHECKING

import huggingface_hub.constants

from sp_core.torchvision_operators import declare_missing_operators

if TYPE_CHECKING:
    from workers.gang.rank import Rank


def import_rank(elastic: bool = False) -> "type[Rank]":
    """Set up this process and import `Rank` with all its libraries; of an elastic gang, `ElasticRank`.

    The collector rests meanwhile: imports make hundreds of thousands of objects that stay, and looking through them
    again and again is a fifth of the time. It never looks at them later either.
    """
    gc.disable()
    try:
        set_up_rank_process()
        # Here: their libraries read what was just set, and the parent needs no torch.
        from workers.gang.elastic_rank import ElasticRank
        from workers.gang.rank import Rank
    finally:
        gc.freeze()
        gc.enable()
    return ElasticRank if elastic else Rank


def set_up_rank_process() -> None:
    """Work offline, and keep diffusers and transformers quiet. Call it once per process; it takes seconds.

    A rank reads only files that are there: without this, the libraries would ask the hub for what a folder lacks, each
    rank for itself. The operator's HF_HUB_OFFLINE wins.
    """
    offline = os.environ.setdefault("HF_HUB_OFFLINE", "1")
    # Whoever fetched the model has loaded huggingface_hub, which reads the variable only at import.
    huggingface_hub.constants.HF_HUB_OFFLINE = offline.upper() in huggingface_hub.constants.ENV_VARS_TRUE_VALUES
    declare_missing_operators()

    import diffusers  # here: both copy hub's answer when they are imported
    import transformers

    diffusers.logging.set_verbosity_error()
    diffusers.logging.disable_progress_bar()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
