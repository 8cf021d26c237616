"""What weight files say of themselves: names, shapes, types and bytes of their tensors, without reading the tensors.

A model folder in diffusers' format comes in; headers come out, or a `ValueError` that names the file, what was found
and what to do. `deploy.memory` sums the bytes up, `service.cli.doctor` verifies the files. Standard library only.

A safetensors file is: 8 bytes, little-endian, the length of the header; the header, a JSON object with each tensor's
type, shape and place; the tensors, without gaps. A model in several files has an index beside them, which says in
which file each tensor lies.
"""

import hashlib
import json
import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

BITS = {
    "F64": 64, "I64": 64, "U64": 64, "C64": 64, "F32": 32, "I32": 32, "U32": 32, "F16": 16, "BF16": 16, "I16": 16,
    "U16": 16, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "I8": 8, "U8": 8,
    "BOOL": 8, "F6_E2M3": 6, "F6_E3M2": 6, "F4": 4,
}  # fmt: skip
"""Bits of an element, by the name of its type in a header."""

MAX_HEADER = 100_000_000
"""Bytes; the format's own bound. A longer one is no header."""

STEMS = ("diffusion_pytorch_model", "model")
"""Names of weight files without their endings: diffusers' and transformers'."""

CHECKSUMS = "SHA256SUMS"

FETCH_AGAIN = "fetch the file again"


@dataclass(frozen=True)
class TensorInfo:
    """A tensor by its header.

    Attributes:
        dtype: the format's name of its type, such as `BF16`.
        shape: its dimensions.
        nbytes: its size in the file, in bytes.
    """

    dtype: str
    shape: tuple[int, ...]
    nbytes: int

    @property
    def elements(self) -> int:
        """The number of its elements."""
        return math.prod(self.shape)

    @property
    def is_floating(self) -> bool:
        """Whether loading casts it to the model's type."""
        return "F" in self.dtype


def read_header(file: Path) -> dict[str, TensorInfo]:
    """The tensors of one safetensors file, by name. The file is verified by its header and its size.

    Raises:
        ValueError: the file cannot be read, is cut short or too long, or its header is none.
    """
    try:
        size = file.stat().st_size
        with file.open("rb") as opened:
            first = opened.read(8)
            length = struct.unpack("<Q", first)[0] if len(first) == 8 else 0
            if not 2 <= length <= min(MAX_HEADER, size - 8):
                raise ValueError(f"{file} has {size} bytes and no safetensors header; {FETCH_AGAIN}")
            content = opened.read(length)
    except OSError as error:
        raise ValueError(f"{file} cannot be read: {error.strerror}; {FETCH_AGAIN}") from None
    try:
        header = json.loads(content)
        assert isinstance(header, dict)
        entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
        tensors = {name: _tensor(entry) for name, entry in entries.items()}
        places = sorted(tuple(entry["data_offsets"]) for entry in entries.values())
    except (ValueError, KeyError, TypeError, AssertionError):
        raise ValueError(f"{file} has a header that is not safetensors'; {FETCH_AGAIN}") from None
    end = _end(file, places)
    if size != 8 + length + end:
        what = "cut short" if size < 8 + length + end else "too long"
        raise ValueError(f"{file} is {what}: {size} bytes, its header says {8 + length + end}; {FETCH_AGAIN}")
    return tensors


def _tensor(entry: Any) -> TensorInfo:
    """An entry of a header.

    Raises:
        ValueError: the tensor's type is unknown, or its size does not follow from its type and shape.
    """
    begin, end = entry["data_offsets"]
    shape = tuple(entry["shape"])
    if entry["dtype"] not in BITS or math.prod(shape) * BITS[entry["dtype"]] != 8 * (end - begin):
        raise ValueError
    return TensorInfo(entry["dtype"], shape, end - begin)


def _end(file: Path, places: list[tuple[int, ...]]) -> int:
    """Where the last tensor ends, if there are no gaps and no overlaps between them."""
    at = 0
    for begin, end in places:
        if begin != at:
            raise ValueError(f"{file} has a header with a gap or an overlap at byte {at} of its data; {FETCH_AGAIN}")
        at = end
    return at


def read_headers(folder: Path) -> dict[str, TensorInfo]:
    """The tensors of one component of a model, by name, from its file or its index with files. All are verified.

    Args:
        folder: such as `transformer` or `text_encoder` of a model folder.

    Raises:
        ValueError: there are no safetensors, a file of the index is missing or damaged, or a tensor is not in the file
            that the index names.
    """
    for stem in STEMS:
        index, file = folder / f"{stem}.safetensors.index.json", folder / f"{stem}.safetensors"
        if index.is_file():
            return _read_indexed(index)
        if file.is_file():
            return read_header(file)
    names = " nor ".join(f"{stem}.safetensors" for stem in STEMS)
    raise ValueError(f"{folder} has neither {names}, nor an index of several; fetch the model again, as safetensors")


def _read_indexed(index: Path) -> dict[str, TensorInfo]:
    try:
        weight_map: dict[str, str] = json.loads(index.read_text())["weight_map"]
        files = sorted(set(weight_map.values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(f"{index} has no weight_map; {FETCH_AGAIN}") from None
    found: dict[str, TensorInfo] = {}
    for name in files:
        file = index.parent / name
        if not file.is_file():
            raise ValueError(f"{file} is missing, but {index.name} names it; {FETCH_AGAIN}")
        tensors = read_header(file)
        listed = {tensor for tensor, where in weight_map.items() if where == name}
        absent = sorted(listed - tensors.keys())
        if absent:
            raise ValueError(f"{file} has no {absent[0]}, but {index.name} says so; fetch both files again")
        found |= {tensor: tensors[tensor] for tensor in listed}
    return found


def component_folders(model: Path) -> dict[str, Path]:
    """Folders of the components of a model that have weights, by name: what `model_index.json` names, and has a config.

    Schedulers and tokenizers have other files.

    Args:
        model: a folder in diffusers' format.

    Raises:
        ValueError: `model_index.json` is missing or no JSON object, or a component has no folder.
    """
    file = model / "model_index.json"
    try:
        index = json.loads(file.read_text())
        named = [name for name, entry in index.items() if isinstance(entry, list) and entry[0]]
    except (OSError, ValueError, AttributeError, IndexError):
        raise ValueError(f"{file} is missing or damaged; set source to a folder in diffusers' format") from None
    absent = [name for name in named if not (model / name).is_dir()]
    if absent:
        raise ValueError(f"{model / absent[0]} is missing, but model_index.json names it; fetch the model again")
    return {name: model / name for name in named if (model / name / "config.json").is_file()}


def verify_weights(model: Path) -> None:
    """Whether the weights of all components are there and whole, by headers and sizes. No tensor is read.

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
        How many files were compared; 0 where the folder has no `SHA256SUMS`.

    Raises:
        ValueError: a file differs or is missing, or a line is no checksum. The message has one line per mistake.
    """
    sums = model / CHECKSUMS
    if not sums.is_file():
        return 0
    mistakes = []
    lines = [line for line in sums.read_text().splitlines() if line.strip()]
    for line in lines:
        expected, _, name = line.partition(" ")
        file = model / name.strip().removeprefix("*")
        if len(expected) != 64 or not name.strip():
            mistakes.append(f"{sums} has a line that is no checksum: {line!r}; write it with sha256sum")
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
