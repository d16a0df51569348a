"""The checkpoints of a run, written with orbax: `checkpoints/STEP/` with the items `model`, `opt_state` and `meta`.

Arrays are stored under their paths (`h/attn/c_attn/kernel`), so the format does not depend on classes of the framework.
Orbax commits a step by renaming its folder. `meta` holds a checksum of every array (see `step_meta`), and every reader
computes the checksums again. A step that differs is damaged, and the next older step is read in its place.
"""

import contextlib
import errno
import logging
import os
import re
import shutil
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar, cast

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from flax.traverse_util import unflatten_dict
from jax.experimental import multihost_utils

from gpt2_flax.checkpoint.device_checksum import checksums
from gpt2_flax.checkpoint.run_folder import set_aside
from gpt2_flax.checkpoint.step_meta import (
    PASSING,
    VALIDATION_LOSS,
    DamagedCheckpoint,
    committed_steps,
    read_meta,
    sealed,
)
from gpt2_flax.errors import ExitCode, UserError, io_error
from gpt2_flax.memory import out_of_memory
from gpt2_flax.parallel.rules import path_of
from gpt2_flax.progress import si

for _name in ("absl", "asyncio"):  # errors that they log are raised too; asyncio also logs their consequences
    logging.getLogger(_name).setLevel(logging.CRITICAL)
warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)  # another consequence

# Replicas write slices of large arrays only: for each slice of a small array, the first save would compile a program.
cast("Any", ocp.type_handlers.get_type_handler(jax.Array))._min_slice_bytes_for_replica_parallel = 2**20

T = TypeVar("T")
_MESSAGE_BYTES = 300  # the length of the messages that processes exchange
_LEFTOVERS = ("*.orbax-checkpoint-tmp*", "*.deleted")  # from a save or a deletion that was killed


class CheckpointStore:
    """Saves in the background, and restores the newest step that is not damaged, in any sharding.

    All processes of a run call the same methods. Use the store as a context: at its end the store waits for the last
    save.

    Args:
        keep: How many of the newest steps to keep. Without it the store only reads.
        keep_best: How many steps with the lowest validation loss to keep.
        keep_every: Keep every step that is a multiple of this number, unless it is 0.
        tell: Prints a warning.
    """

    def __init__(
        self,
        folder: Path,
        keep: int | None = None,
        keep_best: int = 0,
        keep_every: int = 0,
        tell: Callable[[str], object] = print,
    ):
        self.folder, self._tell = folder, tell
        self._keep, self._keep_best, self._keep_every = keep or 0, keep_best, keep_every
        self._saving: int | None = None
        self._failure: Exception | None = None
        self._size = 0  # bytes of the arrays saved last
        self._reader, self._writer = ocp.StandardCheckpointHandler(), None
        if keep is not None:
            if jax.process_index() == 0:
                folder.mkdir(parents=True, exist_ok=True)
                self._remove_leftovers()
            if jax.process_count() > 1:
                multihost_utils.sync_global_devices("checkpoints")
            handlers: dict[str, Any] = {item: ocp.StandardCheckpointHandler() for item in ("model", "opt_state")}
            handlers["meta"] = ocp.JsonCheckpointHandler()
            self._writer = ocp.AsyncCheckpointer(ocp.CompositeCheckpointHandler(**handlers))

    def __enter__(self) -> "CheckpointStore":
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if not self._writer:
            return
        # The user must read the first error: on a full disk these calls fail too.
        with contextlib.suppress(*((Exception,) if error else ())):
            if not error:
                self.seal(must=True)
            self._writer.close()

    def steps(self) -> list[int]:
        """Return the committed steps, ascending."""
        return committed_steps(self.folder)

    def meta(self, step: int) -> dict[str, Any]:
        """Return the metadata of a step. Raises `DamagedCheckpoint`."""
        return _together(lambda: read_meta(self.folder / str(step), step))

    def save(self, step: int, model: Any, opt_state: Any | None, meta: Mapping[str, Any]) -> None:
        """Start to write a step, and return when the arrays may change; `seal` ends it, before the next save."""
        if self._writer is None:
            raise RuntimeError("this store only reads")
        trees = {"model": model} if opt_state is None else {"model": model, "opt_state": opt_state}
        leaves = _by_path(trees)
        self._size = sum(leaf.nbytes for leaf in leaves.values())
        arrays = {
            path: {"shape": list(leaves[path].shape), "dtype": leaves[path].dtype.name, "sum": checksum}
            for path, checksum in checksums(trees).items()
        }
        content = {"time": round(time.time(), 3), **meta, "step": step, "arrays": arrays}
        items: dict[str, Any] = {item: ocp.args.StandardSave(_nested(tree)) for item, tree in trees.items()}
        items["meta"] = ocp.args.JsonSave(sealed(content))
        self._saving = step
        try:
            self._writer.save(self._place(step), args=ocp.args.Composite(**items))
        except (OSError, ValueError) as error:
            self._failure = error

    def poll(self) -> None:
        """Report a failed save at once if there is one process; otherwise `seal` reports it."""
        if self._writer and self._saving is not None and jax.process_count() == 1:
            try:
                self._writer.check_for_errors()
            except (OSError, ValueError) as error:
                self._failure = error
                self.seal()

    def seal(self, must: bool = False) -> int | None:
        """Wait for the current save, delete the steps that are not kept, and return the committed step.

        A failed save causes a warning; if it `must` succeed or is the first, `UserError` (IO) in all processes.
        """
        if self._writer is None or self._saving is None:
            return None
        (step, failure), self._saving, self._failure = (self._saving, self._failure), None, None
        try:
            self._writer.wait_until_finished()
        except (OSError, ValueError) as error:
            failure = failure or error
        failed = _first_message(_reason(failure) if failure else "")
        if not failed:
            if jax.process_index() == 0:
                self._prune()
            return step
        if jax.process_index() == 0:
            self._remove_leftovers()
        steps = self.steps()
        if must or not steps:
            system = _system_error(failure) if failure else None
            raise io_error(system or OSError(failed), self.folder / str(step)) from failure
        sizes = f"{si(self._size, 'B')} needed, {si(shutil.disk_usage(self.folder).free, 'B')} free"
        self._tell(
            f"warning: checkpoint {step} was not saved: {failed}: {self.folder / str(step)} ({sizes}); "
            f"the run continues, its last checkpoint is {steps[-1]}, and the next save tries again"
        )
        return None

    def newest(self, read: Callable[[int], T]) -> tuple[int, T] | None:
        """Return the newest step for which `read` does not raise `DamagedCheckpoint`, and its result.

        Newer damaged steps cause a warning and, unless the store only reads, move to `damaged/`. Returns None if there
        is no step. Raises `UserError` (IO) if all steps are damaged; no step moves then.
        """
        damaged: dict[int, str] = {}
        for step in reversed(self.steps()):
            try:
                result = read(step)
            except DamagedCheckpoint as error:
                damaged[step] = str(error)
                continue
            for bad, what in damaged.items():
                moved = f", moved to {self._set_aside(bad)}" if self._writer else ""
                self._tell(f"warning: checkpoint {bad} is damaged ({what}){moved}; using {step}")
            return step, result
        if damaged:
            found = "; ".join(f"{step}: {what}" for step, what in damaged.items())
            fix = f"all are damaged ({found}): put a whole copy back, or choose another output to start anew"
            raise UserError(ExitCode.IO, "no usable checkpoint", self.folder, fix)
        return None

    def restore(self, step: int, **abstract: Any) -> dict[str, Any]:
        """Return the items `model` or `opt_state`, laid out as the given trees of ShapeDtypeStructs.

        Raises:
            DamagedCheckpoint: If a file cannot be read or an array differs from its checksum.
            UserError: CONFIG if names, shapes or dtypes differ from `abstract`, before an array is read; IO if an item
                was never saved.
        """
        expected = self.meta(step).get("arrays")
        self.check_layout(step, **abstract)
        restored = {item: _together(lambda item=item: self._read(step, item, abstract[item])) for item in abstract}
        if expected is not None:
            for path, checksum in checksums(restored).items():
                if checksum != expected[path]["sum"]:
                    raise DamagedCheckpoint(f"the checksum of {path} differs")
        return {item: _like(tree, restored[item]) for item, tree in abstract.items()}

    def check_layout(self, step: int, **abstract: Any) -> None:
        """Raise the errors of `restore` that need no array."""
        arrays = self.meta(step).get("arrays")
        for item, tree in abstract.items():
            saved = _saved(arrays, item) if arrays is not None else _together(lambda item=item: self._old(step, item))
            if not saved:
                what = f"checkpoint {step} holds no {item}"
                raise UserError(ExitCode.IO, what, self.folder, "to start from its weights, name it as init_from")
            expected = _shown(tree)
            differences = [
                f"{path} {saved.get(path, 'nothing')} saved, {expected.get(path, 'nothing')} expected"
                for path in sorted(saved.keys() | expected.keys())
                if saved.get(path) != expected.get(path)
            ]
            if differences:
                what = f"checkpoint differs from the configured {item}"
                more = f" and {len(differences) - 5} more" if len(differences) > 5 else ""
                raise UserError(ExitCode.CONFIG, what, self.folder / str(step), "; ".join(differences[:5]) + more)

    def _read(self, step: int, item: str, tree: Any) -> dict[str, Any]:
        with _as_damage():
            return self._reader.restore(self._place(step) / item, args=ocp.args.StandardRestore(_nested(tree)))

    def _old(self, step: int, item: str) -> dict[str, str]:
        """Return the leaves of an item in a checkpoint without checksums."""
        if not (self.folder / str(step) / item).is_dir():
            return {}
        with _as_damage():
            return _shown(self._reader.metadata(self._place(step) / item))

    def _place(self, step: int) -> epath.Path:
        return epath.Path(self.folder.absolute()) / str(step)

    def _set_aside(self, step: int) -> Path:
        place = self.folder / str(step)
        if jax.process_index() == 0:
            place = set_aside(place, self.folder.parent)
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices("set aside")
        return place

    def _prune(self) -> None:
        """Delete the steps that are not kept, if the newest is readable. Unreadable steps stay."""
        readable = {}
        for step in self.steps():
            with contextlib.suppress(DamagedCheckpoint):
                readable[step] = read_meta(self.folder / str(step), step).get("metrics", {}).get(VALIDATION_LOSS)
        if not readable or max(readable) != max(self.steps()):
            return
        rated = sorted((loss, step) for step, loss in readable.items() if isinstance(loss, float))
        kept = {*sorted(readable)[-self._keep :], *(step for _, step in rated[: self._keep_best])}
        for step in readable.keys() - kept:
            if not self._keep_every or step % self._keep_every:
                # Rename first, so that a killed deletion does not leave half of a step.
                doomed = (self.folder / str(step)).rename(self.folder / f"{step}.deleted")
                shutil.rmtree(doomed, ignore_errors=True)

    def _remove_leftovers(self) -> None:
        for pattern in _LEFTOVERS:
            for left in self.folder.glob(pattern):
                shutil.rmtree(left, ignore_errors=True)


@contextlib.contextmanager
def _as_damage() -> Iterator[None]:
    """Raise `DamagedCheckpoint` for any error of orbax, tensorstore or JSON, except for errors of the machine."""
    try:
        yield
    except Exception as error:
        system = _system_error(error)
        if out_of_memory(error, "", "") or (system and system.errno in PASSING):
            raise system or error from error
        raise DamagedCheckpoint(f"it cannot be read: {_first_line(error)}") from error


def _together(read: Callable[[], T]) -> T:
    """Return the result of `read`. Raises `DamagedCheckpoint` in all processes if `read` does in one."""
    damage, result = "", None
    try:
        result = read()
    except DamagedCheckpoint as error:
        damage = str(error) or "damaged"
    if damage := _first_message(damage):
        raise DamagedCheckpoint(damage)
    return result  # pyright: ignore[reportReturnType] - it is set where nothing is damaged


def _first_message(message: str) -> str:
    """Return the first message of all processes that is not empty."""
    if jax.process_count() == 1:
        return message
    padded = message.encode(errors="replace")[:_MESSAGE_BYTES].ljust(_MESSAGE_BYTES, b"\0")
    gathered = np.asarray(multihost_utils.process_allgather(np.frombuffer(padded, np.uint8), tiled=False))
    texts = (row.tobytes().rstrip(b"\0").decode(errors="replace") for row in gathered)
    return next(filter(None, texts), "")


def _reason(failure: Exception) -> str:
    system = _system_error(failure)
    if system is None:
        return _first_line(failure)
    return "disk full" if system.errno == errno.ENOSPC else os.strerror(system.errno) if system.errno else str(system)


def _system_error(error: Exception) -> OSError | None:
    """Return the error of the operating system, which tensorstore hides in a ValueError."""
    if number := re.search(r"os_error_code='(\d+)'", str(error)):
        return OSError(int(number[1]), os.strerror(int(number[1])))
    return error if isinstance(error, OSError) else None


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:120]


def _saved(arrays: Mapping[str, Any], item: str) -> dict[str, str]:
    """Return the shape and dtype of each array of an item, by path."""
    return {
        path.removeprefix(f"{item}/"): f"{tuple(array['shape'])} {array['dtype']}"
        for path, array in arrays.items()
        if path.startswith(f"{item}/")
    }


def _by_path(tree: Any) -> dict[str, Any]:
    return {path_of(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def _shown(tree: Any) -> dict[str, str]:
    return {path: f"{tuple(leaf.shape)} {leaf.dtype}" for path, leaf in _by_path(tree).items()}


def _nested(tree: Any) -> dict[str, Any]:
    return unflatten_dict(_by_path(tree), sep="/")


def _like(tree: Any, nested: dict[str, Any]) -> Any:
    """Return the leaves of `nested` in the structure of `tree`."""
    flat = _by_path(nested)
    return jax.tree_util.tree_map_with_path(lambda path, _: flat[path_of(path)], tree)
