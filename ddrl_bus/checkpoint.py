"""Checkpoints that are whole or not there: safetensors for arrays, a JSON manifest with digests, one atomic rename.

    checkpoints/<step, 12 digits>/arrays.safetensors
                                  manifest.json     {"format", "step", "values", "files": {name: {"bytes", "sha256"}},
                                                     "sha256": of the manifest without it}

Written to `tmp-…`, synced, renamed; the rename makes it valid. A run that comes past a step again adds `<step>.001`.
`newest` verifies every byte before it is used and falls back to an older one. Nothing in a checkpoint can name code.
A folder has one writer.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from ddrl_bus.errors import RefusedFileError
from ddrl_bus.transport.wire import Array

FORMAT: Final = 1
_ARRAYS: Final = "arrays.safetensors"
_MANIFEST: Final = "manifest.json"
log = logging.getLogger("ddrl_bus.checkpoint")


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """`arrays` are state; `values` are counters and names, plain JSON."""

    step: int
    arrays: Mapping[str, Array]
    values: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Parts:
    """An array that comes in `parts`, one after the other along its first axis, and is in memory one part at a time."""

    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    parts: Iterable[Array]


def save(folder: Path, checkpoint: Checkpoint, keep: int = 3, parts: Mapping[str, Parts] | None = None) -> Path:
    """Write it under `folder`, sync it to disk, then delete all but the newest `keep`.

    Args:
        parts: more of its arrays, written as they come.

    Raises:
        OSError: the disk refused; what was there before is untouched.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for left_over in folder.glob("tmp-*"):  # of a process that was killed
        shutil.rmtree(left_over, ignore_errors=True)
    final = _free(folder, checkpoint.step)
    temporary = folder / f"tmp-{final.name}"
    temporary.mkdir()
    try:
        whole = {name: Parts(array.dtype, array.shape, (array,)) for name, array in checkpoint.arrays.items()}
        manifest = {
            "format": FORMAT,
            "step": checkpoint.step,
            "values": checkpoint.values,
            "files": {_ARRAYS: _write(temporary / _ARRAYS, _safetensors({**whole, **(parts or {})}))},
        }
        _write(temporary / _MANIFEST, [json.dumps(manifest | {"sha256": _digest(manifest)}, indent=1).encode()])
        _sync(temporary)
        temporary.rename(final)
        _sync(folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    for old in _complete(folder)[:-keep]:
        shutil.rmtree(old, ignore_errors=True)
    return final


def load(path: Path) -> Checkpoint:
    """The checkpoint in the folder `path`, every byte verified.

    Raises:
        RefusedFileError: it is damaged or not one of ours; says what came and what was expected.
    """
    from safetensors.numpy import load as from_bytes

    try:
        manifest = json.loads((path / _MANIFEST).read_bytes())
        data = (path / _ARRAYS).read_bytes()
        form, digest = manifest["format"], manifest.pop("sha256")
        step, values, expected = int(manifest["step"]), dict(manifest["values"]), manifest["files"][_ARRAYS]
        found = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise RefusedFileError(f"{path}: not a whole checkpoint: {type(error).__name__}: {error}") from None
    if form != FORMAT:
        raise RefusedFileError(f"{path}: format {form!r}, this version reads {FORMAT}")
    if digest != _digest(manifest):
        raise RefusedFileError(f"{path / _MANIFEST}: damaged: found sha256 {_digest(manifest)}, expected {digest}")
    if found != expected:
        raise RefusedFileError(f"{path / _ARRAYS}: damaged: found {found}, expected {expected}")
    try:
        arrays = from_bytes(data)
    except Exception as error:  # safetensors' own error type is not part of its documented interface
        raise RefusedFileError(f"{path / _ARRAYS}: {error}") from None
    return Checkpoint(step, arrays, values)


def newest(folder: Path) -> Checkpoint | None:
    """The newest checkpoint that verifies wholly; None if there is none at all.

    Raises:
        RefusedFileError: there are some, and all are damaged.
    """
    damaged = []
    for path in reversed(_complete(folder)):
        try:
            return load(path)
        except RefusedFileError as error:
            log.warning("passed over: %s", error)
            damaged.append(str(error))
    if damaged:
        raise RefusedFileError("no checkpoint is whole: " + "; ".join(damaged))
    return None


def _digest(manifest: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _free(folder: Path, step: int) -> Path:
    """A new name for `step`, after those that it has: nothing is deleted before its successor stands."""
    name = f"{step:012d}"
    taken = [path.name for path in _complete(folder) if path.name.startswith(name)]
    again = 1 + int(taken[-1].partition(".")[2] or 0) if taken else 0
    return folder / (f"{name}.{again:03d}" if again else name)


def _complete(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("[0-9]*") if path.is_dir()) if folder.is_dir() else []


def _safetensors(arrays: Mapping[str, Parts]) -> Iterator[bytes | memoryview]:
    """Their file, bit by bit: the library's own `save` wants all of it in memory, twice. Format: length of the header
    as u64, header, arrays; see huggingface.co/docs/safetensors."""
    header: dict[str, Any] = {}
    end = 0
    for name, array in arrays.items():
        begin, end = end, end + math.prod(array.shape) * array.dtype.itemsize
        kind = "BOOL" if array.dtype.kind == "b" else f"{array.dtype.kind.upper()}{8 * array.dtype.itemsize}"
        header[name] = {"dtype": kind, "shape": array.shape, "data_offsets": (begin, end)}
    text = json.dumps(header).encode()
    yield len(text).to_bytes(8, "little") + text
    for array in arrays.values():
        for part in array.parts:
            yield np.ascontiguousarray(part).reshape(-1).view(np.uint8).data


def _write(path: Path, data: Iterable[bytes | memoryview]) -> dict[str, Any]:
    """Size and digest of what was written."""
    size, digest = 0, hashlib.sha256()
    with path.open("wb") as file:
        for some in data:
            size += file.write(some)
            digest.update(some)
        file.flush()
        os.fsync(file.fileno())
    return {"bytes": size, "sha256": digest.hexdigest()}


def _sync(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
