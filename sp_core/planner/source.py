"""A proposal as Python code, for reading and checking in: each entry with its reason as a comment. For `spray plan`."""

import dataclasses
from collections.abc import Iterator
from typing import Any

from sp_core.planner.proposal import Proposal


def source_of(proposal: Proposal) -> str:
    """`_sp_plan` and, if necessary, the other fields of the model's file in `sp_core.models`."""
    return "\n".join(_lines(proposal))


def _lines(proposal: Proposal) -> Iterator[str]:
    yield "_sp_plan = {"
    for module, entries in proposal.plan.items():
        gather = entries.get("")
        if gather is not None:
            yield f"    # {proposal.reasons[module, '']}"
            yield f'    "{module}": {_written(gather)},'
            continue
        yield f'    "{module}": {{'
        for key, entry in entries.items():
            yield f"        # {proposal.reasons[module, key]}"
            yield f"        {_quoted(key)}: {_written(entry)},"
        yield "    },"
    yield "}"
    if proposal.local_attention:
        yield "local_attention = ("
        yield from (f'    "{pattern}",  # {reason}' for pattern, reason in proposal.local_attention.items())
        yield ")"
    if proposal.own_stream:
        yield "own_stream = {"
        yield from (f'    "{pattern}": "{stream}",' for pattern, stream in proposal.own_stream.items())
        yield "}"
    if proposal.captured_processors:
        yield "captured_processors = ("
        yield from (
            f'    "{name}",  # calls torch\'s attention itself' for name in sorted(proposal.captured_processors)
        )
        yield ")"


def _quoted(value: Any) -> str:
    return f'"{value}"' if isinstance(value, str) else repr(value)


def _written(entry: Any) -> str:
    """The entry as a call, without default values."""
    given = [
        f"{field.name}={_quoted(value)}"
        for field in dataclasses.fields(entry)
        if (value := getattr(entry, field.name)) != field.default
    ]
    return f"{type(entry).__name__}({', '.join(given)})"
