"""Measure the cost of a checkpoint's checksums, relative to the save and to hashing files at the start.

    python scripts/benchmark_checkpoint.py --size base --folder /tmp/checkpoints

The script saves the state of a GPT-2 a few times into a new folder on the measured disk, and reads it again. The state
holds random numbers, which compress as little as trained ones. One run compares four times: one pass over the arrays on
the devices, a save up to its commit, a restore, and the sha256 of the files (earlier versions read it at every start).
"""

import argparse
import hashlib
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np

from gpt2_flax.checkpoint.device_checksum import checksums
from gpt2_flax.checkpoint.store import CheckpointStore
from gpt2_flax.config.parse import parse_config
from gpt2_flax.parallel.mesh import make_mesh
from gpt2_flax.training.step import TrainState, state_layout

SIZES = {"tiny": (2, 2, 128), "base": (12, 12, 768), "medium": (24, 16, 1024), "xl": (48, 25, 1600)}


def random_state(size: str) -> TrainState:
    """Return a train state of this size with normally distributed numbers in all arrays."""
    layers, heads, width = SIZES[size]
    values = {
        "output": "benchmark",
        "model": {"vocab_size": 21128, "n_layer": layers, "n_head": heads, "n_embd": width},
        "data": {"dataset": "none"},
        "training": {"total_steps": 1},
    }
    config, rng = parse_config(values, "benchmark").with_vocab_size(21128), np.random.default_rng(0)
    mesh = make_mesh()
    layout = state_layout(config, mesh)
    with jax.set_mesh(mesh):
        return jax.tree.map(
            lambda leaf: jax.device_put(rng.standard_normal(leaf.shape, np.float32).astype(leaf.dtype), leaf.sharding),
            layout,
        )


def seconds(action: Callable[[], object]) -> float:
    begun = time.perf_counter()
    action()
    return time.perf_counter() - begun


def save(store: CheckpointStore, step: int, state: TrainState) -> None:
    store.save(step, state.model, state.opt_state, {"model": {}})
    store.seal(must=True)


def hash_files(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            with open(path, "rb") as file:
                hashlib.file_digest(file, "sha256")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="base")
    parser.add_argument(
        "--folder", type=Path, default=Path(tempfile.gettempdir()), help="a folder on the measured disk"
    )
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    state = jax.block_until_ready(random_state(arguments.size))
    trees = {"model": state.model, "opt_state": state.opt_state}
    layout = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), trees)
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(trees))
    checksums(trees)  # compiles
    rounds = []
    with (
        tempfile.TemporaryDirectory(dir=arguments.folder) as folder,
        CheckpointStore(Path(folder) / "checkpoints", keep=1) as store,
    ):
        for step in range(1, arguments.rounds + 1):
            actions = (
                lambda: checksums(trees),
                lambda step=step: save(store, step, state),
                lambda step=step: store.restore(step, **layout),
                lambda step=step: hash_files(store.folder / str(step)),
            )
            rounds.append([seconds(action) for action in actions])
    print(f"{arguments.size}, {size / 1e9:.2f} GB on {jax.device_count()} x {jax.devices()[0].device_kind}")
    names, columns = ("checksums", "save", "restore", "sha256 of files"), list(zip(*rounds, strict=True))
    medians = list(map(statistics.median, columns))
    for name, median, column in zip(names, medians, columns, strict=True):
        spread = f"{min(column):.3f} to {max(column):.3f}"
        print(f"{name:<16} {median:.3f} s ({spread}), {size / median / 1e9:.2f} GB/s")
    print(f"checksums: {medians[0] / medians[1]:.1%} of a save, 1/{medians[3] / medians[0]:.1f} of the sha256 of files")


if __name__ == "__main__":
    main()
