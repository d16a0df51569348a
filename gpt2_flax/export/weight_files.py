"""Write the weight files of an exported folder: tensors rounded to a dtype, split into shards, and compared.

float32 tensors are written without a copy, except to pytorch_model.bin; other dtypes need a copy of half the size. With
the model itself that is at most twice the memory of its parameters.
"""

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
from gpt2_flax.folders import write_json

Dtype = Literal["float32", "bfloat16", "float16"]
MAX_SHARD_SIZE = 5 * 10**9  # bytes, as in `transformers` 4

_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMG]I?B|)", re.IGNORECASE)


def shard_size(text: str) -> int:
    """Return the bytes of a size such as `2GB`, `500MB` or `1GiB`. Raises `UserError` (USAGE) for other text."""
    found = _SIZE.fullmatch(text.strip())
    size = float(found[1]) * _UNITS[found[2].upper()] if found else 0
    if not 1 <= size < 2**63:
        raise UserError(ExitCode.USAGE, "not a size", quote(text), "give a number and KB, MB or GB, such as 2GB")
    return int(size)


def rounded(state_dict: Mapping[str, np.ndarray], dtype: Dtype, where: object) -> dict[str, np.ndarray]:
    """Return float32 tensors rounded to the nearest number of `dtype`; float32 is not copied.

    Raises:
        UserError: DATA that names the first tensor with a number too large for `dtype`.
    """
    if dtype == "float32":
        return dict(state_dict)
    result = {}
    for name, array in state_dict.items():
        with np.errstate(over="ignore"):
            result[name] = array.astype(numpy_dtype(dtype))
        if not np.array_equal(np.isinf(result[name]), np.isinf(array)):
            what = f"{name} holds numbers too large for {dtype}"
            raise UserError(ExitCode.DATA, what, where, "export as bfloat16 or float32")
    return result


def numpy_dtype(dtype: Dtype) -> np.dtype:
    """Return the numpy dtype of a name; numpy itself does not know bfloat16."""
    return np.dtype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)


def write_safetensors(folder: Path, state_dict: Mapping[str, np.ndarray], max_shard_size: int) -> None:
    """Write model.safetensors, or shards of at most `max_shard_size` bytes and their index.

    A larger tensor has a shard of its own. `folder` holds config.json already. Raises `UserError` (IO) on failure.
    """
    shards = list(_shards(state_dict, max_shard_size))
    if len(shards) == 1:
        _write_shard(folder / WEIGHTS, shards[0])
        return
    weight_map = {}
    for number, shard in enumerate(shards, start=1):
        name = f"model-{number:05}-of-{len(shards):05}.safetensors"
        _write_shard(folder / name, shard)
        weight_map |= dict.fromkeys(shard, name)
    arrays = state_dict.values()
    metadata = {"total_parameters": sum(a.size for a in arrays), "total_size": sum(a.nbytes for a in arrays)}
    index = {"metadata": metadata, "weight_map": dict(sorted(weight_map.items()))}
    write_json(folder / INDEX, index)


def write_torch(folder: Path, state_dict: Mapping[str, np.ndarray]) -> None:
    """Write pytorch_model.bin. Raises `UserError`: USAGE if torch is not installed, IO if writing failed."""
    path = folder / TORCH_WEIGHTS
    try:
        import torch
    except ImportError:
        raise missing_package(TORCH_WEIGHTS, "torch", "export", path) from None

    def tensor(array: np.ndarray) -> torch.Tensor:
        array = array.copy() if array.base is not None else array  # torch would save the whole stack behind a view
        if array.dtype == ml_dtypes.bfloat16:  # torch does not convert it from numpy
            return torch.from_numpy(array.view(np.uint16)).view(torch.bfloat16)
        return torch.from_numpy(array)

    try:
        torch.save({name: tensor(array) for name, array in state_dict.items()}, path)
    except RuntimeError as error:  # torch raises it in place of an OSError
        raise _not_written(folder, error) from None


def compare_safetensors(folder: Path, state_dict: Mapping[str, np.ndarray]) -> None:
    """Raise `UserError` (IO) unless the safetensors files of `folder` hold exactly these tensors, bit for bit."""
    with open_tensors(folder) as tensors:
        for name in sorted(tensors.keys() | state_dict.keys()):
            ours, theirs = state_dict.get(name), tensors.get(name)
            if ours is None or theirs is None or theirs.dtype != ours.dtype or not _same_bits(ours, theirs.load()):
                fix = "check the disk, then run the same command again"
                raise UserError(ExitCode.IO, f"what was written differs from the model: {name}", folder, fix)


def _shards(state_dict: Mapping[str, np.ndarray], limit: int) -> Iterator[dict[str, np.ndarray]]:
    shard, size = {}, 0
    for name, array in state_dict.items():
        if shard and size + array.nbytes > limit:
            yield shard
            shard, size = {}, 0
        shard[name] = array
        size += array.nbytes
    yield shard


def _write_shard(path: Path, tensors: dict[str, np.ndarray]) -> None:
    try:
        save_file(tensors, path, metadata={"format": "pt"})
    except SafetensorError as error:  # raised in place of an OSError
        raise _not_written(path.parent, error) from None
    # safetensors makes files that only the owner can read; give the file the mode of config.json.
    path.chmod((path.parent / CONFIG).stat().st_mode)


def _not_written(folder: Path, error: Exception) -> UserError:
    fix = f"free some space and run the same command again ({error})"
    return UserError(ExitCode.IO, "weights could not be written", folder, fix)


def _same_bits(one: np.ndarray, other: np.ndarray) -> bool:
    return one.shape == other.shape and np.array_equal(one.view(f"u{one.itemsize}"), other.view(f"u{one.itemsize}"))
