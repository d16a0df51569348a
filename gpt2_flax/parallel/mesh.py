"""The device mesh `data x fsdp x tensor`."""

from collections.abc import Sequence

import jax
from jax.sharding import AbstractMesh, AxisType, Mesh

from gpt2_flax.config import MeshConfig
from gpt2_flax.errors import ExitCode, UserError

AXES = ("data", "fsdp", "tensor")
BATCH_AXES = ("data", "fsdp")


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Returns the mesh over `devices` (all of them when left out); a size that is "auto" is 1, see `auto_mesh`.

    Raises `UserError` (CONFIG) when the sizes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = [config.data, *(1 if size == "auto" else size for size in (config.fsdp, config.tensor))]
    if config.data == -1:
        sizes[0] = len(devices) // (sizes[1] * sizes[2])
    if sizes[0] * sizes[1] * sizes[2] != len(devices):
        mesh = f"data {config.data} x fsdp {sizes[1]} x tensor {sizes[2]}"
        fix = "choose sizes whose product is the number of devices, or leave mesh.data at -1"
        raise UserError(ExitCode.CONFIG, f"mesh {mesh} does not fit {len(devices)} devices", "section [mesh]", fix)
    # Auto axes on purpose: jax.make_mesh makes Explicit ones unless told, and kernels do not carry those yet.
    return jax.make_mesh(tuple(sizes), AXES, axis_types=(AxisType.Auto,) * 3, devices=devices)


def current_mesh() -> AbstractMesh | None:
    """Return the mesh that `jax.set_mesh` has set, or None without one: models read it here and nowhere else."""
    mesh = jax.sharding.get_abstract_mesh()
    return None if mesh.empty else mesh


def platform() -> str:
    """Return "cpu", "gpu" or "tpu": the devices of the current mesh, which may be absent here, or JAX's default."""
    mesh = current_mesh()
    name = jax.default_backend() if mesh is None else mesh.abstract_device.platform
    return "gpu" if name in ("cuda", "rocm") else name
