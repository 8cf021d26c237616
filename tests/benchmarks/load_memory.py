"""Memory of a rank while it loads its share of a transformer, against the bytes that it keeps.

    python -m tests.benchmarks.load_memory [--layers 10]

Writes a Qwen-Image-shaped model of some hundred megabytes with random weights, in shards, and loads it on gloo ranks:
ours, which reads only the rank's share, and diffusers' `from_pretrained` with the weights cut afterwards. The peak is
the rise of the process's highest resident memory during the load.
"""

import argparse
import os
import tempfile
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")

import torch
from diffusers import QwenImageTransformer2DModel

from sp_core.degrees import ParallelDegrees
from sp_core.mesh import ParallelMesh
from sp_core.parallelize import parallelize
from sp_core.verify.rank_pool import RankPool
from workers.model.weights import load_transformer

MB = 2**20


def main() -> None:
    """Run the benchmark and print its table."""
    parser = argparse.ArgumentParser(description="Memory of a rank while it loads its share of a transformer.")
    parser.add_argument("--layers", type=int, default=10)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        model = QwenImageTransformer2DModel(
            in_channels=64, out_channels=16, num_layers=arguments.layers, attention_head_dim=64,
            num_attention_heads=12, joint_attention_dim=256, axes_dims_rope=(8, 28, 28),
        )  # fmt: skip
        model.save_pretrained(folder, max_shard_size="200MB")
        whole = sum(p.nbytes for p in model.parameters())
        shared = whole - _kept(model)
        print(f"a model of {whole / MB:.0f} MB, of which {shared / MB:.0f} MB can be shared out")
        print("ranks  loaded by      held MB   share MB   peak MB   peak / share")
        for size in (1, 2, 4):
            share = (whole - shared + shared / size) / MB
            for how in ("spray", "diffusers"):
                pool = RankPool(size)  # new processes: memory once used is not always given back
                degrees = ParallelDegrees(tensor_parallel_size=size)
                held, peak = max(pool.run(degrees, load, Path(folder), how), key=lambda pair: pair[1])
                pool.stop()
                print(f"{size:>5}  {how:<12} {held:>9.0f} {share:>10.0f} {peak:>9.0f} {peak / share:>14.2f}")


def _kept(model: torch.nn.Module) -> int:
    """Bytes that every rank holds: all that is not a matrix of the attention or of the feed-forward layers."""
    parts = (".attn.to_", ".attn.add_", "_mlp.net.")
    rows = (".to_out.0.bias", ".to_add_out.bias", ".net.2.bias")
    return sum(
        p.nbytes for n, p in model.named_parameters() if not any(part in n for part in parts) or n.endswith(rows)
    )


def load(mesh: ParallelMesh, folder: Path, how: str) -> tuple[float, float]:
    """On one rank: MB of weights held afterwards, and MB by which the peak rose."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from here
    before = status("VmRSS")
    if how == "spray":
        model: torch.nn.Module = load_transformer(folder, mesh, torch.float32)
    else:
        model = QwenImageTransformer2DModel.from_pretrained(folder)
        parallelize(model, mesh)
    return sum(p.nbytes for p in model.parameters()) / MB, status("VmHWM") - before


def status(field: str) -> float:
    """A field of this process's memory, in MB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(float(line.split()[1]) / 1024 for line in lines if line.startswith(field))


if __name__ == "__main__":
    main()
