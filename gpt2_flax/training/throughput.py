"""What turns counts of a run into figures that runs can be compared by."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import jax
from jax.sharding import Mesh

from gpt2_flax.config import Config
from gpt2_flax.data.loader import MixedLoader
from gpt2_flax.data.mixture import Mixture
from gpt2_flax.model.flops import flops_per_token

# TFLOP/s of dense matrix products in bfloat16 and in float32 by JAX's name of the device, from the makers' data sheets.
# In float32 JAX multiplies in TF32 on these GPUs and in bfloat16 on TPUs, unless told otherwise.
_PEAK_TFLOPS = (
    (r"NVIDIA A100-(SXM4|PCIE)-[48]0GB|NVIDIA A100 80GB PCIe", 312, 156),
    (r"NVIDIA H100 PCIe", 756, 378),
    (r"NVIDIA H(100|200) NVL", 835, 417),
    (r"NVIDIA H100 80GB HBM3|NVIDIA H200|NVIDIA GH200 .*GB", 989, 494),
    (r"NVIDIA L40S", 362, 183),
    (r"NVIDIA L4", 121, 60),
    (r"NVIDIA GeForce RTX 4090", 165, 83),
    (r"TPU v4", 275, 275),
    (r"TPU v5( lite|e)", 197, 197),
    (r"TPU v5p?", 459, 459),
    (r"TPU v6( lite|e)", 918, 918),
)


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


def peak_flops(device_kind: str, dtype: str) -> float | None:
    """Returns the FLOP/s of a device's matrix products in a dtype, None for a device that is not in the table."""
    for pattern, in_bfloat16, in_float32 in _PEAK_TFLOPS:
        if re.fullmatch(pattern, device_kind):
            return 1e12 * (in_bfloat16 if dtype == "bfloat16" else in_float32)
    return None


def peak_memory(devices: Sequence[jax.Device]) -> int | None:
    """Returns the most bytes that any of these devices had in use at once, None where the backend does not say."""
    stats = [device.memory_stats() or {} for device in devices]
    return max((found["peak_bytes_in_use"] for found in stats if "peak_bytes_in_use" in found), default=None)


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
