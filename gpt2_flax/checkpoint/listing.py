"""List the checkpoints of a run and their state, for `gpt2-flax checkpoints`."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from gpt2_flax.checkpoint.run_folder import RunFolder
from gpt2_flax.checkpoint.step_meta import VALIDATION_LOSS, DamagedCheckpoint, committed_steps, read_meta
from gpt2_flax.errors import ExitCode, UserError
from gpt2_flax.progress import progress_bar


class Listed(NamedTuple):
    """A checkpoint of a run; None means that the checkpoint does not say."""

    step: int
    path: str
    time: float | None
    """When the checkpoint was saved, in seconds since 1970."""
    train_loss: float | None
    validation_loss: float | None
    bytes: int
    """On the disk."""
    state: str
    """committed, verified, no checksums, set aside, or damaged."""
    damage: str | None


def list_checkpoints(run: RunFolder, verify: bool = False) -> list[Listed]:
    """Return the checkpoints of a run by step, then the checkpoints that were set aside.

    Args:
        verify: Read every array and compare it with its checksum.

    Raises:
        UserError: NO_INPUT if there are none.
    """
    steps = committed_steps(run.checkpoints)
    aside = [path for path in sorted(run.damaged.glob("*-*")) if path.name.split("-")[0].isdecimal()]
    if not steps and not aside:
        raise UserError(ExitCode.NO_INPUT, "no checkpoint yet", run.checkpoints, "wait for the first save of the run")
    sizes = {step: _size(run.checkpoints / str(step)) for step in steps}
    listed = []
    with progress_bar("verifying", sum(sizes.values()) if verify else 0, "B") as advance:
        check = _verifier(run) if verify else lambda step: "committed"
        for step in steps:
            listed.append(_listed(run.checkpoints / str(step), step, sizes[step], check))
            advance(sizes[step])
    listed += [_listed(path, int(path.name.split("-")[0]), _size(path), lambda step: "set aside") for path in aside]
    return listed


def _listed(path: Path, step: int, size: int, check: Callable[[int], str]) -> Listed:
    meta: dict[str, Any] = {}
    state, damage = "damaged", None
    try:
        meta = read_meta(path, step)
        state = check(step) if "arrays" in meta else "no checksums"
    except DamagedCheckpoint as error:
        damage = str(error)
    metrics = meta.get("metrics", {})
    losses = metrics.get("train/loss"), metrics.get(VALIDATION_LOSS)
    return Listed(step, str(path), meta.get("time"), *losses, size, state, damage)


def _verifier(run: RunFolder) -> Callable[[int], str]:
    import jax  # here, so that a list without --verify appears at once

    from gpt2_flax.checkpoint.store import CheckpointStore

    store = CheckpointStore(run.checkpoints)
    device = jax.sharding.SingleDeviceSharding(jax.local_devices(backend="cpu")[0])

    def verify(step: int) -> str:
        items: dict[str, dict[str, jax.ShapeDtypeStruct]] = {}
        for path, array in store.meta(step)["arrays"].items():
            item, _, name = path.partition("/")
            struct = jax.ShapeDtypeStruct(tuple(array["shape"]), array["dtype"], sharding=device)
            items.setdefault(item, {})[name] = struct
        for item, arrays in items.items():  # one at a time: both may not fit into memory
            store.restore(step, **{item: arrays})
        return "verified"

    return verify


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
