"""Accelerators that JAX has software for but that are not here: that software is kept silent."""

import importlib.util
import os
from pathlib import Path

from gpt2_flax import nvidia

TPU_FILES = ("accel*", "vfio/*")  # in /dev
GPU_FILES = (*nvidia.DEVICE_FILES, "nvmap", "kfd")
_NVIDIA, _DISPLAY = "0x10de", "0x03"  # vendor and class of a PCI device

_TPU_DESCRIPTION = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",
    "TPU_LOG_DIR": "disabled",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


def silence_what_is_not_here() -> None:
    """Set up the environment for JAX, which must not be imported yet; what the environment says already stays so.

    Without any accelerator JAX keeps to the CPU: the plugin of the extra `cuda` would print a traceback. A GPU whose
    driver does not work counts as one, so that JAX says what is wrong with the driver.
    """
    tpu, gpu = has_tpu(), _exists(GPU_FILES) or _nvidia_on_the_bus()
    if not tpu:
        silence_libtpu()
    if not (tpu or gpu) and any(importlib.util.find_spec(f"jax_cuda{version}_plugin") for version in (12, 13)):
        os.environ.setdefault("JAX_PLATFORMS", "cpu")


def silence_libtpu() -> None:
    """Describes a TPU to libtpu, which must not be loaded yet; what the environment says already stays so.

    It asks around for one otherwise, complains at length that there is none, logs to /tmp, and lets no second program
    load it, for one TPU cannot serve two. JAX asks it for devices, finds none, and takes others.
    """
    for name, value in _TPU_DESCRIPTION.items():
        os.environ.setdefault(name, value)


def has_tpu() -> bool:
    """Whether this machine seems to have a TPU."""
    return _exists(TPU_FILES)


def _exists(patterns: tuple[str, ...]) -> bool:
    return any(True for pattern in patterns for _ in Path("/dev").glob(pattern))


def _nvidia_on_the_bus() -> bool:
    """Whether there is an NVIDIA GPU, with a driver or without."""
    return any(
        _line(device / "vendor") == _NVIDIA and _line(device / "class").startswith(_DISPLAY)
        for device in Path("/sys/bus/pci/devices").glob("*")
    )


def _line(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8").strip()
    except OSError:
        return ""
