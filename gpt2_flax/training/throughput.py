"""What turns counts of a run into figures that runs can be compared by."""

from collections.abc import Mapping
from dataclasses import dataclass

from jax.sharding import Mesh

from gpt2_flax.config import Config
from gpt2_flax.data.loader import MixedLoader
from gpt2_flax.data.mixture import Mixture
from gpt2_flax.model.flops import flops_per_token
from gpt2_flax.parallel.devices import peak_flops


@dataclass(frozen=True)
class Throughput:
    """Positions, arithmetic and samples of a run's steps."""

    positions: int
    """Of a step: rows times seq_length."""
    flops_per_position: int
    peak_flops: float | None
    """A second, of all devices together; None for devices that are not in the table."""
    characters_per_target: float | None
    """Of the training text, None when a dataset does not know."""
    samples_per_epoch: Mapping[str, float]
    """By dataset: samples of the run until it has been read once."""

    def utilization(self, positions_per_second: float) -> float | None:
        """Returns the share of the devices' peak that the model needs (MFU), None when the peak is not known."""
        return self.flops_per_position * positions_per_second / self.peak_flops if self.peak_flops else None


def throughput(config: Config, mesh: Mesh, mixture: Mixture, loader: MixedLoader) -> Throughput:
    """Returns the figures of a run whose `loader` deals the rows of `mixture`."""
    weights = config.data.datasets
    total = sum(weights.values())
    rows = {folder: part.n_rows for folder, part in zip(weights, loader.loaders, strict=True)}
    peak = peak_flops(mesh.devices.flat[0].device_kind, config.model.dtype)
    return Throughput(
        config.data.global_batch_size * config.data.seq_length,
        flops_per_token(config.model, config.data.seq_length),
        peak and peak * mesh.size,
        _characters_per_target(mixture, weights),
        {folder: rows[folder] * total / weight for folder, weight in weights.items()},
    )


def _characters_per_target(mixture: Mixture, weights: Mapping[str, float]) -> float | None:
    # Rows are drawn by weight, and rows are as good as tokens.
    characters = targets = 0.0
    for folder, weight in weights.items():
        split = mixture.datasets[folder].train
        if split.n_characters is None:
            return None
        characters += weight * split.n_characters / max(1, split.n_tokens)
        targets += weight * (split.n_tokens - split.n_documents) / max(1, split.n_tokens)
    return characters / targets if characters and targets else None
