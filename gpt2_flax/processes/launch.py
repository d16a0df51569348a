"""Join this process to its run: first to the hub, then to JAX."""

import contextlib
import importlib.metadata
import os
import platform

import jax

import gpt2_flax
from gpt2_flax.errors import ExitCode, UserError
from gpt2_flax.processes.place import Place
from gpt2_flax.processes.watchdog import Watchdog

_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
_BACKENDS = ("jax-cuda12-plugin", "jax-cuda13-plugin", "libtpu")  # JAX falls back to the CPU without them
_SETTINGS = (
    "jax_enable_x64",
    "jax_default_matmul_precision",
    "jax_default_prng_impl",
    "jax_threefry_partitionable",
)


def start_processes(place: Place | None) -> Watchdog:
    """Join this process to its run and return the watchdog; train within its context.

    Call this before anything asks JAX for devices. In a run of one process, where `place` is None, nothing is joined.

    Raises:
        UserError: TRY_AGAIN when a process does not come, CONFIG when versions differ, USAGE; see `joining.join`.
    """
    if place is None:
        return Watchdog()
    if jax.distributed.is_initialized():
        fix = "train several stages in one call, or start new processes"
        raise UserError(ExitCode.USAGE, "this process has joined a run of several processes already", "train", fix)
    watchdog = Watchdog.join(place, _versions())
    address = f"{place.coordinator.rsplit(':', 1)[0]}:{place.port + 1}"
    # An empty list means all devices of the host. With None, JAX takes one device a process under SLURM and Open MPI.
    devices = [] if place.device is None else [place.device]
    if "JAX_LOCAL_DEVICE_IDS" in os.environ:
        devices = None
    # JAX's handler of SIGTERM would replace ours; `Watchdog.stops` does its work.
    jax.config.update("jax_enable_preemption_service", False)
    # JAX's own heartbeat (100 s) is slower than the hub's on purpose: it ends processes without a helpful message.
    try:
        jax.distributed.initialize(
            address, place.n_processes, place.number, local_device_ids=devices, shutdown_timeout_seconds=60
        )
    except Exception as error:
        watchdog.announce(error)
        raise
    return watchdog


def _versions() -> dict[str, str]:
    """Return the versions and JAX settings that must be equal in all processes, by name."""
    versions = {"gpt2_flax": gpt2_flax.__version__, "python": platform.python_version()}
    for package in _PACKAGES + _BACKENDS:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    settings = {name.upper(): str(getattr(jax.config, name, None)) for name in _SETTINGS}
    return {f"the version of {name}": version for name, version in versions.items()} | settings
