"""The device mesh `data x fsdp x tensor`."""

from collections.abc import Sequence

import jax
from jax.sharding import AxisType, Mesh

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


def platform() -> str:
    """Returns "cpu", "gpu" or "tpu": what the mesh in force consists of, of devices that are not here too."""
    mesh = jax.sharding.get_abstract_mesh()
    name = jax.default_backend() if mesh.empty else mesh.abstract_device.platform
    return "gpu" if name in ("cuda", "rocm") else name
