"""Open the weight files of a `transformers` folder without trusting them: names, shapes and dtypes before any data.

A folder holds model.safetensors, shards named in model.safetensors.index.json, pytorch_model.bin, or its shards.
"""

import contextlib
import sys
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes  # noqa: F401 - registers bfloat16 with numpy, which safetensors needs to return such a tensor
import numpy as np
from safetensors import SafetensorError, safe_open

from gpt2_flax.checkpoint.checksums import check_sums
from gpt2_flax.errors import ExitCode, UserError, missing_package, quote
from gpt2_flax.input_files import read_object

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
TORCH_WEIGHTS = "pytorch_model.bin"
TORCH_INDEX = "pytorch_model.bin.index.json"

MAX_HEADER = MAX_INDEX = 16 * 2**20  # bytes
MAX_TENSORS = 10_000
MAX_INDEX_ENTRIES = 100_000

_SAFETENSORS_TYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_WRAPPERS = ("module.", "_orig_mod.")  # prefixes by DistributedDataParallel and torch.compile
_FIX = "copy or download it again"


class Tensor(NamedTuple):
    """A tensor that has not been read yet; `dtype` is its name in numpy, or in the file if numpy has none."""

    shape: tuple[int, ...]
    dtype: str
    load: Callable[[], np.ndarray]


@contextlib.contextmanager
def open_tensors(folder: Path) -> Iterator[dict[str, Tensor]]:
    """Yield every tensor of a folder by its name in a plain model. Load tensors inside the block.

    Raises:
        UserError: NO_INPUT if there are no weights; DATA for a damaged or hostile file; USAGE if torch is needed and
            not installed.
    """
    kinds = (WEIGHTS, INDEX, TORCH_WEIGHTS, TORCH_INDEX)
    name = next((name for name in kinds if (folder / name).is_file()), None)
    if name is None:
        fix = f"it should have {WEIGHTS}, {TORCH_WEIGHTS}, or one of them in shards with an index"
        raise UserError(ExitCode.NO_INPUT, "no weights in folder", folder, fix)
    index = _read_index(folder / name) if name in (INDEX, TORCH_INDEX) else None
    files = [name] if index is None else sorted(set(index.values()))
    check_sums(folder, dict.fromkeys([name, *files]))
    with ExitStack() as stack:
        tensors, where = {}, {}
        for file in files:
            if name in (WEIGHTS, INDEX):
                found = _safetensors_tensors(folder / file, stack)
            else:
                fix = "use a model.safetensors file instead"
                found = torch_tensors(read_torch(folder / file, fix), folder / file, fix)
            tensors |= found
            where |= dict.fromkeys(found, file)
        if index is not None and (wrong := sorted(where.items() ^ index.items())):
            what = f"{len(wrong)} names differ between index and shards, first {quote(wrong[0][0])}"
            raise UserError(ExitCode.DATA, what, folder / name, _FIX)
        yield unwrapped(tensors)
    if name in (TORCH_WEIGHTS, TORCH_INDEX):  # at the end, because an error says more
        print(f"note: {folder} has no {WEIGHTS}; {name} was read, and no code in it was run", file=sys.stderr)


def check_tensors(
    tensors: Mapping[str, Tensor], expected: Mapping[str, tuple[int, ...]], optional: str, misfit: str, where: object
) -> None:
    """Compare the names, shapes and dtypes of tensors with the `expected` shapes.

    Args:
        optional: The name of a tensor that may be missing.
        misfit: The beginning of the error message.

    Raises:
        UserError: DATA that names the first tensors that are missing, surplus, or of another shape or dtype.
    """
    problems = []
    for name in sorted(expected.keys() | tensors.keys()):
        tensor, shape = tensors.get(name), expected.get(name)
        if tensor is None:
            if name != optional:
                problems.append(f"{name} missing, {shape} expected")
        elif shape is None:
            problems.append(f"{quote(name)} {tensor.shape} not expected")
        elif tensor.shape != shape:
            problems.append(f"{name} {tensor.shape}, {shape} expected")
        elif tensor.dtype not in ("float32", "float16", "bfloat16"):
            problems.append(f"{name} {quote(tensor.dtype)}, float32, float16 or bfloat16 expected")
    if problems:
        more = f" and {len(problems) - 5} more" if len(problems) > 5 else ""
        what = f"{misfit}: {'; '.join(problems[:5])}{more}"
        raise UserError(ExitCode.DATA, what, where, "weights and config are of different models, or damaged")


def _read_index(path: Path) -> dict[str, str]:
    """Return the shard name of each tensor; every shard is a plain file beside the index."""
    names = read_object(path, MAX_INDEX).get("weight_map")
    if not isinstance(names, dict) or not names or len(names) > MAX_INDEX_ENTRIES:
        what = f"weight_map is not an object of 1 to {MAX_INDEX_ENTRIES} names"
        raise UserError(ExitCode.DATA, what, path, _FIX)
    checked = set()
    for name in names.values():
        if isinstance(name, str) and name in checked:
            continue
        # transformers follows `..` here, so a downloaded index could name any file of the machine.
        if not isinstance(name, str) or name in ("", ".", "..") or set(name) & set("/\\\0"):
            raise UserError(ExitCode.DATA, f"not a plain file name: {quote(name)}", path, "do not use this folder")
        shard = path.with_name(name)
        if shard.is_symlink() or not shard.is_file():
            raise UserError(ExitCode.DATA, f"shard missing or not a plain file: {quote(name)}", path, _FIX)
        checked.add(name)
    return names


def _safetensors_tensors(path: Path, stack: ExitStack) -> dict[str, Tensor]:
    with open(path, "rb") as file:
        header_size = int.from_bytes(file.read(8), "little")
    if header_size > MAX_HEADER:
        what = f"header of {header_size} bytes where {MAX_HEADER} are allowed"
        raise UserError(ExitCode.DATA, what, path, f"not a safetensors file, or damaged: {_FIX}")
    try:
        file = stack.enter_context(safe_open(path, framework="numpy"))
    except SafetensorError as error:
        raise UserError(ExitCode.DATA, f"damaged safetensors file ({quote(str(error))})", path, _FIX) from None
    names = file.keys()
    if len(names) > MAX_TENSORS:
        what = f"{len(names)} tensors where {MAX_TENSORS} are allowed"
        raise UserError(ExitCode.DATA, what, path, "not a GPT-2 model")
    tensors = {}
    for name in names:
        header = file.get_slice(name)
        dtype = str(header.get_dtype())
        shape = tuple(header.get_shape())
        tensors[name] = Tensor(shape, _SAFETENSORS_TYPES.get(dtype, dtype), partial(file.get_tensor, name))
    return tensors


def read_torch(path: Path, fix: str) -> dict[Any, Any]:
    """Return the dict in a file by torch.save. No code in the file runs; data is read when a tensor is loaded.

    Raises:
        UserError: DATA, with the advice `fix`, for a damaged or hostile file; USAGE if torch is not installed.
    """
    try:
        import torch
    except ImportError:
        raise missing_package(f"reading {path.name}", "torch", "export", path) from None
    try:
        # mmap: shapes are known before data is read. Files by torch before 1.6 are no zip files and are read whole.
        if mapped := zipfile.is_zipfile(path):
            _check_archive(path)
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except Exception as error:  # the type depends on where the file is damaged
        first_line = str(error).partition("\n")[0]
        what = f"damaged or unsafe PyTorch file ({type(error).__name__}: {quote(first_line)})"
        raise UserError(ExitCode.DATA, what, path, fix) from None
    if not isinstance(content, dict):
        raise UserError(ExitCode.DATA, f"not a state dict of at most {MAX_TENSORS} tensors", path, fix)
    return content


def _check_archive(path: Path) -> None:
    """Raise ValueError for a zip file that expands when it is read; torch.save compresses nothing."""
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
    if any(member.compress_type != zipfile.ZIP_STORED for member in members):
        raise ValueError("it is compressed, as torch.save never does")
    if sum(member.file_size for member in members) > path.stat().st_size:
        raise ValueError("its members are larger than the file")
    names = max((member.file_size for member in members if member.filename.endswith("data.pkl")), default=0)
    if names > MAX_HEADER:
        raise ValueError(f"data.pkl has {names} bytes where {MAX_HEADER} are allowed")


def torch_tensors(state_dict: Any, path: Path, fix: str) -> dict[str, Tensor]:
    """Return the tensors of a state dict from the file `path`. Raises `UserError` as `read_torch`."""
    import torch

    if not isinstance(state_dict, dict) or len(state_dict) > MAX_TENSORS:
        raise UserError(ExitCode.DATA, f"not a state dict of at most {MAX_TENSORS} tensors", path, fix)
    tensors, size = {}, path.stat().st_size
    for name, tensor in state_dict.items():
        if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
            raise UserError(ExitCode.DATA, f"not a tensor: {quote(name)}", path, fix)
        if tensor.layout != torch.strided or tensor.device.type != "cpu":
            raise UserError(ExitCode.DATA, f"tensor without its numbers: {quote(name)}", path, fix)
        if tensor.nbytes > size:  # strides of 0 give one number any size
            raise UserError(ExitCode.DATA, f"{quote(name)} {tuple(tensor.shape)} is larger than the file", path, fix)
        dtype = str(tensor.dtype).removeprefix("torch.")
        tensors[name] = Tensor(tuple(tensor.shape), dtype, lambda tensor=tensor: tensor.detach().float().numpy())
    return tensors


def unwrapped(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors without a prefix that DistributedDataParallel or torch.compile gave to all names."""
    for prefix in _WRAPPERS:
        if tensors and all(name.startswith(prefix) for name in tensors):
            return unwrapped({name.removeprefix(prefix): tensor for name, tensor in tensors.items()})
    return tensors


def check_finite(name: str, array: np.ndarray, where: object) -> None:
    """Raise `UserError` (DATA) that counts the numbers of a tensor that are NaN or infinite."""
    if count := array.size - np.count_nonzero(np.isfinite(array)):
        what = f"weights are not finite: {count} of the {array.size} numbers of {name} are NaN or infinite"
        raise UserError(ExitCode.DATA, what, where, "use an earlier checkpoint of that training")
