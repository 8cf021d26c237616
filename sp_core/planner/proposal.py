"""A sequence plan that may be right, each entry with its reason.

Filled by `sp_core.planner.proposals`, proved by `sp_core.planner.planner`, written as code by `sp_core.planner.source`.
"""

from dataclasses import dataclass, field

from sp_core.models.family import ModelFamily
from sp_core.sp_plan import (
    SequenceParallelInput,
    SequenceParallelLeadingCount,
    SequenceParallelModelPlan,
    SequenceParallelOutput,
)

Entry = SequenceParallelInput | SequenceParallelLeadingCount | SequenceParallelOutput


@dataclass
class Proposal:
    """A plan that may be right.

    Attributes:
        plan: by module and key; the key of a gather is empty.
        reasons: the reason of each entry, by module and key.
        local_attention: patterns of modules whose attention stays on each rank, with the reason.
        own_stream: patterns of modules whose attention sees one of several streams, with its parameter.
        captured_processors: class names; see `sp_core.models.family.ModelFamily`.
    """

    plan: dict[str, dict[str | int, Entry]] = field(default_factory=dict)
    reasons: dict[tuple[str, str | int], str] = field(default_factory=dict)
    local_attention: dict[str, str] = field(default_factory=dict)
    own_stream: dict[str, str] = field(default_factory=dict)
    captured_processors: set[str] = field(default_factory=set)

    def add(self, module: str, key: str | int, entry: Entry, reason: str) -> None:
        """Add an entry, if there is none in this place."""
        self.plan.setdefault(module, {}).setdefault(key, entry)
        self.reasons.setdefault((module, key), reason)

    def merge(self, other: "Proposal") -> bool:
        """Add the entries of another variant of the same model; False if the two contradict each other."""
        for module, entries in other.plan.items():
            for key, entry in entries.items():
                self.add(module, key, entry, other.reasons[module, key])
                if self.plan[module][key] != entry:
                    return False
        self.local_attention |= other.local_attention
        self.own_stream |= other.own_stream
        self.captured_processors |= other.captured_processors
        return True

    def sequence_plan(self) -> SequenceParallelModelPlan:
        """The plan in the words of `sp_core.sp_plan`."""
        plan: SequenceParallelModelPlan = {}
        for module, entries in self.plan.items():
            gather = entries.get("")
            if isinstance(gather, SequenceParallelOutput):
                plan[module] = gather
            else:
                plan[module] = {
                    k: entry for k, entry in entries.items() if not isinstance(entry, SequenceParallelOutput)
                }
        return plan

    def family(self, transformer_class: str) -> ModelFamily:
        """The family of the transformer class, with this plan."""
        return ModelFamily(
            (transformer_class,),
            self.sequence_plan(),
            local_attention=tuple(self.local_attention),
            own_stream=self.own_stream,
            captured_processors=tuple(sorted(self.captured_processors)),
        )
