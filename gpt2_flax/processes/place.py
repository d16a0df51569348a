"""Find the number of this process in its run and the address of process 0: from the command line or the launcher.

`jax.distributed.initialize` recognizes most of these launchers itself. But it does not return the address, and the hub
must listen at that address before JAX starts.
"""

import os
import re
import sys
import zlib
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from gpt2_flax.errors import ExitCode, UserError, printable, quote
from gpt2_flax.processes.tpu_metadata import may_be_tpu_vm, server, slice_of_this_vm

ATTEMPT = "GPT2_FLAX_ATTEMPT"  # environment variable; replaces the launcher's own count of attempts
_VARIABLES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
_TPU_PORT = 8482  # the port that JAX uses
_TRIED = (
    "SLURM (SLURM_STEP_NUM_TASKS, SLURM_PROCID)",
    "Open MPI (OMPI_COMM_WORLD_SIZE)",
    "torchrun (WORLD_SIZE, MASTER_ADDR, MASTER_PORT)",
    "TPU pods (TPU_WORKER_HOSTNAMES)",
    "the metadata server of TPU VMs",
    "Kubernetes (JOB_COMPLETION_INDEX)",
)


class Place(NamedTuple):
    """The number of a process in its run, the number of processes, and the address of process 0."""

    coordinator: str
    """HOST:PORT of process 0."""
    n_processes: int
    number: int
    device: int | None = None
    """The only device of this process, if each device of a host has its own process; None: all devices of the host."""
    attempt: str = ""
    """A name of this start of the run, the same in all processes; empty if the launcher does not count starts."""

    @property
    def host(self) -> str:
        return self.coordinator.rsplit(":", 1)[0].strip("[]")

    @property
    def port(self) -> int:
        """The port of the hub; JAX's coordinator uses the next port."""
        return int(self.coordinator.rsplit(":", 1)[1])


class _Found(NamedTuple):
    """The fields of a `Place` that a launcher knows."""

    coordinator: str | None = None
    n_processes: int | None = None
    number: int | None = None
    device: int | None = None
    attempt: str = ""


def find_place(
    coordinator: str | None = None, num_processes: int | None = None, process_id: int | None = None
) -> Place | None:
    """Return the place of this process, or None for a run of one process.

    Without arguments the place comes from the environment: from SLURM, Open MPI, torchrun, the variables of a TPU pod,
    or the metadata server of a TPU VM. JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID replace single
    values of the launcher. Without a launcher, JOB_COMPLETION_INDEX of Kubernetes is the number.

    Args:
        coordinator: HOST:PORT of process 0. Give all three arguments or none.
        num_processes: the number of processes.
        process_id: the number of this process.

    Raises:
        UserError: USAGE, when a value is missing or invalid.
    """
    found, where = _Found(coordinator, num_processes, process_id), "command line"
    if found == _Found():
        found, where = _from_environment(), "environment"
    elif None in found[:3]:
        fix = "give --coordinator, --num-processes and --process-id together"
        raise UserError(ExitCode.USAGE, "incomplete process group", where, fix)
    if found is None or found.n_processes == 1:
        return None
    place = Place(**found._asdict())
    if not 0 <= place.number < place.n_processes:
        what = f"process {place.number} of {place.n_processes}"
        raise UserError(ExitCode.USAGE, what, where, f"numbers are 0 to {place.n_processes - 1}")
    port = re.fullmatch(r"(?:[^:\s]+|\[[^\]\s]+\]):(\d{1,5})", place.coordinator)
    if not port or not 0 < int(port[1]) < 2**16 - 1:
        what = f"{quote(place.coordinator)} is no address"
        fix = "give HOST:PORT of process 0, such as host0:1234; PORT + 1 is used too, so PORT is at most 65534"
        raise UserError(ExitCode.USAGE, what, where, fix)
    return place._replace(attempt=os.environ.get(ATTEMPT) or place.attempt)


def _from_environment() -> _Found | None:
    launchers = (_slurm, _open_mpi, _torchrun, _tpu_pod, _tpu_vm)
    found = next(filter(None, (launcher() for launcher in launchers)), None)
    coordinator, n_processes, number = _VARIABLES
    given = _Found(os.environ.get(coordinator) or None, _number(n_processes), _number(number))
    if found is None:
        if given == _Found():
            return None
        found = _Found(number=_number("JOB_COMPLETION_INDEX"))
    found = found._replace(**{field: value for field, value in given._asdict().items() if value not in (None, "")})
    missing = [variable for variable, value in zip(_VARIABLES, found[:3], strict=True) if value is None]
    if missing and found.n_processes != 1:
        where = f"environment; tried {', '.join(_TRIED)}"
        raise UserError(ExitCode.USAGE, "incomplete process group", where, f"set {' and '.join(missing)} too")
    return found


def _slurm() -> _Found | None:
    n_processes = _number("SLURM_STEP_NUM_TASKS") or 1  # set by srun; `salloc` and `sbatch` set only SLURM_NTASKS
    if n_processes == 1 or "SLURM_PROCID" not in os.environ:
        return None
    # The first host of node[001-004,7],other is node001.
    nodes = re.match(r"([^,\[]*)(?:\[([^],-]+)[^]]*\]([^,]*))?", os.environ["SLURM_STEP_NODELIST"])
    host = "".join(nodes.groups("")) if nodes else ""
    step = os.environ["SLURM_JOB_ID"] + "." + os.environ.get("SLURM_STEP_ID", "")
    device = _device("SLURM_LOCALID", n_processes > (_number("SLURM_STEP_NUM_NODES") or 1))
    attempt = f"{step}.{os.environ.get('SLURM_RESTART_COUNT', '0')}"
    return _Found(f"{host}:{_port(step)}", n_processes, _number("SLURM_PROCID"), device, attempt)


def _open_mpi() -> _Found | None:
    n_processes, here = _number("OMPI_COMM_WORLD_SIZE") or 1, _number("OMPI_COMM_WORLD_LOCAL_SIZE") or 1
    if n_processes == 1:
        return None
    # Version 4 names the host of mpirun, which starts process 0 on the same host. Version 5 does not name it.
    uri = os.environ.get("OMPI_MCA_orte_hnp_uri", "")  # noqa: SIM112 - the real spelling
    address = re.search(r"tcp://([^,:]+)|tcp6://\[([^,\]]+)", uri)
    host = "localhost" if n_processes == here else address and (address[1] or f"[{address[2]}]")
    attempt = os.environ.get("PMIX_NAMESPACE") or uri  # another one for each mpirun
    coordinator, device = host and f"{host}:{_port(attempt)}", _device("OMPI_COMM_WORLD_LOCAL_RANK", here > 1)
    return _Found(coordinator, n_processes, _number("OMPI_COMM_WORLD_RANK"), device, attempt)


def _torchrun() -> _Found | None:
    n_processes, host, port = _number("WORLD_SIZE") or 1, os.environ.get("MASTER_ADDR"), _number("MASTER_PORT")
    if n_processes == 1 or not host or not port:
        return None
    port += os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"  # torchrun itself listens on MASTER_PORT
    device = _device("LOCAL_RANK", (_number("LOCAL_WORLD_SIZE") or 1) > 1)
    return _Found(f"{host}:{port}", n_processes, _number("RANK"), device)


def _tpu_pod() -> _Found | None:
    hosts, number = (os.environ.get(name, "") for name in ("TPU_WORKER_HOSTNAMES", "TPU_WORKER_ID"))
    if " " in hosts + number:  # without a TPU, libtpu sets both variables to a warning; child processes inherit them
        return None
    return _slices(hosts.split(","), _number("TPU_WORKER_ID"), os.environ)


def _tpu_vm() -> _Found | None:
    """Ask the metadata server, as TPU VMs have no launcher."""
    values = [os.environ.get(variable) for variable in _VARIABLES]
    if all(values) or values[1] == "1" or not may_be_tpu_vm():
        return None
    try:
        found = slice_of_this_vm()
    except OSError as error:
        line, reason = f"warning: this TPU VM trains alone: its metadata server {server()}", printable(str(error))
        fix = "if there are others, give --coordinator, --num-processes and --process-id"
        print(f"{line} does not answer ({reason}); {fix}", file=sys.stderr, flush=True)
        return None
    return found and _slices(found.hosts, found.number, {**found.variables, **os.environ})


def _slices(hosts: Sequence[str], number: int | None, variables: Mapping[str, str]) -> _Found | None:
    """Return the place of host `number` of a TPU slice; several slices may form one run."""
    n_slices, slice_id = (
        _as_number(name, variables.get(name)) for name in ("MEGASCALE_NUM_SLICES", "MEGASCALE_SLICE_ID")
    )
    n_processes = len(hosts) * (n_slices or 1)
    if n_processes == 1:
        return None
    host = (variables.get("MEGASCALE_COORDINATOR_ADDRESS") or hosts[0]).split(":")[0]
    if number is not None:
        number += len(hosts) * (slice_id or 0)
    return _Found(f"{host}:{_TPU_PORT}", n_processes, number)


def _device(variable: str, several: bool) -> int | None:
    """Return the device of this process if a host has several processes and the launcher has not chosen a device."""
    one_is_visible = os.environ.get("CUDA_VISIBLE_DEVICES", ",").count(",") == 0
    return _number(variable) if several and not one_is_visible else None


def _number(variable: str) -> int | None:
    return _as_number(variable, os.environ.get(variable))


def _as_number(variable: str, value: str | None) -> int | None:
    if value and not value.isdecimal():
        raise UserError(ExitCode.USAGE, f"{quote(value)} is no number", f"variable {variable}", "correct or unset it")
    return int(value) if value else None


def _port(job: str) -> int:
    """Return an even port that is the same in all processes of a job, and most likely another one for other jobs."""
    return 20000 + zlib.crc32(job.encode()) % 5000 * 2
