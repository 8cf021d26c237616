"""The command `python -m workers.support_matrix [PIPELINE ...]`: which pipelines of diffusers spray serves.

Each pipeline that has a demo model is proved: what its classic call makes on one process, a gang must make on one rank,
on Ulysses, ring and, where planned, tensor ranks (`workers.pipeline_proof`). `served` is written of what a proof has
shown, in this run or, for pipelines that it does not name, in an earlier one. Every other pipeline with a transformer
is `refused`, with the reason that a deployment of it would be told. Writes `sp_core/support.json` and
`sp_core/SUPPORT.md`; both belong to the source, and `deploy.support` reads them.
"""

import argparse
import datetime
import json
import os
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import sp_core
from deploy.families.lookup import family_of
from deploy.families.pipeline_source import transformer_pipelines
from deploy.support import Row, supported, why_refused
from sp_core.models.lookup import find_family as find_plan
from sp_core.torchvision_operators import declare_missing_operators
from sp_core.verify.rank_pool import RankPool
from workers.demo_models.pipelines import requests_of, served
from workers.demo_models.writer import write_demo_model

if TYPE_CHECKING:
    from workers.pipeline_proof import Proof


def proved(pipeline: str, transformer: str, pool: RankPool) -> "Proof":
    """The proof of a pipeline that has a demo model; of several requests, that of the last.

    Raises:
        Unproved: see `prove`.
    """
    from workers.pipeline_proof import prove  # here: it imports torchvision, and spawned ranks load this file first

    plan = find_plan([transformer])
    assert plan is not None, "what has a demo model has a plan"
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place, "demo")
        write_demo_model(folder, served()[pipeline], pipeline)
        options = {"tensor": bool(plan.tensor_plan({})), "rounds": bool(plan.rounds)}
        proofs = [prove(pipeline, folder, each, pool, **options) for each in requests_of(pipeline)]
    return proofs[-1]


def row(pipeline: str, transformer: str, proof: "Proof | None", reason: str = "") -> Row:
    """What the file says of a pipeline; without a proof it is refused."""
    noted: Row = {
        "pipeline": pipeline,
        "transformer": transformer,
        "status": "served" if proof else "refused",
        "reason": reason,
        "tasks": list(family_of(pipeline).tasks) if proof else [],
        "layouts": list(proof.layouts) if proof else [],
        "date": datetime.datetime.now(datetime.UTC).date().isoformat() if proof else "",
    }
    if proof and proof.shipped:
        plan = find_plan([transformer])
        assert plan is not None, "what has a proof has a plan"
        noted["note"] = (
            f"{plan.rounds}: without that, layouts are within {proof.latents:.0e} of the classic call; with it within "
            f"{proof.shipped:.0e}, where other last bits of its inputs move the classic call itself by "
            f"{proof.explained:.0e}"
        )
    elif proof and (packages := family_of(pipeline).packages):
        noted["note"] = (
            f"served where {', '.join(packages)} is installed; proved with a checker that passes everything; the real "
            "one was not run"
        )
    return noted


def markdown(rows: Iterable[Row]) -> str:
    """The same as a page."""
    rows = list(rows)
    good, others = ([row for row in rows if (row["status"] == "served") is is_good] for is_good in (True, False))
    return "\n".join(
        [
            "# What spray serves of diffusers",
            "",
            f"{len(good)} of {len(rows)} pipelines with a transformer, over "
            f"{len({row['transformer'] for row in good})} transformer classes.",
            "",
            "`python -m workers.support_matrix` writes this page. It proves each row: a gang makes what the pipeline's",
            "classic call makes on one process, latents within 1e-5 and pixels within 1/255; with attention kept local",
            "it would not. Layouts: 1 one rank, u2 Ulysses, r2 ring, t2 tensor ranks.",
            "Models that round by themselves, or need a guardrail, have a note below the table.",
            "",
            "| pipeline | transformer | tasks | layouts | proved |",
            "|---|---|---|---|---|",
            *(
                f"| {row['pipeline']} | {row['transformer']} | {', '.join(row['tasks'])} | "
                f"{', '.join(row['layouts'])} | {row['date']} |"
                for row in good
            ),
            "",
            *_notes(good),
            "## Refused",
            "",
            "| pipeline | transformer | reason |",
            "|---|---|---|",
            *(f"| {row['pipeline']} | {row['transformer']} | {row['reason']} |" for row in others),
            "",
        ]
    )


def _notes(good: list[Row]) -> list[str]:
    """What the proofs of some pipelines had to leave out."""
    noted = [f"- {row['pipeline']}: {row['note']}" for row in good if "note" in row]
    return ["## Notes to what is served", "", *noted, ""] if noted else []


def write(rows: Iterable[Row]) -> None:
    """Write both files of the source."""
    room = Path(sp_core.__path__[0])
    rows = sorted(rows, key=lambda row: row["pipeline"])
    lines = ",\n".join(f"    {json.dumps(row, ensure_ascii=False)}" for row in rows)
    (room / "support.json").write_text(f'{{\n  "pipelines": [\n{lines}\n  ]\n}}\n', encoding="utf-8")
    (room / "SUPPORT.md").write_text(markdown(rows), encoding="utf-8")


def main() -> int:
    """Prove and write, with a line for each pipeline that was tried. Exit code 1: a proof has failed."""
    parser = argparse.ArgumentParser(description="Prove which pipelines of diffusers spray serves, and write it down.")
    parser.add_argument("pipelines", nargs="*", metavar="PIPELINE", help="prove only these; without any, all")
    asked = set(parser.parse_args().pipelines)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    declare_missing_operators()
    from workers.pipeline_proof import Unproved  # here: it loads torchvision, whose operators were just declared

    known = {each["pipeline"]: each for each in supported()}
    pool, rows, failed = RankPool(2), [], 0
    try:
        for pipeline, transformer in transformer_pipelines().items():
            if pipeline not in served():
                rows.append(row(pipeline, transformer, None, why_refused(pipeline, transformer)))
                continue
            if asked and pipeline not in asked and pipeline in known:
                rows.append(known[pipeline])
                continue
            try:
                rows.append(row(pipeline, transformer, proved(pipeline, transformer, pool)))
                said = "served on " + ", ".join(rows[-1]["layouts"])
            except Unproved as unproved:
                said, failed = f"its proof fails: {unproved}", 1
                rows.append(row(pipeline, transformer, None, said))
            print(f"{pipeline}: {said}", flush=True)
    finally:
        pool.stop()
    write(rows)
    return failed


if __name__ == "__main__":
    sys.exit(main())
