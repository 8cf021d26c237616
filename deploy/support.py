"""The pipelines of diffusers that spray serves, and why it refuses the others, as the proofs recorded it.

`sp_core/support.json` comes in. Called by `spray models --supported`; `workers.support_matrix` writes the file.
"""

import importlib.resources
import json
from typing import NotRequired, TypedDict

from deploy.families.classic import check_proved
from deploy.families.lookup import family_of


class Row(TypedDict):
    """One pipeline.

    Attributes:
        pipeline: its class name.
        transformer: the class of its transformer.
        status: `served` if a proof has shown it, else `refused`.
        reason: why it is refused, as the error of a deployment would say; empty if it is served.
        tasks: the tasks that a request may ask for.
        layouts: layouts that are proved to give the answer of its classic call: one rank, u Ulysses, r ring, t tensor
            ranks.
        date: of the proof.
        note: what the proof had to leave out, if anything.
    """

    pipeline: str
    transformer: str
    status: str
    reason: str
    tasks: list[str]
    layouts: list[str]
    date: str
    note: NotRequired[str]


def supported() -> list[Row]:
    """All pipelines of diffusers with a transformer, in order of names."""
    text = importlib.resources.files("sp_core").joinpath("support.json").read_text(encoding="utf-8")
    rows: list[Row] = json.loads(text)["pipelines"]
    return rows


def why_refused(pipeline: str, transformer: str) -> str:
    """Why spray does not serve a pipeline; empty if nothing speaks against it.

    Args:
        pipeline: its class name.
        transformer: the class name of its transformer.
    """
    try:
        family_of(pipeline)
        check_proved(pipeline, ["diffusers", transformer])
    except ValueError as error:
        return str(error)
    return ""
