"""The figures of a run by which runs are compared: positions, arithmetic, epochs and characters."""

from collections.abc import Mapping
from dataclasses import dataclass

from jax.sharding import Mesh

from gpt2_flax.config.schema import ResolvedConfig
from gpt2_flax.data.batches import Batches
from gpt2_flax.data.mixture import Mixture
from gpt2_flax.parallel.devices import peak_flops


@dataclass(frozen=True)
class Throughput:
    """Constants that turn steps and seconds of a run into figures."""

    positions: int
    """Positions of a step: rows times seq_length."""
    peak_flops: float | None
    """FLOP/s of all devices together; None for devices that are not in the table."""
    characters_per_target: float | None
    """Characters of training text a target; None when a dataset does not know."""
    samples_per_epoch: Mapping[str, float]
    """For each dataset: the samples of the run until the dataset has been read once."""


def throughput(config: ResolvedConfig, mesh: Mesh, mixture: Mixture, batches: Batches) -> Throughput:
    """Return the figures of a run on `mesh` that trains on the `batches` of `mixture`."""
    weights = config.data.datasets
    total = sum(weights.values())
    n_rows = {folder: rows.n_rows for folder, rows in zip(weights, batches.rows, strict=True)}
    peak = peak_flops(mesh.devices.flat[0].device_kind, config.model.dtype)
    return Throughput(
        config.data.global_batch_size * config.data.seq_length,
        peak and peak * mesh.size,
        _characters_per_target(mixture, weights),
        {folder: n_rows[folder] * total / weight for folder, weight in weights.items()},
    )


def _characters_per_target(mixture: Mixture, weights: Mapping[str, float]) -> float | None:
    # Weights are shares of rows; all rows have about the same number of tokens.
    characters = targets = 0.0
    for folder, weight in weights.items():
        split = mixture.datasets[folder].train
        if split.n_characters is None:
            return None
        characters += weight * split.n_characters / max(1, split.n_tokens)
        targets += weight * (split.n_tokens - split.n_documents) / max(1, split.n_tokens)
    return characters / targets if characters and targets else None
