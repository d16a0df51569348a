"""Silence the software of JAX for accelerators that this machine does not have."""

import importlib.util
import os
from pathlib import Path

from gpt2_flax import nvidia

TPU_FILES = ("accel*", "vfio/*")  # in /dev
GPU_FILES = (*nvidia.DEVICE_FILES, "nvmap", "kfd")
_NVIDIA, _DISPLAY = "0x10de", "0x03"  # PCI vendor, and first byte of the PCI class

_TPU_DESCRIPTION = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",
    "TPU_LOG_DIR": "disabled",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


def silence_what_is_not_here() -> None:
    """Set variables of the environment that are not set yet; call this before JAX is imported.

    Without an accelerator, JAX uses only the CPU: the plugin of the extra `cuda` would print a traceback. A GPU with a
    broken driver counts as an accelerator, so that JAX reports the error of the driver.
    """
    tpu, gpu = has_tpu(), _exists(GPU_FILES) or nvidia_on_the_bus()
    if not tpu:
        silence_libtpu()
    if not (tpu or gpu) and any(importlib.util.find_spec(f"jax_cuda{version}_plugin") for version in (12, 13)):
        os.environ.setdefault("JAX_PLATFORMS", "cpu")


def silence_libtpu() -> None:
    """Describe a TPU to libtpu in variables that are not set yet; call this before libtpu is loaded.

    Otherwise libtpu searches for a TPU, prints long warnings, logs to /tmp, and lets only one program load it. JAX then
    finds no TPU devices in libtpu and uses other devices.
    """
    for name, value in _TPU_DESCRIPTION.items():
        os.environ.setdefault(name, value)


def has_tpu() -> bool:
    """Return whether this machine seems to have a TPU, by its device files."""
    return _exists(TPU_FILES)


def _exists(patterns: tuple[str, ...]) -> bool:
    return any(True for pattern in patterns for _ in Path("/dev").glob(pattern))


def nvidia_on_the_bus() -> bool:
    """Return whether there is an NVIDIA GPU, with or without a driver."""
    return any(
        _line(device / "vendor") == _NVIDIA and _line(device / "class").startswith(_DISPLAY)
        for device in Path("/sys/bus/pci/devices").glob("*")
    )


def _line(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8").strip()
    except OSError:
        return ""
