"""The requests of a load: a mix or a trace comes in, the requests to send come out. For the command `bench`.

A mix has kinds of requests with shares. Requests are drawn from it with a seed, and the same seed gives the same load.
A trace lists each request with its time.
"""

import itertools
import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from service.cli.client import PICTURES, VIDEOS
from service.cli.options import UsageError

SIZE = re.compile(
    r"(?P<name>[\w.-]+)=(?P<size>\d+x\d+)x(?P<steps>\d+)(?:x(?P<frames>\d+))?(?::(?P<share>\d*\.?\d+))?", re.ASCII
)

DURATION = re.compile(r"(\d+(?:\.\d+)?)(ms|s|m|h)?")

UNITS = {"ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0}

Route = Literal["/v1/images/generations", "/v1/videos/sync"]

SEEDS = 2**32


class Kind(BaseModel):
    """One kind of request in a mix.

    Attributes:
        body: the fields of the path.
        path: the path of the API.
        share: how often it is drawn, relative to the others.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    body: dict[str, Any]
    path: Route = PICTURES
    share: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0


class TraceLine(BaseModel):
    """One line of a trace.

    Attributes:
        at_s: when it is sent, in seconds from the start of the load.
        body: the fields of the path.
        path: the path of the API.
        kind: the name under which it is reported.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    at_s: Annotated[float, Field(ge=0, allow_inf_nan=False)]
    body: dict[str, Any]
    path: Route = PICTURES
    kind: str = "trace"


DEFAULT_KINDS = {"default": Kind(body={})}
"""The mix without `--mix`: pictures with the defaults of the model."""


@dataclass(frozen=True)
class Planned:
    """A request to send.

    Attributes:
        at_s: when, in seconds from the start; 0 in a closed loop, which sends it when another one is answered.
        kind: the name under which it is reported.
        path: the path of the API.
        body: the fields of the path.
    """

    at_s: float
    kind: str
    path: str
    body: dict[str, Any]


def seconds(text: str) -> float:
    """`500ms`, `5s`, `2m`, `1h`, or a number of seconds.

    Raises:
        UsageError: it is none of these.
    """
    matched = DURATION.fullmatch(text.strip())
    if matched is None or not float(matched[1]):
        raise UsageError(f"expected a time above 0, such as 500ms, 5s, 2m or 1h, got {text!r}")
    return float(matched[1]) * UNITS[matched[2] or "s"]


def read_mix(text: str) -> dict[str, Kind]:
    """The kinds of a mix by name: of `NAME=WIDTHxHEIGHTxSTEPS[xFRAMES][:SHARE],...`, or of a YAML file.

    Raises:
        UsageError: it cannot be read.
    """
    if text.endswith((".yaml", ".yml")):
        return _kinds_of_file(Path(text))
    kinds: dict[str, Kind] = {}
    for part in text.split(","):
        matched = SIZE.fullmatch(part.strip())
        if matched is None:
            raise UsageError(f"--mix: expected NAME=WIDTHxHEIGHTxSTEPS[xFRAMES][:SHARE] or a .yaml file, got {part!r}")
        if matched["name"] in kinds:
            raise UsageError(f"--mix: {matched['name']!r} comes twice")
        body = {"size": matched["size"], "num_inference_steps": int(matched["steps"])}
        frames = {"num_frames": int(matched["frames"])} if matched["frames"] else {}
        try:
            kinds[matched["name"]] = Kind(
                body=body | frames, path=VIDEOS if frames else PICTURES, share=float(matched["share"] or 1)
            )
        except ValueError as error:
            raise UsageError(f"--mix: {part!r}: {_first(error)}") from None
    return kinds


def _kinds_of_file(file: Path) -> dict[str, Kind]:
    try:
        kinds = TypeAdapter(dict[str, Kind]).validate_python(yaml.safe_load(file.read_text()))
    except (OSError, UnicodeDecodeError, yaml.YAMLError, ValidationError) as error:
        raise UsageError(f"--mix {file}: {_first(error)}") from None
    if not kinds:
        raise UsageError(f"--mix {file}: it has no kinds of requests")
    return kinds


def read_trace(file: Path) -> list[Planned]:
    """The requests of a trace, by time: JSON objects, one a line, with the fields of `TraceLine`.

    Raises:
        UsageError: it cannot be read.
    """
    planned = []
    try:
        lines = file.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"--trace {file}: {error}") from None
    for number, text in enumerate(lines, 1):
        if not text.strip():
            continue
        try:
            line = TraceLine.model_validate_json(text)
        except ValidationError as error:
            raise UsageError(f"--trace {file}, line {number}: {_first(error)}") from None
        planned.append(Planned(line.at_s, line.kind, line.path, line.body))
    if not planned:
        raise UsageError(f"--trace {file}: it has no requests")
    return sorted(planned, key=lambda one: one.at_s)


def _first(error: Exception) -> str:
    if not isinstance(error, ValidationError):
        return str(error)
    mistake = error.errors()[0]
    where = ".".join(str(part) for part in mistake["loc"])
    return f"{where}: {mistake['msg']}" if where else str(mistake["msg"])


def drawn(
    kinds: dict[str, Kind], seed: int, rate: float | None, requests: int | None, duration_s: float | None
) -> Iterator[Planned]:
    """Requests of a mix, in the order in which they are sent.

    Args:
        kinds: by name.
        seed: decides the choice, the times, and the pictures' own seeds.
        rate: requests a second on average, at the times of a Poisson process; None: a closed loop, without times.
        requests: the most requests; None: no limit.
        duration_s: seconds after which none is sent; a closed loop is stopped by its driver.
    """
    chance = random.Random(seed)
    names, shares = list(kinds), [kind.share for kind in kinds.values()]
    at_s = 0.0
    for number in itertools.count():
        at_s += chance.expovariate(rate) if rate else 0.0
        if number == requests or (duration_s is not None and at_s > duration_s):
            return
        (name,) = chance.choices(names, shares)
        own_seed = {"seed": chance.randrange(SEEDS)}
        yield Planned(at_s, name, kinds[name].path, own_seed | kinds[name].body)


def complete(planned: Planned, prompt: str, model: str | None) -> Planned:
    """The same request as a stream with progress, with this prompt and model if it has none."""
    own = {name: value for name, value in planned.body.items() if value is not None}
    if own.get("response_format") == "file":  # which is no stream
        del own["response_format"]
    body = {"prompt": prompt} | ({"model": model} if model else {}) | own
    streamed = {"stream": True, "stream_options": {"include_progress": True}}
    return Planned(planned.at_s, planned.kind, planned.path, body | streamed)


def one_of_each(kinds: dict[str, Kind]) -> list[Planned]:
    """A request of each kind, for warming up."""
    return [Planned(0.0, name, kind.path, kind.body) for name, kind in kinds.items()]


def first_of_each(planned: Sequence[Planned]) -> list[Planned]:
    """The first request of each kind, for warming up."""
    return list({one.kind: one for one in reversed(planned)}.values())
