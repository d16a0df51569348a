"""Which place a process has in a run, and on which machine process 0 is: from the command line or the launcher."""

import os
import re
import sys
import zlib
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from gpt2_flax.errors import ExitCode, UserError, printable, quote
from gpt2_flax.processes.tpu_metadata import may_be_tpu_vm, server, slice_of_this_vm

COORDINATOR, NUM_PROCESSES, PROCESS_ID = "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"
ATTEMPT = "GPT2_FLAX_ATTEMPT"  # in the environment, as the launcher's own count, if it has one
TPU_PORT = 8482  # JAX's own choice


class Place(NamedTuple):
    """The number of a process in its run, the number of processes, and how to reach process 0."""

    coordinator: str | None
    """HOST:PORT of process 0."""
    n_processes: int | None
    number: int | None
    device: int | None = None
    """The only one that this process uses, where each device of a host has a process; None for all of the host."""
    attempt: str = ""
    """Which start of the run this is, the same in all its processes; empty where nobody counts them."""

    @property
    def host(self) -> str:
        return self.coordinator.rsplit(":", 1)[0].strip("[]")

    @property
    def port(self) -> int:
        """Where the hub listens; JAX's coordinator takes the next one."""
        return int(self.coordinator.rsplit(":", 1)[1])


def find_place(
    coordinator: str | None = None, num_processes: int | None = None, process_id: int | None = None
) -> Place | None:
    """Returns this process's place, None for a run of one process.

    From the command line, where all three or none must be given; else from the environment: what a launcher says
    (SLURM, Open MPI, torchrun, TPU pods; on a TPU VM its metadata server), each value of which
    JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID (without a launcher also JOB_COMPLETION_INDEX, of
    Kubernetes) replace. Raises `UserError` (USAGE) when something is missing or does not fit.
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
    if not port or not 0 < int(port[1]) < 2**16 - 1:
        what = f"{quote(given.coordinator)} is no address"
        fix = "give HOST:PORT of process 0, such as host0:1234; PORT + 1 is used too, so PORT is at most 65534"
        raise UserError(ExitCode.USAGE, what, where, fix)
    return given._replace(attempt=os.environ.get(ATTEMPT) or given.attempt)


def _from_environment() -> Place | None:
    launchers = (_slurm, _open_mpi, _torchrun, _tpu_pod, _tpu_vm)
    place = next(filter(None, (launcher() for launcher in launchers)), None)
    said = {COORDINATOR: os.environ.get(COORDINATOR) or None}
    said |= {name: _number(name) for name in (NUM_PROCESSES, PROCESS_ID)}
    if place is None:
        if set(said.values()) == {None}:
            return None
        place = Place(None, None, _number("JOB_COMPLETION_INDEX"))
    merged = {name: place[i] if value is None else value for i, (name, value) in enumerate(said.items())}
    missing = [name for name, value in merged.items() if value is None]
    if missing and merged[NUM_PROCESSES] != 1:
        where = f"environment; tried {', '.join(_TRIED)}"
        raise UserError(ExitCode.USAGE, "half a process group", where, f"set {' and '.join(missing)} too")
    return Place(*merged.values(), place.device, place.attempt)


_TRIED = (
    "SLURM (SLURM_STEP_NUM_TASKS, SLURM_PROCID)",
    "Open MPI (OMPI_COMM_WORLD_SIZE)",
    "torchrun (WORLD_SIZE, MASTER_ADDR, MASTER_PORT)",
    "TPU pods (TPU_WORKER_HOSTNAMES)",
    "the metadata server of TPU VMs",
    "Kubernetes (JOB_COMPLETION_INDEX)",
)


def _slurm() -> Place | None:
    n_processes = _number("SLURM_STEP_NUM_TASKS") or 1  # of srun; `salloc` and `sbatch` have only SLURM_NTASKS
    if n_processes == 1 or "SLURM_PROCID" not in os.environ:
        return None
    # The first of node[001-004,7],other is node001.
    nodes = os.environ["SLURM_STEP_NODELIST"]
    host = "".join(re.match(r"([^,\[]*)(?:\[([^],-]+)[^]]*\]([^,]*))?", nodes).groups(""))
    step = os.environ["SLURM_JOB_ID"] + "." + os.environ.get("SLURM_STEP_ID", "")
    coordinator, attempt = f"{host}:{_port(step)}", f"{step}.{os.environ.get('SLURM_RESTART_COUNT', '0')}"
    device = _device("SLURM_LOCALID", n_processes > (_number("SLURM_STEP_NUM_NODES") or 1))
    return Place(coordinator, n_processes, _number("SLURM_PROCID"), device, attempt)


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
    attempt = os.environ.get("PMIX_NAMESPACE") or uri  # of this mpirun
    coordinator = host and f"{host}:{_port(attempt)}"
    device = _device("OMPI_COMM_WORLD_LOCAL_RANK", here > 1)
    return Place(coordinator, n_processes, _number("OMPI_COMM_WORLD_RANK"), device, attempt)


def _torchrun() -> Place | None:
    n_processes, host, port = _number("WORLD_SIZE") or 1, os.environ.get("MASTER_ADDR"), _number("MASTER_PORT")
    if n_processes == 1 or not host or not port:
        return None
    port += os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"  # the launcher itself listens on that port
    device = _device("LOCAL_RANK", (_number("LOCAL_WORLD_SIZE") or 1) > 1)
    return Place(f"{host}:{port}", n_processes, _number("RANK"), device)


def _tpu_pod() -> Place | None:
    hosts, number = (os.environ.get(name, "") for name in ("TPU_WORKER_HOSTNAMES", "TPU_WORKER_ID"))
    if " " in hosts + number:  # without a TPU libtpu sets these of its process, and so of its children, to a warning
        return None
    return _slices(hosts.split(","), _number("TPU_WORKER_ID"), os.environ)


def _tpu_vm() -> Place | None:
    """One of a slice of TPU VMs, which their metadata server knows; they have no launcher."""
    named = [os.environ.get(name) for name in (COORDINATOR, NUM_PROCESSES, PROCESS_ID)]
    if all(named) or named[1] == "1" or not may_be_tpu_vm():
        return None
    try:
        found = slice_of_this_vm()
    except OSError as error:
        line, reason = f"warning: this TPU VM trains alone: its metadata server {server()}", printable(str(error))
        fix = "if there are others, give --coordinator, --num-processes and --process-id"
        print(f"{line} does not answer ({reason}); {fix}", file=sys.stderr, flush=True)
        return None
    return found and _slices(found.hosts, found.number, {**found.variables, **os.environ})


def _slices(hosts: Sequence[str], number: int | None, variables: Mapping[str, str]) -> Place | None:
    n_slices, slice_id = (
        _as_number(name, variables.get(name)) for name in ("MEGASCALE_NUM_SLICES", "MEGASCALE_SLICE_ID")
    )
    n_processes = len(hosts) * (n_slices or 1)
    if n_processes == 1:
        return None
    host = (variables.get("MEGASCALE_COORDINATOR_ADDRESS") or hosts[0]).split(":")[0]
    if number is not None:
        number += len(hosts) * (slice_id or 0)
    return Place(f"{host}:{TPU_PORT}", n_processes, number)


def _device(variable: str, several: bool) -> int | None:
    alone = os.environ.get("CUDA_VISIBLE_DEVICES", ",").count(",") == 0  # the launcher has chosen it already
    return None if alone or not several else _number(variable)


def _number(variable: str) -> int | None:
    return _as_number(variable, os.environ.get(variable))


def _as_number(variable: str, value: str | None) -> int | None:
    if value and not value.isdecimal():
        raise UserError(ExitCode.USAGE, f"{quote(value)} is no number", f"variable {variable}", "correct or unset it")
    return int(value) if value else None


def _port(job: str) -> int:
    """Returns a port that all processes of a job, and hardly others, arrive at; the next is theirs too."""
    return 20000 + zlib.crc32(job.encode()) % 5000 * 2
