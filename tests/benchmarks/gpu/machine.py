"""The head of a file of results: card, driver, versions, date, command. Reads it without loading torch."""

import os
import platform
import subprocess
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

PACKAGES = ("torch", "triton", "diffusers", "transformers", "flash-attn", "flash-attn-3", "ray")

PEAKS = {
    "B200": 2250e12,
    "GH200": 989e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
    "A10": 125e12,
    "RTX 4090": 165e12,
}
"""Dense bf16 FLOP/s that a card's maker promises, by a part of its name; the first that fits."""


def peak(card: str) -> float | None:
    """What the card can do at most, in bf16; None where the table does not know it."""
    return next((flops for part, flops in PEAKS.items() if part in card), None)


def cards() -> list[tuple[str, str, str]]:
    """Name, driver and memory of each GPU of this machine; none where there is no driver."""
    query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
    try:
        said = subprocess.run(query, check=True, capture_output=True, text=True, timeout=60).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    found = [tuple(cell.strip() for cell in line.split(",")) for line in said.splitlines() if line.count(",") == 2]
    return [(name, driver, memory) for name, driver, memory in found]


def head(part: str, command: str, fake: bool) -> str:
    """The lines above the tables."""
    found = cards()
    lines = [f"# GPU: {part}" + (", tried on a CPU" if fake else ""), ""]
    if fake:
        lines += [
            "**On the CPU, with small sizes and no GPU. It shows only that the script works: no number here says how",
            "fast anything is.**",
            "",
        ]
    else:
        lines += [f"{len(found)} x {found[0][0]}, {found[0][2]}, driver {found[0][1]}.", ""]
    lines += [f"{datetime.now():%Y-%m-%d %H:%M}; `{command}`; {_host()}.", _versions()]
    return "\n".join(lines)


def _host() -> str:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return f"{platform.machine()}, {os.cpu_count()} cores, {memory:.0f} GiB, Python {platform.python_version()}"


def _versions() -> str:
    return "; ".join(f"{name} {_version(name)}" for name in PACKAGES) + "."


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "missing"


def free_file(folder: Path, name: str) -> Path:
    """A file of results that is not there yet: what was measured is never overwritten."""
    for number in range(1, 1000):
        file = folder / (f"{name}.md" if number == 1 else f"{name}-{number}.md")
        if not file.exists():
            return file
    raise FileExistsError(f"{folder} has a thousand files called {name}; give another folder")
