"""The headers of weight files: names, shapes, types and bytes of their tensors. No tensor is read.

A model folder in diffusers' format comes in; headers come out, or a `ValueError` that names the file, what is wrong and
what to do. `deploy.memory` adds the bytes up, `service.cli.doctor` and `workers.model.files` verify the files.
"""

import hashlib
import math
import re
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open

from deploy.model_folder import component_folders, read_config, read_json

STEMS = ("diffusion_pytorch_model", "model")
"""Names of weight files without their endings: diffusers' and transformers'."""

CHECKSUMS = "SHA256SUMS"
"""Optional, beside the index of a model; written by `sha256sum`."""

FETCH_AGAIN = "fetch the file again"


@dataclass(frozen=True)
class TensorInfo:
    """A tensor by its header.

    Attributes:
        dtype: the format's name of its type, such as `BF16` or `F8_E4M3`.
        shape: its dimensions.
    """

    dtype: str
    shape: tuple[int, ...]

    @property
    def elements(self) -> int:
        """How many elements it has."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Its size in the file, in bytes."""
        bits = re.search(r"\d+", self.dtype)
        return self.elements * (int(bits[0]) if bits else 8) // 8  # BOOL alone has no number: a byte

    @property
    def is_floating(self) -> bool:
        """True if loading casts it to the model's type."""
        return "F" in self.dtype


def read_header(file: Path) -> dict[str, TensorInfo]:
    """The tensors of one safetensors file, by name. The library verifies that header and size agree.

    Raises:
        ValueError: the file cannot be read, or is not whole.
    """
    try:
        with safe_open(file, framework="np") as opened:
            slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118  # not a mapping
            return {name: TensorInfo(part.get_dtype(), tuple(part.get_shape())) for name, part in slices.items()}
    except SafetensorError as error:
        size, what = file.stat().st_size, str(error).removeprefix("Error while deserializing header: ")
        raise ValueError(f"{file} ({size} bytes) is not a whole safetensors file: {what}; {FETCH_AGAIN}") from None
    except OSError as error:
        raise ValueError(f"{file} cannot be read: {error.strerror or error}; {FETCH_AGAIN}") from None


def read_headers(folder: Path) -> dict[str, TensorInfo]:
    """The tensors of one component of a model, by name, from its file or its index with files. All are verified.

    Args:
        folder: such as `transformer` or `text_encoder` of a model folder.

    Raises:
        ValueError: see `weights_file`; a file of the index is missing or damaged, or a tensor is not in the file that
            the index names.
    """
    return {name: info for tensors in headers_by_file(folder).values() for name, info in tensors.items()}


def headers_by_file(folder: Path) -> dict[Path, dict[str, TensorInfo]]:
    """The same, by file.

    Raises:
        ValueError: see `read_headers`.
    """
    file = weights_file(folder)
    return _read_indexed(file) if file.suffix == ".json" else {file: read_header(file)}


def weights_file(folder: Path) -> Path:
    """The one file of a component's weights, or the index of several.

    Libraries differ in which they prefer, so there must not be both.

    Raises:
        ValueError: there is none, or not exactly one.
    """
    config = folder / "config.json"
    by_diffusers = read_config(config).get("_class_name") if config.exists() else None
    stems = STEMS if not config.exists() else STEMS[:1] if by_diffusers else STEMS[1:]
    names = [f"{stem}.safetensors" for stem in stems]
    there = [file for name in names for file in (folder / f"{name}.index.json", folder / name) if file.is_file()]
    if not there:
        neither = f"neither {' nor '.join(names)}," if len(names) > 1 else f"no {names[0]},"
        raise ValueError(f"{folder} has {neither} nor an index of several; fetch the model again, as safetensors")
    if len(there) > 1:
        raise ValueError(
            f"{folder} has both {there[0].name} and {there[1].name}, which may hold different weights; remove the one "
            "that is not the model's"
        )
    return there[0]


def _read_indexed(index: Path) -> dict[Path, dict[str, TensorInfo]]:
    try:
        weight_map: dict[str, str] = read_json(index)["weight_map"]
        files = sorted(set(weight_map.values()))
        if not all(isinstance(name, str) for name in files):
            raise TypeError("a file's name is a text")
    except (KeyError, TypeError, AttributeError):
        raise ValueError(f"{index} has no weight_map; {FETCH_AGAIN}") from None
    found: dict[Path, dict[str, TensorInfo]] = {}
    for name in files:
        file = index.parent / name
        if not file.is_file():
            raise ValueError(f"{file} is missing, but {index.name} names it; {FETCH_AGAIN}")
        tensors = read_header(file)
        listed = {tensor for tensor, where in weight_map.items() if where == name}
        absent = sorted(listed - tensors.keys())
        if absent:
            raise ValueError(f"{file} does not contain {absent[0]}, but {index.name} says so; fetch both files again")
        surplus = sorted(tensors.keys() - listed)
        if surplus:
            raise ValueError(f"{file} contains {surplus[0]}, but {index.name} does not say so; fetch both files again")
        found[file] = tensors
    return found


def verify_weights(model: Path) -> None:
    """Reject a model whose weights are not all there and whole, by headers and sizes.

    Args:
        model: a folder in diffusers' format.

    Raises:
        ValueError: something is missing or damaged. The message has one line per component.
    """
    mistakes = []
    for folder in component_folders(model).values():
        try:
            read_headers(folder)
        except ValueError as error:
            mistakes.append(str(error))
    if mistakes:
        raise ValueError("\n".join(mistakes))


def verify_checksums(model: Path) -> int:
    """Compare every file that `SHA256SUMS` in the folder names with its checksum. Reads all of them.

    Returns:
        How many files were compared; 0 without a `SHA256SUMS`.

    Raises:
        ValueError: a file differs or is missing, or a line is not a checksum. The message has one line per mistake.
    """
    sums = model / CHECKSUMS
    if not sums.is_file():
        return 0
    mistakes = []
    lines = [line for line in sums.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    for line in lines:
        expected, _, name = line.partition(" ")
        file = model / name.strip().removeprefix("*")
        if len(expected) != 64 or not name.strip():
            mistakes.append(f"{sums} has a line that is not a checksum: {line!r}; write it with sha256sum")
        elif not file.is_file():
            mistakes.append(f"{file} is missing, but {CHECKSUMS} names it; {FETCH_AGAIN}")
        else:
            with file.open("rb") as opened:
                found = hashlib.file_digest(opened, "sha256").hexdigest()
            if found != expected.lower():
                mistakes.append(f"{file} has the checksum {found}, {CHECKSUMS} says {expected}; {FETCH_AGAIN}")
    if mistakes:
        raise ValueError("\n".join(mistakes))
    return len(lines)
