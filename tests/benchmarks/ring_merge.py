"""What merging a hop of the ring costs: by separate operations, as it was once, and in one pass over the outputs.

    python -m tests.benchmarks.ring_merge [--repeats N] [--device cpu|cuda] [--dtype float32 bfloat16]
        [--tokens 1024 4096] [--heads 24] [--head-size 128]

One process, one thread. "Before" and "after" take turns in one run, as in `replacements`, whose columns these are. Each
row is one hop: the part of a new chunk, in the kernel's dtype, is merged into what there is, in fp32.
"""

import argparse
import os

os.environ["OMP_NUM_THREADS"] = "1"

import torch

from sp_core import kernels
from sp_core.kernels import Partial
from tests.benchmarks.replacements import Pair, in_turns, report


def main() -> None:
    """Run the benchmark and print its table."""
    parser = argparse.ArgumentParser(description="Time of one merge of the ring.")
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"], choices=["float32", "bfloat16"])
    parser.add_argument("--tokens", nargs="+", type=int, default=[1024, 4096])
    parser.add_argument("--heads", type=int, default=24)
    parser.add_argument("--head-size", type=int, default=128)
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    where = f"{chosen.device}, load {os.getloadavg()[0]:.1f}"
    print(f"{chosen.repeats} turns, {chosen.heads} heads of {chosen.head_size}; {where}; milliseconds")
    print(f"{'':<36} {'before':>8} {'middle half':>17} {'after':>8} {'middle half':>17} {'after/before':>13}")
    for dtype in chosen.dtype:
        for tokens in chosen.tokens:
            shape = (1, tokens, chosen.heads, chosen.head_size)
            with torch.device(chosen.device):
                pair = merges(shape, getattr(torch, dtype))
            report(f"{tokens} tokens, {dtype}", *in_turns(pair, chosen.repeats, chosen.device))


def merges(shape: tuple[int, ...], dtype: torch.dtype) -> Pair:
    """One hop each way; what is merged is written over, so it stays a mean of the two."""
    before, after = (Partial(torch.randn(shape), torch.randn(shape[:3])) for _ in range(2))
    part = Partial(torch.randn(shape).to(dtype), torch.randn(shape[:3]))
    return lambda: by_separate_operations(before, part), lambda: kernels.merge(after, part)


def by_separate_operations(one: Partial, other: Partial) -> Partial:
    """Two weights, two products and a sum."""
    both = torch.logaddexp(one.lse, other.lse)
    reference = both.masked_fill(torch.isneginf(both), 0)
    weight, other_weight = (torch.exp(lse - reference).unsqueeze(-1) for lse in (one.lse, other.lse))
    return Partial(one.output.float() * weight + other.output.float() * other_weight, both)


if __name__ == "__main__":
    main()
