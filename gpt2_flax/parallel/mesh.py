"""The device mesh `data x fsdp x tensor`."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
from jax.sharding import AbstractMesh, AxisType, Mesh

from gpt2_flax.errors import ExitCode, UserError
from gpt2_flax.parallel.devices import Device

AXES = ("data", "fsdp", "tensor")
BATCH_AXES = ("data", "fsdp")


class MeshSizes(NamedTuple):
    """The number of devices on each axis of a mesh."""

    data: int = -1
    """Replicas of the model; -1: all devices that the other axes leave."""
    fsdp: int = 1
    tensor: int = 1


def make_mesh(sizes: MeshSizes = MeshSizes(), devices: Sequence[Device] | None = None) -> Mesh:  # noqa: B008
    """Return the mesh over `devices`, by default over all devices.

    Raises:
        UserError: CONFIG, when the product of the sizes is not the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    data, fsdp, tensor = sizes
    if data == -1:
        data = len(devices) // (fsdp * tensor)
    if data * fsdp * tensor != len(devices):
        mesh = f"data {sizes.data} x fsdp {fsdp} x tensor {tensor}"
        fix = "choose sizes whose product is the number of devices, or leave mesh.data at -1"
        raise UserError(ExitCode.CONFIG, f"mesh {mesh} does not fit {len(devices)} devices", "section [mesh]", fix)
    # Auto axes on purpose: jax.make_mesh makes Explicit axes by default, and kernels do not support them yet.
    return jax.make_mesh((data, fsdp, tensor), AXES, axis_types=(AxisType.Auto,) * 3, devices=devices)


def current_mesh() -> AbstractMesh | None:
    """Return the mesh that `jax.set_mesh` has set, or None without one: models read it here and nowhere else."""
    mesh = jax.sharding.get_abstract_mesh()
    return None if mesh.empty else mesh


def platform() -> str:
    """Return "cpu", "gpu" or "tpu": the devices of the current mesh, which may be absent here, or JAX's default."""
    mesh = current_mesh()
    name = jax.default_backend() if mesh is None else mesh.abstract_device.platform
    return "gpu" if name in ("cuda", "rocm") else name
