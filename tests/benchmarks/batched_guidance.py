"""What a guided step saves when both branches go through the model in one forward: two forwards and one, in turns.

    python -m tests.benchmarks.batched_guidance [--repeats N] [--tokens 16 64 256 1024] [--ranks 1 2]
        [--models qwen-image wan z-image] [--modes eager compiled] [--device cpu|cuda] [--dtype float32]

Transformers of about 100 million parameters, as in `sp_vs_diffusers`; prompts of 64 tokens. The columns are those of
`replacements`: before is two forwards, after one of twice the batch; the latents are repeated and the prediction is
split in it. Modulation is shared in both, as in a request whose timesteps the model has not seen. On several CPU ranks
(Ulysses, over gloo, one thread each) times are those of the clock on the first rank, else those of the processor.
"""

import argparse
import os

os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")

import torch
import torch.distributed as dist

from sp_core.degrees import ParallelDegrees
from sp_core.mesh import ParallelMesh
from sp_core.parallelize import parallelize
from sp_core.shared_modulation import same_timestep
from sp_core.verify.rank_pool import RankPool
from tests.benchmarks.replacements import Pair, Times, in_turns, report
from tests.benchmarks.sp_vs_diffusers import SHAPES, guided_branches, seeded
from tests.support.guided import batched_step, guided_step


def main() -> None:
    """Run the benchmark and print its table."""
    parser = argparse.ArgumentParser(description="Time of a guided step by two forwards and by one.")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--tokens", nargs="+", type=int, default=[16, 64, 256, 1024])
    parser.add_argument("--models", nargs="+", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--ranks", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--modes", nargs="+", default=["eager"], choices=["eager", "compiled"])
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    chosen = parser.parse_args()
    where = f"{chosen.device}, {chosen.dtype}, load {os.getloadavg()[0]:.1f}"
    print(f"{chosen.repeats} turns; {where}; milliseconds of a guided step")
    print(f"{'':<36} {'before':>8} {'middle half':>17} {'after':>8} {'middle half':>17} {'after/before':>13}")
    pool = RankPool(max(chosen.ranks), chosen.device)
    cells = [(how, size, name) for how in chosen.modes for size in chosen.ranks for name in chosen.models]
    for how, size, name in cells:
        for tokens in chosen.tokens:
            arguments = (name, tokens, chosen.repeats, how == "compiled", chosen.dtype)
            found = pool.run(ParallelDegrees(ulysses_degree=size), measure, *arguments)[0]
            report(f"{name}, {tokens} tokens, {size} rank{'s' * (size > 1)}, {how}", *found)
    pool.stop()


def measure(mesh: ParallelMesh, name: str, tokens: int, turns: int, compiles: bool, dtype: str) -> tuple[Times, Times]:
    """On one rank, milliseconds of both ways."""
    torch.set_default_dtype(getattr(torch, dtype))
    torch.set_grad_enabled(False)
    with torch.device(mesh.device):
        pair = steps(mesh, name, tokens, compiles)
    together = mesh.axis("gang").size > 1
    return in_turns(pair, turns, mesh.device.type, clock=together, before=dist.barrier if together else None)


def steps(mesh: ParallelMesh, name: str, tokens: int, compiles: bool) -> Pair:
    """A guided step of two forwards, and of one, by one model."""
    given = guided_branches(name, tokens)
    model = seeded(SHAPES[name].model)
    parallelize(model, mesh)
    if compiles:
        model.compile_repeated_blocks(fullgraph=True)
    axis = mesh.axis("cfg")

    def apart() -> None:
        with same_timestep():
            guided_step(model, given, axis)

    def together() -> None:
        with same_timestep():
            _, why = batched_step(model, given)
        assert not why, why

    return apart, together


if __name__ == "__main__":
    main()
