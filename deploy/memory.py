"""The bytes that the largest rank of a gang needs: weights by the headers of their files, activations as measured.

A `ModelSpec` and its folder come in. `deploy.check` prints the result, and what to change if it is too much. The
largest rank is always the first, which holds the text encoders and the VAE in every layout.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from deploy.activations import activation_bytes, largest_request, why_two_forwards
from deploy.families.lookup import component_dtype, kept_in_fp32, parts_in_fp32
from deploy.model_folder import component_folders, is_transformer, read_config
from deploy.model_sections import Elastic
from deploy.model_spec import ModelSpec
from deploy.safetensors_headers import read_header, read_headers
from sp_core.degrees import ParallelDegrees, axis_groups, check_layout, smaller_layouts, units
from sp_core.models.lookup import find_family
from sp_core.tp_plan import sharded_tensors

GIB = 2**30
ELEMENT_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}

ENCODERS_IN_FP32 = {"T5EncoderModel": frozenset({"wo"}), "UMT5EncoderModel": frozenset({"wo"})}
"""The parts that transformers keeps in fp32 if a text encoder is loaded in fp16."""

CUDA_RESERVE = 3 * GIB // 2
"""Further bytes that a rank needs on a GPU: CUDA's context, NCCL's buffers, gaps between allocations, and the values
that `sp_core.shared_modulation` keeps. Assumed, not measured."""

GROUP_BYTES = 96 * 2**20
"""Bytes of an NCCL communicator on each of its ranks. This number and the next follow reports of others: 544 MB with
two ranks (issue 964 of NVIDIA/nccl), 3.3 GB with eight ranks in an all-to-all (issue 1685). Not measured here."""

PEER_BYTES = 448 * 2**20
"""Bytes of a communicator for each further rank, since Ulysses ranks send to all others of their group."""

UNITS = {"": GIB, "G": GIB, "GIB": GIB, "M": 2**20, "MIB": 2**20, "T": 2**40, "TIB": 2**40}
UNITS |= {"MB": 10**6, "GB": 10**9, "TB": 10**12}

MOST_RANKS = 16
"""The search for a layout that fits tries up to this many ranks."""


@dataclass(frozen=True)
class RankMemory:
    """The memory of the largest rank of a gang, in bytes.

    Attributes:
        weights: all parts of the model that it holds, and an upper bound for its adapters.
        activations: of the largest request that the limits allow; None if the model's class was not measured.
        request: that request, as text.
        reserve: for CUDA and NCCL.
        groups: for the communicators that an elastic gang has besides those of its own layout.
        graphs: whether CUDA graphs take further memory; how much was not measured.
    """

    weights: int
    activations: int | None
    request: str
    reserve: int
    graphs: bool = False
    groups: int = 0

    @property
    def total(self) -> int:
        """The sum, without activations if they are not known."""
        return self.weights + (self.activations or 0) + self.reserve + self.groups

    def __str__(self) -> str:
        activations = (
            "unknown activations"
            if self.activations is None
            else f"{format_bytes(self.activations)} of activations at {self.request}"
        )
        reserve = f" + {format_bytes(self.reserve)} for CUDA" if self.reserve else ""
        reserve += f" + {format_bytes(self.groups)} for the groups of smaller degrees" if self.groups else ""
        reserve += " + unknown CUDA graphs" if self.graphs else ""
        return f"{format_bytes(self.weights)} of weights + {activations}{reserve} = {format_bytes(self.total)}"


def format_bytes(size: int) -> str:
    """A size in GiB, or in MiB below one: `"31.2 GiB"`."""
    return f"{size / GIB:.1f} GiB" if size >= GIB else f"{size / 2**20:.1f} MiB"


def parse_memory(text: str) -> int:
    """Bytes of `80`, `80G`, `80GiB` (2^30 each), `80GB` (10^9) or `80000MB` (10^6), and so on with M and T.

    Raises:
        ValueError: the text is not such a size, or the size is 0.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*", text, re.IGNORECASE)
    size = int(float(match[1]) * UNITS[match[2].upper()]) if match and match[2].upper() in UNITS else 0
    if size <= 0:
        raise ValueError(
            f"expected a size such as 80, 80G, 80GiB, 80GB or 80000MB (a number alone is GiB), got {text!r}"
        )
    return size


def rank_memory(model: ModelSpec, folder: Path) -> RankMemory:
    """The memory of the largest rank of the model's gangs; for an elastic gang, at the degree that needs most.

    Args:
        model: the model.
        folder: its files, in diffusers' format.

    Raises:
        ValueError: a weight file is missing or damaged, or the layout is tensor parallel and the class has no tensor
            plan.
    """
    return max(memory_by_degree(model, folder).values(), key=lambda needed: needed.total)


def memory_by_degree(model: ModelSpec, folder: Path) -> dict[int, RankMemory]:
    """The memory of the largest rank at each degree that a request may have, the largest degree first.

    A degree counts tensor-parallel groups. The fewer ranks share a request, the more of it each rank holds. A gang that
    is not elastic has one degree.

    Raises:
        ValueError: see `rank_memory`.
    """
    request, weights = largest_request(model, folder), weight_bytes(model, folder)
    layouts = (model.parallel, *(smaller_layouts(model.parallel, model.elastic.min_degree) if model.elastic else ()))
    cuda = model.device == "cuda"
    found: dict[int, RankMemory] = {}
    for layout in layouts:
        here = model.model_copy(update={"parallel": layout})
        apart = why_two_forwards(here, folder, request)
        needed = RankMemory(
            weights=weights,
            activations=activation_bytes(here, folder, request),
            request=str(request) + ("" if apart else ", both branches of guidance"),
            reserve=CUDA_RESERVE if cuda else 0,
            graphs=model.cuda_graphs,
            groups=_group_bytes(layouts) if cuda else 0,
        )
        degree = layout.world_size // layout.tensor_parallel_size
        found[degree] = max(found.get(degree, needed), needed, key=lambda each: each.total)
    return found


def _group_bytes(layouts: Sequence[ParallelDegrees]) -> int:
    """Bytes of the first rank's communicators for these layouts, without those of the first layout."""
    own, *others = (
        {tuple(ranks) for of_axis in axis_groups(layout).values() for ranks in of_axis if 0 in ranks and len(ranks) > 1}
        for layout in layouts
    )
    more = {ranks for groups in others for ranks in groups} - own
    return sum(GROUP_BYTES + PEER_BYTES * (len(ranks) - 1) for ranks in more)


def weight_bytes(model: ModelSpec, folder: Path) -> int:
    """Bytes of the weights on the first rank. Adapters count as if each rank held all of them.

    Raises:
        ValueError: see `rank_memory`.
    """
    components = sum(
        _component_bytes(model, name, path, component_dtype(model, folder, name))
        for name, path in component_folders(folder).items()
    )
    element = ELEMENT_BYTES[model.torch_dtype]
    adapters = sum(info.elements * element for lora in model.loras for info in read_header(Path(lora.source)).values())
    return components + adapters


def _component_bytes(model: ModelSpec, name: str, folder: Path, dtype: str) -> int:
    config = read_config(folder / "config.json")
    kind = str(config.get("_class_name") or next(iter(config.get("architectures") or [""])))
    size = model.parallel.tensor_parallel_size if is_transformer(name) else 1
    sharded = _sharded_tensors(folder, kind, config) if size > 1 else []
    in_fp32 = _stays_in_fp32(kind, dtype) | parts_in_fp32(folder.parent, name)
    total = 0
    for tensor, info in read_headers(folder).items():
        element = ELEMENT_BYTES[dtype] if in_fp32.isdisjoint(tensor.split(".")) else 4
        whole = info.elements * element if info.is_floating else info.nbytes
        total += whole // size if any(fnmatchcase(tensor, pattern) for pattern in sharded) else whole
    return total


def _sharded_tensors(folder: Path, kind: str, config: Mapping[str, Any]) -> list[str]:
    """Patterns of the tensors that tensor-parallel ranks share, by the tensor plan of the transformer's family."""
    family = find_family([kind])
    plan = family.tensor_plan(config) if family else {}
    if not plan:
        raise ValueError(f"{folder}: a {kind} has no tensor plan; use tensor_parallel_size=1")
    return sharded_tensors(plan)


def _stays_in_fp32(kind: str, dtype: str) -> frozenset[str]:
    """Path components of the tensors that are loaded in fp32 although the model is loaded in `dtype`."""
    if dtype == "float32":
        return frozenset()
    if kind in ENCODERS_IN_FP32 and dtype == "float16":
        return ENCODERS_IN_FP32[kind]
    return kept_in_fp32(kind)


def what_fits(model: ModelSpec, folder: Path, memory: int, num_heads: int | None, ffn_dim: int | None) -> list[str]:
    """Changes after which the largest rank fits into `memory` bytes, the cheapest first; empty if none was found.

    Args:
        model: the model that needs more.
        folder: its files.
        memory: bytes of a device.
        num_heads: attention heads of the transformer; None if its config does not say.
        ffn_dim: hidden features of its feed-forward layers; None if they follow from the heads.

    Raises:
        ValueError: see `rank_memory`.
    """
    changes = []
    if model.batch_guidance is True:
        needed = rank_memory(model.model_copy(update={"batch_guidance": "auto"}), folder)
        if needed.total <= memory:
            changes.append(f"batch_guidance auto ({format_bytes(needed.total)})")
    for elastic in _higher_degrees(model):
        needed = rank_memory(model.model_copy(update={"elastic": elastic}), folder)
        if needed.total <= memory:
            changes.append(f"elastic.min_degree {elastic.min_degree} ({format_bytes(needed.total)})")
            break
    for degrees in _layouts(model, num_heads, ffn_dim):
        needed = rank_memory(model.model_copy(update={"parallel": degrees}), folder)
        if needed.total <= memory:
            ranks = f"{degrees.world_size} ranks" if degrees.world_size > 1 else "1 rank"
            changes.append(f"parallel {degrees} ({ranks}: {format_bytes(needed.total)})")
            break
    for limits in _lower_limits(model):
        needed = rank_memory(model.model_copy(update={"limits": model.limits.model_copy(update=limits)}), folder)
        if needed.total <= memory:
            says = ", ".join(f"limits.{name} {value}" for name, value in limits.items())
            changes.append(f"{says} ({format_bytes(needed.total)})")
            break
    return changes


def _layouts(model: ModelSpec, num_heads: int | None, ffn_dim: int | None) -> list[ParallelDegrees]:
    """Other layouts that the model can run in: fewest ranks first, then least tensor parallelism.

    The guidance degree stays: it saves no memory.
    """
    layouts = []
    cfg = model.parallel.cfg_parallel_size
    for size in (1, 2, 4, 8):
        for sequence in (1, 2, 4, 8):
            heads = (num_heads or 1) // size
            ulysses = next(d for d in range(sequence, 0, -1) if sequence % d == 0 and heads % d == 0)
            degrees = ParallelDegrees(ulysses, sequence // ulysses, size, cfg)
            try:
                check_layout(degrees, num_heads, ffn_dim)
            except ValueError:
                continue
            if model.elastic and units(degrees) < model.elastic.min_degree:
                continue
            if degrees != model.parallel and model.parallel.world_size <= degrees.world_size <= MOST_RANKS:
                layouts.append(degrees)
    return sorted(layouts, key=lambda d: (d.world_size, d.tensor_parallel_size))


def _higher_degrees(model: ModelSpec) -> Iterator[Elastic]:
    """The section with higher values of `min_degree`, the lowest first."""
    if model.elastic:
        degree = 2 * model.elastic.min_degree
        while degree <= units(model.parallel):
            yield model.elastic.model_copy(update={"min_degree": degree})
            degree *= 2


def _lower_limits(model: ModelSpec) -> Iterator[dict[str, int]]:
    """Lower limits that still allow the defaults: fewer pictures, then smaller ones, then fewer frames."""
    limits, defaults = model.limits, model.defaults
    yield from ({"max_n": n} for n in range(limits.max_n - 1, 0, -1))
    multiple = limits.size_multiple
    for tenths in range(9, 0, -1):
        sides = {
            f"max_{side}": max(
                getattr(limits, f"max_{side}") * tenths // 10 // multiple * multiple, getattr(defaults, side)
            )
            for side in ("width", "height")
        }
        frames = {"max_num_frames": max(limits.max_num_frames * tenths // 10, defaults.num_frames)}
        yield sides
        yield {"max_n": 1, **sides}
        yield {"max_n": 1, **sides, **(frames if defaults.num_frames > 1 else {})}
