"""Memory of each rank with the text encoder and the VAE on rank 0 or on all, for the same picture.

    python -m tests.benchmarks.encoder_memory

Writes the demo model with a text encoder of some hundred megabytes, loads it on two gloo ranks and draws one picture.
Held: the bytes of all weights on the rank. Peak: the rise of the process's highest resident memory, from before the
load to after the picture.
"""

import os
import tempfile
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")

import torch
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from sp_core.degrees import ParallelDegrees
from sp_core.mesh import ParallelMesh
from sp_core.verify.rank_pool import RankPool
from tests.benchmarks.load_memory import status
from tests.support.deployments import model
from workers.messages import GenerationRequest
from workers.model.adapters import qwen_image
from workers.model.denoising import Denoising
from workers.model.loader import load_model

MB = 2**20
REQUEST = GenerationRequest("a", "demo", "a cup of coffee", width=64, height=64, num_inference_steps=2, seed=1)


def main() -> None:
    """Run the benchmark and print its table."""
    with tempfile.TemporaryDirectory() as folder:
        write_model(Path(folder))
        print("text_encoder  vae     rank   held MB   peak MB   same picture")
        reference = None
        for text_encoder, vae in (("replicate", "all"), ("rank0", "all"), ("rank0", "rank0")):
            pool = RankPool(2)  # new processes: memory once used is not always given back
            options = {"text_encoder": text_encoder, "vae": vae}
            found = pool.run(ParallelDegrees(ulysses_degree=2), draw, Path(folder), options)
            pool.stop()
            reference = found[0][2] if reference is None else reference
            for rank, (held, peak, latents) in enumerate(found):
                same = "yes" if torch.equal(latents, reference) else "NO"
                print(f"{text_encoder:<12}  {vae:<6} {rank:>5} {held:>9.0f} {peak:>9.0f}   {same}")


def write_model(folder: Path) -> None:
    """The demo model, its text encoder much wider."""
    pipeline = qwen_image.demo_pipeline()
    config = pipeline.text_encoder.config.to_dict()
    config["text_config"]["intermediate_size"] = 2**18
    pipeline.text_encoder = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig.from_dict(config)).eval()
    pipeline.save_pretrained(folder)


def draw(mesh: ParallelMesh, folder: Path, options: dict[str, Any]) -> tuple[float, float, torch.Tensor]:
    """On one rank: MB of weights held, MB by which the peak rose, and the latents."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from here
    before = status("VmRSS")
    spec = model(folder, ulysses_degree=mesh.degrees.ulysses_degree).model_copy(update=options)
    loaded = load_model(spec, mesh)
    denoising = Denoising(loaded, REQUEST)
    denoising.encode()
    denoising.share_encoded()
    denoising.prepare()
    while not denoising.done:
        denoising.step()
    denoising.finish()
    modules = [part for part in loaded.pipeline.components.values() if isinstance(part, torch.nn.Module)]
    held = sum(p.nbytes for part in modules for p in part.parameters() if p.device.type != "meta")
    return held / MB, status("VmHWM") - before, denoising.latents


if __name__ == "__main__":
    main()
