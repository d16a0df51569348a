"""How the processes of a run, on one host or many, become one JAX program."""

import contextlib
import importlib.metadata
import os
import platform

import jax

import gpt2_flax
from gpt2_flax.processes.place import Place
from gpt2_flax.processes.watchdog import Watchdog

_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
_BACKENDS = ("jax-cuda12-plugin", "jax-cuda13-plugin", "libtpu")  # where one is missing JAX would use the CPU
_SETTINGS = (
    "jax_enable_x64",
    "jax_default_matmul_precision",
    "jax_default_prng_impl",
    "jax_threefry_partitionable",
)


def start_processes(place: Place | None) -> Watchdog:
    """Joins the processes of a run into one JAX program; does nothing for a run of one process.

    Must come before anything asks for devices. Train within the context of what it returns. Raises `UserError` (USAGE,
    TRY_AGAIN when a process does not come, CONFIG when one has other versions), see `joining.join`.
    """
    if place is None:
        return Watchdog()
    watchdog = Watchdog.join(place, _versions())
    address = f"{place.coordinator.rsplit(':', 1)[0]}:{place.port + 1}"
    # An empty list is all devices of the host; left out, JAX would take one a process under SLURM and Open MPI.
    devices = [] if place.device is None else [place.device]
    if "JAX_LOCAL_DEVICE_IDS" in os.environ:
        devices = None
    # Its handler of SIGTERM would replace ours, and `Watchdog.stops` does its work.
    jax.config.update("jax_enable_preemption_service", False)
    # JAX's own heartbeat (100 s) is slower than the watchdog's, as it ends processes without a word that helps.
    try:
        jax.distributed.initialize(
            address, place.n_processes, place.number, local_device_ids=devices, shutdown_timeout_seconds=60
        )
    except Exception as error:
        watchdog.announce(error)
        raise
    return watchdog


def _versions() -> dict[str, str]:
    """What the program of a process depends on beside config and data, by name."""
    versions = {"gpt2_flax": gpt2_flax.__version__, "python": platform.python_version()}
    for package in _PACKAGES + _BACKENDS:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    settings = {name.upper(): str(getattr(jax.config, name, None)) for name in _SETTINGS}
    return {f"the version of {name}": version for name, version in versions.items()} | settings
