"""`spray bench`: loads a running server, and measures its answers."""

import asyncio
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import typer

from service.cli.bench.driving import Drive
from service.cli.bench.load import (
    DEFAULT_KINDS,
    Planned,
    complete,
    drawn,
    first_of_each,
    one_of_each,
    read_mix,
    read_trace,
    seconds,
)
from service.cli.bench.plot import check_plot, plot
from service.cli.bench.report import summary, tables
from service.cli.bench.sending import OK
from service.cli.client import ServerError, server_url
from service.cli.options import Server, UsageError
from service.cli.output import say, show

DEFAULT_DURATION = "60s"
DEFAULT_PROMPT = "a cup of coffee on a wooden table"


@dataclass(frozen=True)
class Load:
    """The requests of a load.

    Attributes:
        planned: the requests, in their order.
        warm_up: requests that are sent first and not measured: one of each kind.
        at_once: how often each of these is sent at once.
        callers: the callers of a closed loop; None: an open loop.
        ends_s: seconds from the start after which callers send no more; None: they send everything.
    """

    planned: Iterator[Planned]
    warm_up: list[Planned]
    at_once: int
    callers: int | None
    ends_s: float | None


def bench(
    rate: Annotated[
        float | None, typer.Option(min=0.001, help="Open loop: requests a second, at random times.")
    ] = None,
    concurrency: Annotated[
        int | None, typer.Option(min=1, help="Closed loop: callers, each with one request at a time.")
    ] = None,
    mix: Annotated[
        str | None, typer.Option(metavar="MIX", help="NAME=WIDTHxHEIGHTxSTEPS[xFRAMES][:SHARE],... or a .yaml file.")
    ] = None,
    trace: Annotated[
        Path | None, typer.Option(metavar="FILE", help="JSON lines with at_s and body, and maybe path and kind.")
    ] = None,
    duration: Annotated[
        str | None, typer.Option(help=f"How long to send, such as 30s or 5m. Default: {DEFAULT_DURATION}, or all.")
    ] = None,
    requests: Annotated[int | None, typer.Option(min=1, help="How many to send.")] = None,
    warmup: Annotated[
        int,
        typer.Option(
            min=0,
            help="Requests of each kind that are sent first, at once, not measured; of each caller with --concurrency. "
            "With --rate or --trace, give the number of gangs to warm all.",
        ),
    ] = 1,
    seed: Annotated[int, typer.Option(help="Draws the same load again.")] = 0,
    slo: Annotated[str | None, typer.Option(help="Goodput is what is answered within this time, such as 5s.")] = None,
    timeout: Annotated[str, typer.Option(help="A request that takes longer is given up.")] = "10m",
    model: Annotated[str | None, typer.Option(help="For requests that name none.")] = None,
    prompt: Annotated[str, typer.Option(help="For requests that have none.")] = DEFAULT_PROMPT,
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write the numbers, and a row per request.")
    ] = None,
    plot_file: Annotated[
        Path | None, typer.Option("--plot", metavar="FILE", help="Draw the times: .png, .svg or .pdf.")
    ] = None,
    server: Server = None,
) -> None:
    """Load a running server, and measure what becomes of the requests.

    An open loop (--rate, or --trace alone) sends whatever happens, as many independent users do; the time of a request
    begins when it is due. A closed loop (--concurrency) shows what the server can do at most. Ctrl-C ends the load and
    shows what was measured. Exit code 1: no request was answered.

    \b
    spray bench --rate 0.5 --duration 5m --slo 30s
    spray bench --concurrency 8 --requests 100 --mix "small=512x512x20:0.7,large=1024x1024x30:0.3"
    spray bench --trace monday.jsonl --json monday.json --plot monday.png

    \b
    A line of a trace:  {"at_s": 0.5, "body": {"size": "512x512"}, "kind": "small"}
    A kind in a .yaml:  small: {share: 0.7, body: {size: 512x512, num_inference_steps: 20}}
    Videos have "path": "/v1/videos/sync" there, and xFRAMES in --mix.
    """
    slo_s = seconds(slo) if slo else None
    load = _read_load(rate, concurrency, mix, trace, duration, requests, warmup, seed)
    for flag, file in (("--json", json_file), ("--plot", plot_file)):
        if file and not file.absolute().parent.is_dir():
            raise UsageError(f"{flag} {file}: there is no folder {file.parent}; make it first")
    if plot_file:
        check_plot(plot_file)
    drive = Drive(server_url(server), seconds(timeout), say)
    stopped = False
    try:
        asyncio.run(_run(drive, load, lambda one: complete(one, prompt, model)))
    except KeyboardInterrupt:
        stopped = True
    found = summary(drive.outcomes, drive.unfinished, drive.seconds, slo_s)
    show(tables(found))
    if json_file:
        flags = {
            "server": server_url(server), "rate": rate, "concurrency": concurrency, "mix": mix, "seed": seed,
            "trace": str(trace) if trace else None, "slo_s": slo_s, "timeout_s": seconds(timeout),
        }  # fmt: skip
        _write(json_file, flags, found, drive)
    if plot_file:
        plot(drive.outcomes, slo_s, plot_file)
    if stopped:
        raise KeyboardInterrupt
    if not any(one.code == OK for one in drive.outcomes):
        raise ServerError(f"no request was answered: {', '.join(found['errors']) or 'none was due'}")


def _read_load(
    rate: float | None, concurrency: int | None, mix: str | None, trace: Path | None, duration: str | None,
    requests: int | None, warmup: int, seed: int,
) -> Load:  # fmt: skip
    if trace is not None and (rate is not None or mix is not None):
        raise UsageError("--trace has times and bodies of its own; leave out --rate and --mix")
    if trace is None and (rate is None) == (concurrency is None):
        raise UsageError("give --rate for an open loop, --concurrency for a closed one, or --trace")
    ends_s = seconds(duration) if duration else None
    at_once = warmup * (concurrency or 1)
    if trace is not None:
        planned = read_trace(trace)[:requests]
        if concurrency is None and ends_s is not None:
            planned = [one for one in planned if one.at_s <= ends_s]
        return Load(iter(planned), first_of_each(planned), at_once, concurrency, ends_s)
    if ends_s is None and requests is None:
        ends_s = seconds(DEFAULT_DURATION)
    kinds = read_mix(mix) if mix else DEFAULT_KINDS
    return Load(drawn(kinds, seed, rate, requests, ends_s), one_of_each(kinds), at_once, concurrency, ends_s)


async def _run(drive: Drive, load: Load, complete: Callable[[Planned], Planned]) -> None:
    """Send it.

    Raises:
        ServerError: a request of the warm-up is not answered.
    """
    for one in load.warm_up if load.at_once else ():
        await drive.warm_up(complete(one), load.at_once)
    planned = (complete(one) for one in load.planned)
    if load.callers is None:
        await drive.open_loop(planned)
    else:
        await drive.closed_loop(planned, load.callers, load.ends_s)


def _write(file: Path, flags: dict[str, Any], found: dict[str, Any], drive: Drive) -> None:
    rows = [asdict(one) | {"waited_s": one.waited_s} for one in drive.outcomes]
    told = {"ended_at": datetime.now(UTC).isoformat(timespec="seconds"), "flags": flags, **found, "requests": rows}
    file.write_text(json.dumps(told, indent=1) + "\n")
