"""A picture of a load: the time of each answer, and the distribution of times. For the command `bench`.

It needs matplotlib, which the extra `plot` installs.
"""

import importlib.util
from collections.abc import Sequence
from pathlib import Path

from service.cli.bench.sending import OK, Outcome
from service.cli.options import UsageError


def check_plot(file: Path) -> None:
    """Check that the picture can be drawn, before a load is sent.

    Raises:
        UsageError: the picture cannot be drawn here.
    """
    if file.suffix not in (".png", ".svg", ".pdf"):
        raise UsageError(f"--plot: expected a file that ends in .png, .svg or .pdf, got {file.name!r}")
    if importlib.util.find_spec("matplotlib") is None:
        raise UsageError("--plot needs matplotlib; install it with: pip install 'spray[plot]'")


def plot(outcomes: Sequence[Outcome], slo_s: float | None, file: Path) -> None:
    """Draw the outcomes of a load, and write the picture."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # here: only this needs it
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    times, shares = figure.subplots(1, 2)
    for kind in sorted({one.kind for one in outcomes}):
        answered = [one for one in outcomes if one.kind == kind and one.code == OK]
        times.plot([one.at_s for one in answered], [one.seconds for one in answered], ".", label=kind)
        took = sorted(one.seconds for one in answered)
        shares.plot(took, [100 * (i + 1) / len(took) for i in range(len(took))], label=kind, drawstyle="steps-post")
    failed = [one for one in outcomes if one.code != OK]
    if failed:
        times.plot([one.at_s for one in failed], [one.seconds for one in failed], "x", color="black", label="failed")
    if slo_s is not None:
        times.axhline(slo_s, linestyle=":", color="gray", label="SLO")
        shares.axvline(slo_s, linestyle=":", color="gray")
    times.set(xlabel="due, s from the start", ylabel="end to end, s", ylim=(0, None))
    shares.set(xlabel="end to end, s", ylabel="answered within, %", xlim=(0, None), ylim=(0, 100))
    for axes in (times, shares):
        axes.grid(alpha=0.3)
    times.legend()
    figure.savefig(file, dpi=120)
