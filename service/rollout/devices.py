"""The devices of this machine, for local clusters and for `spray check` without a cluster."""

import os
from pathlib import Path


def local_devices() -> dict[str, float]:
    """Devices of this machine by kind: `{"cpu": cores, "cuda": GPUs}`."""
    gpus = len([path for path in Path("/dev").glob("nvidia[0-9]*") if path.name[6:].isdigit()])
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        gpus = min(gpus, len([device for device in visible.split(",") if device.strip() not in ("", "-1")]))
    return {"cpu": float(os.cpu_count() or 1), "cuda": float(gpus)}
