"""The device mesh `data x fsdp x tensor`, and how several processes become one program."""

import os
from collections.abc import Sequence

import jax
from jax.sharding import AxisType, Mesh

from gpt2_flax.config import MeshConfig
from gpt2_flax.errors import ExitCode, UserError

AXES = ("data", "fsdp", "tensor")
BATCH_AXES = ("data", "fsdp")


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Returns the mesh over `devices` (all of them when left out).

    Raises `UserError` (CONFIG) when the sizes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = [config.data, config.fsdp, config.tensor]
    if config.data == -1:
        sizes[0] = len(devices) // (config.fsdp * config.tensor)
    if sizes[0] * sizes[1] * sizes[2] != len(devices):
        mesh = f"data {config.data} x fsdp {config.fsdp} x tensor {config.tensor}"
        fix = "choose sizes whose product is the number of devices, or leave mesh.data at -1"
        raise UserError(ExitCode.CONFIG, f"mesh {mesh} does not fit {len(devices)} devices", "section [mesh]", fix)
    # Auto axes on purpose: jax.make_mesh makes Explicit ones unless told, and kernels do not carry those yet.
    return jax.make_mesh(tuple(sizes), AXES, axis_types=(AxisType.Auto,) * 3, devices=devices)


def start_processes(coordinator: str | None, num_processes: int | None, process_id: int | None) -> None:
    """Joins the processes of a run into one JAX program; does nothing for a run of one process.

    Either all three are given, or the launcher's environment (SLURM, Open MPI, a TPU pod) says them. Must come
    before anything asks for devices. Raises `UserError` (USAGE) when only some are given.
    """
    given = [value is not None for value in (coordinator, num_processes, process_id)]
    if any(given) and not all(given):
        fix = "give --coordinator, --num-processes and --process-id together"
        raise UserError(ExitCode.USAGE, "half a process group", "command line", fix)
    if all(given) or _launched_as_one_of_many():
        # A dead peer is noticed within half a minute instead of the default 100 s.
        jax.distributed.initialize(coordinator, num_processes, process_id, heartbeat_timeout_seconds=30)


def _launched_as_one_of_many() -> bool:
    for variable in ("SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE"):
        if int(os.environ.get(variable, "1")) > 1:
            # `salloc` sets SLURM_NTASKS for its shell too; only a process started by srun has SLURM_PROCID.
            return variable != "SLURM_NTASKS" or "SLURM_STEP_NUM_TASKS" in os.environ
    return "," in os.environ.get("TPU_WORKER_HOSTNAMES", "")
