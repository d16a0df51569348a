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

    TFLOP/s count dense matrix products. By default, JAX multiplies float32 in TF32 on these GPUs and in bfloat16 on
    TPUs. Memory is in 10^9 bytes, bandwidth in 10^9 bytes a second.
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
    """Return the FLOP/s of a device's matrix products in a dtype, or None for a device outside the table."""
    kind = _kind(device_kind)
    return kind and 1e12 * (kind.tflops_bfloat16 if dtype == "bfloat16" else kind.tflops_float32)


def bandwidth(device_kind: str) -> float | None:
    """Return the memory bandwidth of a device in bytes a second, or None for a device outside the table."""
    kind = _kind(device_kind)
    return kind and 1e9 * kind.bandwidth


def memory_bytes(device: Device) -> float | None:
    """Return the bytes of memory that a program may use: from the device, or from the table, or None."""
    try:
        stats = device.memory_stats()
    except (RuntimeError, NotImplementedError):  # a device of a topology, absent from this machine
        stats = None
    if stats and "bytes_limit" in stats:
        return stats["bytes_limit"]
    kind = _kind(device.device_kind)
    return kind and kind.memory * 1e9


def peak_memory(devices: Sequence[Device]) -> int | None:
    """Return the peak bytes in use of the fullest device, or None if the backend does not count them."""
    stats = [device.memory_stats() or {} for device in devices]
    return max((found["peak_bytes_in_use"] for found in stats if "peak_bytes_in_use" in found), default=None)


def _kind(device_kind: str) -> Kind | None:
    return next((kind for kind in KINDS if re.fullmatch(kind.name, device_kind)), None)
