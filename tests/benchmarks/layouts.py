"""All layouts of two or four ranks side by side: seconds of a guided step, bytes sent, memory.

    python -m tests.benchmarks.layouts [--world 2|4] [--family qwen-image|wan] [--image 1024] [--text 64] [--layers 4]
        [--heads 12] [--head-size 64] [--repeats 7]

One transformer with random weights on gloo ranks with one thread each. A guided step is two forwards, with a prompt and
without; where guidance is parallel (`cfg`), it is one forward in each group and the exchange of the predictions.

Seconds: all layouts take turns in one run on the same processes, in shuffled order; the median over the turns of the
slowest rank, the least, and "x best", the median of the ratios of one turn to the layout whose median is least. Beside
them one process alone and, for Qwen-Image, diffusers' own tensor parallelism over all ranks, which refuses CPUs by a
list of devices that is lengthened here; last its ratio to ours, turn by turn.

Sent: of the rank that sends most, in one step, counted where calls reach the process group, beside what arithmetic on
the shape says. What counts as sent, and all that is assumed, says `tests.support.traffic`. "equal" means on every rank,
in every kind of exchange, to the byte; else the largest difference is printed. The first step of a model, in which the
ranks also agree on its attentions, is over by then.

Memory: of the rank with most, in new processes for each layout that load their share of the weights from files and run
one step; held are the weights, the peak is the rise of the highest resident memory over that before the loading, with
whatever kernels and backend keep for themselves.

The answers of all layouts are compared to that of one process; a difference above 1e-4 of the largest value is an
error, because what computes something else is not worth timing.
"""

import argparse
import copy
import itertools
import os
import random
import statistics
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")

import diffusers.hooks.tensor_parallel as rival
import torch
import torch.distributed as dist
from diffusers import QwenImageTransformer2DModel, WanTransformer3DModel
from diffusers.models._modeling_parallel import TensorParallelConfig
from torch import nn

from sp_core.degrees import ParallelDegrees
from sp_core.mesh import MeshAxis, ParallelMesh
from sp_core.parallelize import parallelize
from sp_core.verify.divergence import error
from sp_core.verify.rank_pool import RankPool
from tests.benchmarks.load_memory import MB, status
from tests.benchmarks.sp_vs_diffusers import seeded, timed
from tests.support.guided import guided_step
from tests.support.traffic import Bytes, Meter, Shape, of_qwen_image, of_wan, predicted
from workers.model.weights import load_transformer

ALONE = MeshAxis("cfg", 0, 1, None, None)
ONE = "1 process"
DIFFUSERS = "diffusers, tp"
FEATURES = 256
"""Of a text token."""


@dataclass(frozen=True)
class Work:
    """The transformer and what it is given; sizes in tokens."""

    family: str
    layers: int
    heads: int
    head_size: int
    image: int
    text: int

    @property
    def height(self) -> int:
        """The most nearly square image of this many tokens."""
        return next(side for side in range(int(self.image**0.5), 0, -1) if self.image % side == 0)

    def build(self) -> nn.Module:
        """The transformer, the same on every rank."""
        rope = (self.head_size // 8, self.head_size // 16 * 7, self.head_size // 16 * 7)
        sizes = {
            "num_layers": self.layers,
            "num_attention_heads": self.heads,
            "attention_head_dim": self.head_size,
        }
        if self.family == "wan":
            ffn = 4 * self.heads * self.head_size
            return seeded(lambda: WanTransformer3DModel(text_dim=FEATURES, ffn_dim=ffn, cross_attn_norm=True, **sizes))
        return seeded(
            lambda: QwenImageTransformer2DModel(
                in_channels=64, out_channels=16, joint_attention_dim=FEATURES, axes_dims_rope=rope, **sizes
            )
        )

    def branches(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """Keyword arguments of a forward with the prompt, and of one without, whose text is as long."""
        torch.manual_seed(1)
        width = self.image // self.height
        if self.family == "wan":
            shared = {
                "hidden_states": torch.randn(1, 16, 1, 2 * self.height, 2 * width),
                "timestep": torch.tensor([500.0]),
            }
        else:
            shared = {
                "hidden_states": torch.randn(1, self.image, 64),
                "timestep": torch.tensor([0.5]),
                "img_shapes": [[(1, self.height, width)]],
            }
        texts = [torch.randn(1, self.text, FEATURES) for _ in range(2)]
        return shared | {"encoder_hidden_states": texts[0]}, shared | {"encoder_hidden_states": texts[1]}

    def shape(self, config: Any) -> Shape:
        """What decides how much is sent."""
        return (of_wan if self.family == "wan" else of_qwen_image)(config, self.text, self.image)


@dataclass
class Found:
    """What one rank has found of one layout."""

    seconds: list[float]
    sent: Bytes
    expected: Bytes
    difference: float


def main() -> None:
    """Run the benchmark and print its table."""
    parser = argparse.ArgumentParser(description="All layouts of some ranks: time, bytes sent, memory.")
    parser.add_argument("--world", type=int, default=2, choices=(2, 4))
    parser.add_argument("--family", default="qwen-image", choices=("qwen-image", "wan"))
    parser.add_argument("--image", type=int, default=1024)
    parser.add_argument("--text", type=int, default=64)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--heads", type=int, default=12)
    parser.add_argument("--head-size", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=7)
    chosen = vars(parser.parse_args())
    world, repeats = chosen.pop("world"), chosen.pop("repeats")
    work = Work(**chosen)
    with tempfile.TemporaryDirectory() as folder:
        model: Any = work.build()
        model.save_pretrained(folder, max_shard_size="200MB")
        print(f"{work.family}: {work.layers} layers, {work.heads} heads of {work.head_size},", end=" ")
        print(f"{work.height} x {work.image // work.height} image and {work.text} text tokens, fp32,", end=" ")
        print(f"{sum(p.nbytes for p in model.parameters()) / MB:.0f} MB;", end=" ")
        print(f"{world} ranks on {os.cpu_count()} cores, {repeats} turns")
        del model
        pool = RankPool(world)
        by_rank = pool.run(ParallelDegrees(ulysses_degree=world), compare, work, repeats)
        pool.stop()
        memory = {name: memory_of(degrees, Path(folder), work) for name, degrees in layouts(world).items()}
        memory[ONE] = memory_of(ParallelDegrees(), Path(folder), work)
    print_table({name: [found[name] for found in by_rank] for name in by_rank[0]}, memory)


def layouts(world: int) -> dict[str, ParallelDegrees]:
    """All layouts of this many ranks by their name; guidance has two branches, so no more groups than two."""
    found = {}
    for cfg, ring, ulysses, tp in itertools.product((1, 2, 4), repeat=4):
        if cfg <= 2 and cfg * ring * ulysses * tp == world:
            sizes = {"cfg": cfg, "tp": tp, "ulysses": ulysses, "ring": ring}
            name = " x ".join(f"{axis} {size}" for axis, size in sizes.items() if size > 1)
            found[name] = ParallelDegrees(
                ulysses_degree=ulysses, ring_degree=ring, tensor_parallel_size=tp, cfg_parallel_size=cfg
            )
    return found


def compare(_: ParallelMesh, work: Work, repeats: int) -> dict[str, Found]:
    """On one rank: every layout's times, traffic and distance from one process's answer."""
    rank, world = dist.get_rank(), dist.get_world_size()
    whole: Any = work.build()
    branches, shape = work.branches(), work.shape(whole.config)
    steps: dict[str, Callable[[], torch.Tensor]] = {}
    expected: dict[str, Bytes] = {ONE: Bytes()}
    for name, degrees in layouts(world).items():
        mesh = ParallelMesh.create(degrees, device_type="cpu", timeout_s=60)
        model = twin(whole)
        parallelize(model, mesh)
        steps[name] = step_of(model, branches, mesh.axis("cfg"))
        expected[name] = predicted(shape, degrees, rank)
    if work.family == "qwen-image":
        name = f"{DIFFUSERS} {world}"
        steps[name] = step_of(tensor_parallel(copy.deepcopy(whole)), branches, ALONE)
        theirs = replace(shape, modulation=())
        expected[name] = predicted(theirs, ParallelDegrees(tensor_parallel_size=world), rank)
    steps[ONE] = step_of(whole, branches, ALONE)

    reference = steps[ONE]()
    found: dict[str, Found] = {}
    for name, step in steps.items():
        difference = error(step(), reference)
        if not difference <= 1e-4:
            raise ValueError(f"{name} differs from one process by {difference:.1e}")
        with Meter() as meter:
            step()
        found[name] = Found([], meter.sent, expected[name], difference)

    order = list(steps)
    shuffled = random.Random(0)  # the same on all ranks; who comes after whom must not matter
    for _turn in range(repeats):
        shuffled.shuffle(order)
        for name in order:
            dist.barrier()
            found[name].seconds.append(timed(steps[name]) if name != ONE or rank == 0 else 0.0)
    return found


def step_of(
    model: nn.Module, branches: tuple[dict[str, Any], dict[str, Any]], axis: MeshAxis
) -> Callable[[], torch.Tensor]:
    """A guided step to be run."""
    return lambda: guided_step(model, branches, axis)


def twin(model: nn.Module) -> nn.Module:
    """A copy that shares the weights, so that many layouts fit into memory."""
    return copy.deepcopy(model, {id(p): p for p in model.parameters()})


def tensor_parallel(model: nn.Module) -> nn.Module:
    """diffusers' own tensor parallelism over all ranks, on CPU."""
    mesh = dist.device_mesh.init_device_mesh("cpu", (dist.get_world_size(),))
    config = TensorParallelConfig(mesh=mesh)
    config.setup(dist.get_rank(), dist.get_world_size(), torch.device("cpu"), mesh)
    with mock.patch.object(rival, "_SUPPORTED_TP_DEVICES", ("cpu",)):
        rival.apply_tensor_parallel(model, config, type(model)._tp_plan)  # type: ignore[attr-defined]
    return model


def memory_of(degrees: ParallelDegrees, folder: Path, work: Work) -> tuple[float, float]:
    """MB of weights held and MB of the peak, of the rank with the highest peak."""
    pool = RankPool(degrees.world_size)  # new processes: memory once used is not always given back
    found = pool.run(degrees, load_and_step, folder, work)
    pool.stop()
    return max(found, key=lambda pair: pair[1])


def load_and_step(mesh: ParallelMesh, folder: Path, work: Work) -> tuple[float, float]:
    """On one rank: MB of weights held, and MB by which the peak rose."""
    branches = work.branches()
    Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from here
    before = status("VmRSS")
    model = load_transformer(folder, mesh, torch.float32)
    guided_step(model, branches, mesh.axis("cfg"))
    return sum(p.nbytes for p in model.parameters()) / MB, status("VmHWM") - before


def print_table(found: dict[str, list[Found]], memory: dict[str, tuple[float, float]]) -> None:
    """A row for each layout, the fastest first."""
    slowest = {name: [max(turn) for turn in zip(*(f.seconds for f in of), strict=True)] for name, of in found.items()}
    names = sorted(slowest, key=lambda name: statistics.median(slowest[name]))
    best = next(name for name in names if name != ONE)
    print(f"\n{'layout':<20} {'s/step':>7} {'least':>7} {'x best':>7}", end="")
    print(f" {'bytes sent':>13} {'by formula':>13} {'':<10} {'held MB':>8} {'peak MB':>8}")
    for name in names:
        sent, expected = (max(sum(each.values()) for each in side) for side in sides(found[name]))
        print(f"{name:<20} {statistics.median(slowest[name]):>7.3f} {min(slowest[name]):>7.3f}", end=" ")
        print(f"{ratio(slowest[name], slowest[best]):>7.2f} {float(sent):>13,.0f} {float(expected):>13,.0f}", end=" ")
        print(f"{verdict(found[name]):<10}", end=" ")
        print("{:>8.0f} {:>8.0f}".format(*memory[name]) if name in memory else f"{'-':>8} {'-':>8}")
    for name in names:
        if name.startswith(DIFFUSERS):
            ours = name.removeprefix("diffusers, ")
            print(f"\n{ours}, ours / diffusers: {ratio(slowest[ours], slowest[name]):.3f}")
    print(f"largest difference from one process: {max(f.difference for of in found.values() for f in of):.1e}")


def sides(found: list[Found]) -> tuple[list[Bytes], list[Bytes]]:
    """What each rank has sent, and what it should have."""
    return [f.sent for f in found], [f.expected for f in found]


def verdict(found: list[Found]) -> str:
    """Whether all ranks sent what the formula says, or by how much one differs in one kind."""
    off = [f.sent[kind] - f.expected[kind] for f in found for kind in {*f.sent, *f.expected}]
    return "equal" if not any(off) else f"{float(max(off, key=abs)):+,.0f}"


def ratio(seconds: list[float], to: list[float]) -> float:
    """The median over the turns."""
    return statistics.median(a / b for a, b in zip(seconds, to, strict=True))


if __name__ == "__main__":
    main()
