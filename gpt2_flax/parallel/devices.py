"""Facts about accelerators, by their names in JAX."""

import re
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol


class Device(Protocol):
    """What this program reads of a `jax.Device`; a device may be absent from this machine."""

    platform: str
    device_kind: str

    def memory_stats(self) -> Any:
        """Return a dict with keys such as "bytes_limit", or None."""


class Kind(NamedTuple):
    """A kind of device, from its maker's data sheet.

    TFLOP/s are those of dense matrix products; in float32 JAX multiplies in TF32 on these GPUs and in bfloat16 on TPUs,
    unless told otherwise. Memory is in 10^9 bytes, its bandwidth in 10^9 bytes a second.
    """

    name: str  # regular expression over `Device.device_kind`
    tflops_bfloat16: float
    tflops_float32: float
    memory: float
    bandwidth: float


KINDS = (
    Kind(r"NVIDIA A100-(SXM4|PCIE)-40GB", 312, 156, 40, 1555),
    Kind(r"NVIDIA A100-SXM4-80GB", 312, 156, 80, 2039),
    Kind(r"NVIDIA A100 80GB PCIe", 312, 156, 80, 1935),
    Kind(r"NVIDIA H100 PCIe", 756, 378, 80, 2000),
    Kind(r"NVIDIA H100 NVL", 835, 417, 94, 3900),
    Kind(r"NVIDIA H200 NVL", 835, 417, 141, 4800),
    Kind(r"NVIDIA H100 80GB HBM3", 989, 494, 80, 3350),
    Kind(r"NVIDIA H200", 989, 494, 141, 4800),
    Kind(r"NVIDIA GH200 480GB", 989, 494, 96, 4000),
    Kind(r"NVIDIA GH200 144G HBM3e", 989, 494, 144, 4900),
    Kind(r"NVIDIA L40S", 362, 183, 48, 864),
    Kind(r"NVIDIA L4", 121, 60, 24, 300),
    Kind(r"NVIDIA GeForce RTX 4090", 165, 83, 24, 1008),
    Kind(r"TPU v4", 275, 275, 32, 1228),
    Kind(r"TPU v5( lite|e)", 197, 197, 16, 819),
    Kind(r"TPU v5p?", 459, 459, 95, 2765),
    Kind(r"TPU v6( lite|e)", 918, 918, 32, 1640),
)


def peak_flops(device_kind: str, dtype: str) -> float | None:
    """Returns the FLOP/s of a device's matrix products in a dtype, None for a device that is not in the table."""
    kind = _kind(device_kind)
    return kind and 1e12 * (kind.tflops_bfloat16 if dtype == "bfloat16" else kind.tflops_float32)


def bandwidth(device_kind: str) -> float | None:
    """Return the bytes a second of a device's memory, None for a device that is not in the table."""
    kind = _kind(device_kind)
    return kind and 1e9 * kind.bandwidth


def memory_bytes(device: Device) -> float | None:
    """Returns what a program may use of a device's memory: as the device says, else by the table, else None."""
    try:
        stats = device.memory_stats()
    except (RuntimeError, NotImplementedError):  # a device of a topology, which is not here
        stats = None
    if stats and "bytes_limit" in stats:
        return stats["bytes_limit"]
    kind = _kind(device.device_kind)
    return kind and kind.memory * 1e9


def peak_memory(devices: Sequence[Device]) -> int | None:
    """Returns the most bytes that any of these devices had in use at once, None where the backend does not say."""
    stats = [device.memory_stats() or {} for device in devices]
    return max((found["peak_bytes_in_use"] for found in stats if "peak_bytes_in_use" in found), default=None)


def _kind(device_kind: str) -> Kind | None:
    return next((kind for kind in KINDS if re.fullmatch(kind.name, device_kind)), None)
