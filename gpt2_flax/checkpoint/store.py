"""Checkpoints of a run, in orbax: `checkpoints/STEP/` with the items `model`, `opt_state` and `meta`.

Arrays lie under their paths (`h/attn/c_attn/kernel`), so the format does not depend on the framework's classes.
Orbax commits a step by renaming its folder; `sha256/STEP.json` is added when that is seen, and a step that does not
match it is moved to `damaged/` instead of being restored: one flipped bit would otherwise go unnoticed.
"""

import contextlib
import itertools
import json
import logging
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from gpt2_flax.errors import ExitCode, UserError, io_error
from gpt2_flax.folders import file_sha256, write_whole
from gpt2_flax.parallel.rules import path_of

logging.getLogger("absl").setLevel(logging.CRITICAL)  # orbax also raises what it logs as errors


class CheckpointStore:
    """Saves in the background and restores the newest step that is whole, in any sharding.

    Without `keep`, the number of newest steps that stay, it only reads. All processes of a run call the same methods.
    Use as a context: leaving it waits for the last save.
    """

    def __init__(self, folder: Path, keep: int | None = None):
        self.folder, self._writes, self._saving = folder, keep is not None, None
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, create=False, cleanup_tmp_directories=self._writes)
        if self._writes:
            logging.getLogger("asyncio").setLevel(
                logging.CRITICAL
            )  # of one error on a disk it logs what follows from it
        if self._writes and jax.process_index() == 0:
            folder.mkdir(parents=True, exist_ok=True)
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices("checkpoints")
        handlers = {item: ocp.StandardCheckpointHandler() for item in ("model", "opt_state")}
        handlers["meta"] = ocp.JsonCheckpointHandler()
        self._manager = ocp.CheckpointManager(folder.absolute(), options=options, item_handlers=handlers)

    def __enter__(self) -> "CheckpointStore":
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        # What failed first is what the user is to read: on a full disk all of this fails too.
        with contextlib.suppress(*((Exception,) if error else ())), self._naming_step():
            try:
                self.seal()
            finally:
                self._manager.close()

    def steps(self) -> list[int]:
        """Returns the committed steps, ascending."""
        return sorted(self._manager.all_steps(read=True))

    def save(self, step: int, model: Any, opt_state: Any | None, meta: dict[str, Any]) -> None:
        """Starts writing a step; returns when the arrays may change. Raises `UserError` (IO), for earlier saves too."""
        items = {"model": ocp.args.StandardSave(_to_dict(model)), "meta": ocp.args.JsonSave(meta)}
        if opt_state is not None:
            items["opt_state"] = ocp.args.StandardSave(_to_dict(opt_state))
        self.seal()
        self._saving = step
        with self._naming_step():
            self._manager.save(step, args=ocp.args.Composite(**items))

    def seal(self) -> None:
        """Waits for the save under way, then notes the sha256 of every new step. Raises `UserError` (IO)."""
        with self._naming_step():
            self._manager.wait_until_finished()
        if jax.process_index() != 0 or not self._writes:
            return
        for step in self.steps():
            path = self._sums(step)
            if not path.exists():
                write_whole(path, json.dumps(_sha256_of(self.folder / str(step)), indent=1).encode())
        for path in self._sums(0).parent.glob("*.json"):
            if not (self.folder / path.stem).exists():
                path.unlink()

    def newest_whole(self, tell: Callable[[str], None]) -> int | None:
        """Returns the newest step whose files match their sha256, None when there is no step at all.

        Damaged steps before it are told of and, unless the store only reads, moved to `damaged/`. Raises `UserError`
        (IO) when all are damaged; all stay where they are then.
        """
        damaged: dict[int, str] = {}
        for step in reversed(self.steps()):
            damage = self.damage(step)
            if damage is None:
                for bad, what in damaged.items():
                    moved = f", moved to {self._move_aside(bad)}" if self._writes else ""
                    tell(f"warning: checkpoint {bad} is damaged ({what}){moved}; using {step}")
                return step
            damaged[step] = damage
        if damaged:
            found = "; ".join(f"{step}: {damage}" for step, damage in damaged.items())
            fix = f"all are damaged ({found}): put a whole copy back, or choose another output to start anew"
            raise UserError(ExitCode.IO, "no usable checkpoint", self.folder, fix)
        return None

    def damage(self, step: int) -> str | None:
        """Returns what is wrong with a step's files, None when nothing is or when it was never sealed."""
        try:
            expected = json.loads(self._sums(step).read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None if (self.folder / str(step) / "_CHECKPOINT_METADATA").is_file() else "it is not complete"
        except ValueError:
            return f"{self._sums(step).name} is not JSON"
        found = _sha256_of(self.folder / str(step))
        for name in sorted(expected.keys() | found.keys()):
            if expected.get(name) != found.get(name):
                return f"file {name}: {'missing' if name not in found else 'sha256 differs'}"
        return None

    def meta(self, step: int) -> dict[str, Any]:
        """Returns what was saved beside the arrays."""
        return self._manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore())).meta

    def restore(self, step: int, **abstract: Any) -> dict[str, Any]:
        """Returns the items named (`model=`, `opt_state=`), laid out as the given trees of ShapeDtypeStructs.

        Raises `UserError`: CONFIG when names, shapes or dtypes differ (before an array is read), IO when an item is
        not there or cannot be read.
        """
        self.check_layout(step, **abstract)
        items = {item: ocp.args.StandardRestore(_to_dict(tree)) for item, tree in abstract.items()}
        try:
            restored = self._manager.restore(step, args=ocp.args.Composite(**items))
        except (OSError, ValueError) as error:
            reason = str(error).splitlines()[0][:200]
            raise UserError(ExitCode.IO, "checkpoint cannot be read", self.folder / str(step), reason) from error
        return {item: _from_dict(tree, restored[item]) for item, tree in abstract.items()}

    def check_layout(self, step: int, **abstract: Any) -> None:
        """Raises `UserError` as `restore` would, without reading an array."""
        for item, tree in abstract.items():
            self._check_item(step, item, tree)

    def _check_item(self, step: int, item: str, tree: Any) -> None:
        metadata = self._manager.item_metadata(step).get(item)
        if metadata is None:
            what = f"checkpoint {step} holds no {item}"
            raise UserError(ExitCode.IO, what, self.folder, "to start from its weights, name it as init_from")
        saved = {path_of(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(metadata)}
        expected = {path_of(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}
        differences = []
        for path in sorted(saved.keys() | expected.keys()):
            shown = [_shown(leaves.get(path)) for leaves in (saved, expected)]
            if shown[0] != shown[1]:
                differences.append(f"{path} {shown[0]} saved, {shown[1]} expected")
        if differences:
            what = f"checkpoint differs from the configured {item}"
            more = f" and {len(differences) - 5} more" if len(differences) > 5 else ""
            raise UserError(ExitCode.CONFIG, what, self.folder / str(step), "; ".join(differences[:5]) + more)

    @contextlib.contextmanager
    def _naming_step(self) -> Iterator[None]:
        """Turns errors of a disk into `UserError` that names the step last saved."""
        try:
            yield
        except (OSError, ValueError) as error:
            number = re.search(r"os_error_code='(\d+)'", str(error))  # as tensorstore says it, in a ValueError
            if number:
                error = OSError(int(number[1]), os.strerror(int(number[1])))
            if not isinstance(error, OSError):
                raise
            raise io_error(error, self.folder / str(self._saving or "")) from error

    def _move_aside(self, step: int) -> Path:
        place = self.folder.parent / "damaged"
        target = next(path for number in itertools.count() if not (path := place / f"{step}-{number}").exists())
        if jax.process_index() == 0:
            place.mkdir(exist_ok=True)
            (self.folder / str(step)).rename(target)
            self._sums(step).unlink(missing_ok=True)
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices("moved aside")
        self._manager.reload()
        return target

    def _sums(self, step: int) -> Path:
        return self.folder.parent / "sha256" / f"{step}.json"


def _shown(leaf: Any) -> str:
    return "nothing" if leaf is None else f"{tuple(leaf.shape)} {leaf.dtype}"


def _sha256_of(folder: Path) -> dict[str, str]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): file_sha256(path) for path in sorted(files)}


def _to_dict(tree: Any) -> dict[str, Any]:
    nested: dict[str, Any] = {}
    for key_path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        *parents, name = path_of(key_path).split("/")
        place = nested
        for parent in parents:
            place = place.setdefault(parent, {})
        place[name] = leaf
    return nested


def _from_dict(tree: Any, nested: dict[str, Any]) -> Any:
    flat = {path_of(key_path): leaf for key_path, leaf in jax.tree_util.tree_leaves_with_path(nested)}
    return jax.tree_util.tree_map_with_path(lambda key_path, _: flat[path_of(key_path)], tree)
