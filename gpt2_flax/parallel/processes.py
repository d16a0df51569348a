"""How the processes of a run, on one host or many, find each other and become one JAX program."""

import contextlib
import importlib.metadata
import os
import platform
import re
import zlib
from typing import NamedTuple

import jax

import gpt2_flax
from gpt2_flax.errors import ExitCode, UserError, quote
from gpt2_flax.parallel.watchdog import Watchdog

COORDINATOR, NUM_PROCESSES, PROCESS_ID = "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"
_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
_BACKENDS = ("jax-cuda12-plugin", "jax-cuda13-plugin", "libtpu")  # where one is missing JAX would use the CPU
_SETTINGS = (
    "jax_enable_x64",
    "jax_default_matmul_precision",
    "jax_default_prng_impl",
    "jax_threefry_partitionable",
)


class Place(NamedTuple):
    """Where a process stands among those of its run."""

    coordinator: str | None
    """HOST:PORT of process 0."""
    n_processes: int | None
    number: int | None
    device: int | None = None
    """The only one that this process uses, where each device of a host has a process; None for all of the host."""


def start_processes(coordinator: str | None, num_processes: int | None, process_id: int | None) -> Watchdog:
    """Joins the processes of a run into one JAX program; does nothing for a run of one process.

    Must come before anything asks for devices. Train within the context of what it returns. Raises `UserError` (USAGE,
    TRY_AGAIN when a process does not come, CONFIG when one has other versions), see `find_place` and `Watchdog.join`.
    """
    place = find_place(coordinator, num_processes, process_id)
    if place is None:
        return Watchdog()
    watchdog, address = Watchdog.join(place.coordinator, place.n_processes, place.number, _versions())
    # An empty list is all devices of the host; left out, JAX would take one a process under SLURM and Open MPI.
    devices = [] if place.device is None else [place.device]
    if "JAX_LOCAL_DEVICE_IDS" in os.environ:
        devices = None
    # Its handler of SIGTERM would replace ours, and `Watchdog.stops` does its work.
    jax.config.update("jax_enable_preemption_service", False)
    # JAX's own heartbeat (100 s) is slower than the watchdog's, as it ends processes without a word that helps.
    jax.distributed.initialize(
        address, place.n_processes, place.number, local_device_ids=devices, shutdown_timeout_seconds=60
    )
    return watchdog


def find_place(
    coordinator: str | None = None, num_processes: int | None = None, process_id: int | None = None
) -> Place | None:
    """Returns this process's place, None for a run of one process.

    From the command line, where all three or none must be given; else from the environment: what a launcher says
    (SLURM, Open MPI, torchrun, TPU pods), each value of which JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and
    JAX_PROCESS_ID (without a launcher also JOB_COMPLETION_INDEX, of Kubernetes) replace. Raises `UserError` (USAGE)
    when something is missing or does not fit.
    """
    given = Place(coordinator, num_processes, process_id)
    where = "command line"
    if given[:3] == (None, None, None):
        given, where = _from_environment(), "environment"
        if given is None:
            return None
    elif None in given[:3]:
        fix = "give --coordinator, --num-processes and --process-id together"
        raise UserError(ExitCode.USAGE, "half a process group", where, fix)
    if given.n_processes == 1:
        return None
    if not 0 <= given.number < given.n_processes:
        what = f"process {given.number} of {given.n_processes}"
        raise UserError(ExitCode.USAGE, what, where, f"numbers are 0 to {given.n_processes - 1}")
    port = re.fullmatch(r"(?:[^:\s]+|\[[^\]\s]+\]):(\d{1,5})", given.coordinator)
    if not port or not 0 < int(port[1]) < 2**16:
        what = f"{quote(given.coordinator)} is no address"
        raise UserError(ExitCode.USAGE, what, where, "give HOST:PORT of process 0, such as host0:1234")
    return given


def _versions() -> dict[str, str]:
    """What the program of a process depends on beside config and data, by name."""
    versions = {"gpt2_flax": gpt2_flax.__version__, "python": platform.python_version()}
    for package in _PACKAGES + _BACKENDS:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    settings = {name.upper(): str(getattr(jax.config, name, None)) for name in _SETTINGS}
    return {f"the version of {name}": version for name, version in versions.items()} | settings


def _from_environment() -> Place | None:
    place = next(filter(None, (launcher() for launcher in (_slurm, _open_mpi, _torchrun, _tpu_pod))), None)
    said = {COORDINATOR: os.environ.get(COORDINATOR) or None}
    said |= {name: _number(name) for name in (NUM_PROCESSES, PROCESS_ID)}
    if place is None:
        if set(said.values()) == {None}:
            return None
        place = Place(None, None, _number("JOB_COMPLETION_INDEX"))
    merged = {name: place[i] if value is None else value for i, (name, value) in enumerate(said.items())}
    missing = [name for name, value in merged.items() if value is None]
    if missing and merged[NUM_PROCESSES] != 1:
        raise UserError(ExitCode.USAGE, "half a process group", "environment", f"set {' and '.join(missing)} too")
    return Place(*merged.values(), place.device)


def _slurm() -> Place | None:
    n_processes = _number("SLURM_STEP_NUM_TASKS") or 1  # of srun; `salloc` and `sbatch` have only SLURM_NTASKS
    if n_processes == 1 or "SLURM_PROCID" not in os.environ:
        return None
    # The first of node[001-004,7],other is node001.
    nodes = os.environ["SLURM_STEP_NODELIST"]
    host = "".join(re.match(r"([^,\[]*)(?:\[([^],-]+)[^]]*\]([^,]*))?", nodes).groups(""))
    coordinator = f"{host}:{_port(os.environ['SLURM_JOB_ID'] + '.' + os.environ.get('SLURM_STEP_ID', ''))}"
    device = _device("SLURM_LOCALID", n_processes > (_number("SLURM_STEP_NUM_NODES") or 1))
    return Place(coordinator, n_processes, _number("SLURM_PROCID"), device)


def _open_mpi() -> Place | None:
    n_processes, here = _number("OMPI_COMM_WORLD_SIZE") or 1, _number("OMPI_COMM_WORLD_LOCAL_SIZE") or 1
    if n_processes == 1:
        return None
    # Version 4 tells where mpirun is, which starts process 0 beside it; version 5 does not.
    uri = os.environ.get("OMPI_MCA_orte_hnp_uri", "")  # noqa: SIM112, so it is spelled
    found = re.search(r"tcp://([^,:]+)|tcp6://\[([^,\]]+)", uri)
    host = None
    if n_processes == here:
        host = "localhost"
    elif found:
        host = found[1] or f"[{found[2]}]"
    coordinator = host and f"{host}:{_port(os.environ.get('PMIX_NAMESPACE') or uri)}"
    device = _device("OMPI_COMM_WORLD_LOCAL_RANK", here > 1)
    return Place(coordinator, n_processes, _number("OMPI_COMM_WORLD_RANK"), device)


def _torchrun() -> Place | None:
    n_processes, host, port = _number("WORLD_SIZE") or 1, os.environ.get("MASTER_ADDR"), _number("MASTER_PORT")
    if n_processes == 1 or not host or not port:
        return None
    port += os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"  # the launcher itself listens on that port
    device = _device("LOCAL_RANK", (_number("LOCAL_WORLD_SIZE") or 1) > 1)
    return Place(f"{host}:{port}", n_processes, _number("RANK"), device)


def _tpu_pod() -> Place | None:
    hosts = os.environ.get("TPU_WORKER_HOSTNAMES", "").split(",")
    n_processes = len(hosts) * (_number("MEGASCALE_NUM_SLICES") or 1)
    if n_processes == 1:
        return None
    host = os.environ.get("MEGASCALE_COORDINATOR_ADDRESS", hosts[0]).split(":")[0]
    number = _number("TPU_WORKER_ID")
    if number is not None:
        number += len(hosts) * (_number("MEGASCALE_SLICE_ID") or 0)
    return Place(f"{host}:8476", n_processes, number)


def _device(variable: str, several: bool) -> int | None:
    alone = os.environ.get("CUDA_VISIBLE_DEVICES", ",").count(",") == 0  # the launcher has chosen it already
    return None if alone or not several else _number(variable)


def _number(variable: str) -> int | None:
    value = os.environ.get(variable) or None
    if value is not None and not value.isdecimal():
        raise UserError(ExitCode.USAGE, f"{quote(value)} is no number", f"variable {variable}", "correct or unset it")
    return value and int(value)


def _port(job: str) -> int:
    """Returns a port that all processes of a job, and hardly those of another, arrive at; below the ephemeral ones."""
    return 20000 + zlib.crc32(job.encode()) % 10000
