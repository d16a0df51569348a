"""libtpu, which the extra `tpu` brings, where there is no TPU: kept silent."""

import os
from pathlib import Path

DEVICE_FILES = ("accel*", "vfio/*")  # of TPUs, in /dev

_DESCRIPTION = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",
    "TPU_LOG_DIR": "disabled",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


def silence_libtpu() -> None:
    """Describes a TPU to libtpu, which must not be loaded yet; what the environment says already stays so.

    It asks around for one otherwise, complains at length that there is none, logs to /tmp, and lets no second program
    load it, for one TPU cannot serve two. JAX asks it for devices, finds none, and takes others.
    """
    for name, value in _DESCRIPTION.items():
        os.environ.setdefault(name, value)


def silence_libtpu_without_tpu() -> None:
    """As `silence_libtpu`, unless this machine has a TPU."""
    if not any(True for pattern in DEVICE_FILES for _ in Path("/dev").glob(pattern)):
        silence_libtpu()
