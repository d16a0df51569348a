"""The weight files of an exported folder: numbers rounded to a type, tensors spread over shards, written and compared.

Memory: float32 tensors are written where they lie, but pytorch_model.bin needs a copy; other types are half-sized
copies. With the model itself that is at most twice its parameters.
"""

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Literal

import ml_dtypes
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import save_file

from gpt2_flax.checkpoint.huggingface import CONFIG
from gpt2_flax.checkpoint.tensor_files import INDEX, TORCH_WEIGHTS, WEIGHTS, open_tensors
from gpt2_flax.errors import ExitCode, UserError, missing_package, quote

Dtype = Literal["float32", "bfloat16", "float16"]
MAX_SHARD_SIZE = 5 * 10**9
"""Bytes; `transformers` 4 cuts there too."""

_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMG]I?B|)", re.IGNORECASE)


def shard_size(text: str) -> int:
    """Returns the bytes of a size such as `2GB`, `500MB` or `1GiB`. Raises `UserError` (USAGE) for anything else."""
    found = _SIZE.fullmatch(text.strip())
    size = float(found[1]) * _UNITS[found[2].upper()] if found else 0
    if not 1 <= size < 2**63:
        raise UserError(ExitCode.USAGE, "not a size", quote(text), "give a number and KB, MB or GB, such as 2GB")
    return int(size)


def rounded(state_dict: Mapping[str, np.ndarray], dtype: Dtype, where: object) -> dict[str, np.ndarray]:
    """Returns float32 tensors in `dtype`, each rounded to the nearest; what is in `dtype` already is not copied.

    Raises `UserError` (DATA) naming the first tensor with a number that is too large for `dtype`.
    """
    return {name: _rounded(name, array, dtype, where) for name, array in state_dict.items()}


def numpy_dtype(dtype: Dtype) -> np.dtype:
    """Returns the numpy type of that name, which numpy alone does not know for bfloat16."""
    return np.dtype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)


def write_safetensors(folder: Path, state_dict: Mapping[str, np.ndarray], max_shard_size: int) -> None:
    """Writes model.safetensors, or shards of at most `max_shard_size` bytes of data and their index.

    `folder` holds config.json already. A tensor that is larger has a shard of its own. Raises `UserError` (IO) when it
    cannot be written.
    """
    shards = list(_shards(state_dict, max_shard_size))
    if len(shards) == 1:
        _save(folder / WEIGHTS, shards[0])
        return
    weight_map = {}
    for number, shard in enumerate(shards, start=1):
        name = f"model-{number:05}-of-{len(shards):05}.safetensors"
        _save(folder / name, shard)
        weight_map |= dict.fromkeys(shard, name)
    sizes = [(array.size, array.nbytes) for array in state_dict.values()]
    metadata = {"total_parameters": sum(size for size, _ in sizes), "total_size": sum(n_bytes for _, n_bytes in sizes)}
    index = {"metadata": metadata, "weight_map": dict(sorted(weight_map.items()))}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def write_torch(folder: Path, state_dict: Mapping[str, np.ndarray]) -> None:
    """Writes pytorch_model.bin. Raises `UserError`: USAGE when torch is not installed, IO when it cannot be written."""
    path = folder / TORCH_WEIGHTS
    try:
        import torch
    except ImportError:
        raise missing_package(TORCH_WEIGHTS, "torch", "export", path) from None

    def tensor(array: np.ndarray) -> torch.Tensor:
        array = array.copy() if array.base is not None else array  # a view would bring the whole stack of its layer
        if array.dtype == ml_dtypes.bfloat16:  # which torch does not take from numpy
            return torch.from_numpy(array.view(np.uint16)).view(torch.bfloat16)
        return torch.from_numpy(array)

    try:
        torch.save({name: tensor(array) for name, array in state_dict.items()}, path)
    except RuntimeError as error:  # what torch makes of an OSError
        raise _not_written(folder, error) from None


def compare_safetensors(folder: Path, state_dict: Mapping[str, np.ndarray]) -> None:
    """Raises `UserError` (IO) unless the safetensors files of `folder` hold exactly these tensors, bit for bit."""
    with open_tensors(folder) as tensors:
        for name in sorted(tensors.keys() | state_dict.keys()):
            ours, theirs = state_dict.get(name), tensors.get(name)
            if ours is None or theirs is None or theirs.dtype != ours.dtype or not _same(ours, theirs.load()):
                fix = "check the disk, then run the same command again"
                raise UserError(ExitCode.IO, f"what was written differs from the model: {name}", folder, fix)


def _rounded(name: str, array: np.ndarray, dtype: Dtype, where: object) -> np.ndarray:
    if dtype == "float32":
        return array
    with np.errstate(over="ignore"):
        result = array.astype(numpy_dtype(dtype))
    if not np.array_equal(np.isinf(result), np.isinf(array)):
        what = f"{name} holds numbers too large for {dtype}"
        raise UserError(ExitCode.DATA, what, where, "export as bfloat16 or float32")
    return result


def _shards(state_dict: Mapping[str, np.ndarray], limit: int) -> Iterator[dict[str, np.ndarray]]:
    shard, size = {}, 0
    for name, array in state_dict.items():
        if shard and size + array.nbytes > limit:
            yield shard
            shard, size = {}, 0
        shard[name] = array
        size += array.nbytes
    yield shard


def _save(path: Path, tensors: dict[str, np.ndarray]) -> None:
    try:
        save_file(tensors, path, metadata={"format": "pt"})
    except SafetensorError as error:  # what it makes of an OSError
        raise _not_written(path.parent, error) from None
    # safetensors keeps its files from all others; this one is as readable as its neighbours.
    path.chmod((path.parent / CONFIG).stat().st_mode)


def _not_written(folder: Path, error: Exception) -> UserError:
    fix = f"free some space and run the same command again ({error})"
    return UserError(ExitCode.IO, "weights could not be written", folder, fix)


def _same(one: np.ndarray, other: np.ndarray) -> bool:
    """Bit for bit, also where they are not numbers."""
    return one.shape == other.shape and np.array_equal(one.view(f"u{one.itemsize}"), other.view(f"u{one.itemsize}"))
