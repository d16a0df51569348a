"""Devices that are absent from this machine: XLA compiles for them from a description, but cannot run the program.

libtpu has the descriptions of TPUs; this module has the descriptions of GPUs.
"""

import contextlib
import importlib.util
import math
import os
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
from jax.experimental import topologies

from gpt2_flax import nvidia
from gpt2_flax.accelerators import silence_libtpu
from gpt2_flax.errors import ExitCode, UserError, quote
from gpt2_flax.parallel.devices import Device, bandwidth

KNOWN = (
    "v5e:2x4, v6e:16x16 (TPU, chips along two sides), v4:2x2x4, v5p:4x4x4 (three sides), "
    "a100-40gb:8, a100:8, h100:8, h200:8 (GPUs of a host), h200:32x8 (hosts x GPUs), cpu:8 (simulated here)"
)
_MOST_DEVICES = 10_000  # the largest TPU pod has 9,216
_MOST_CPU_DEVICES = 256


class Tpu(NamedTuple):
    """A kind of TPU."""

    kind: str
    """The name in JAX."""
    sides: int
    """Dimensions of a topology."""


_TPUS = {"v4": Tpu("TPU v4", 3), "v5e": Tpu("TPU v5 lite", 2), "v5p": Tpu("TPU v5", 3), "v6e": Tpu("TPU v6 lite", 2)}


class Gpu(NamedTuple):
    """What XLA must know of a GPU, from NVIDIA's data sheets and architecture white papers."""

    kind: str
    """The name in the driver and in JAX."""
    capability: tuple[int, int]
    memory: int
    """Bytes, as the driver counts them."""
    multiprocessors: int
    lanes: int
    """float32 units of a multiprocessor."""
    shared: int
    """Bytes of shared memory of a multiprocessor; a block can use all but 1 KiB."""
    l2: int
    gigahertz: float


_MIB = 2**20
GPUS = {
    "a100-40gb": Gpu("NVIDIA A100-SXM4-40GB", (8, 0), 40960 * _MIB, 108, 64, 164 * 1024, 40 * _MIB, 1.41),
    "a100": Gpu("NVIDIA A100-SXM4-80GB", (8, 0), 81920 * _MIB, 108, 64, 164 * 1024, 40 * _MIB, 1.41),
    "h100": Gpu("NVIDIA H100 80GB HBM3", (9, 0), 81559 * _MIB, 132, 128, 228 * 1024, 50 * _MIB, 1.98),
    "h200": Gpu("NVIDIA H200", (9, 0), 143771 * _MIB, 132, 128, 228 * 1024, 50 * _MIB, 1.98),
}
# JAX's compilers for GPUs, in JAX's order, with the oldest versions of CUDA and cuDNN that they accept.
_PLUGINS = {
    "jax_plugins.xla_cuda13": ((13, 0, 0), (9, 12, 0)),
    "jax_plugins.xla_cuda12": ((12, 9, 0), (9, 10, 0)),
}


def devices_for(name: str | None) -> Sequence[Device]:
    """Return the devices of a topology to compile for, or the devices of this machine for None.

    Call this before anything asks JAX for devices: with a name, JAX does not use the accelerators of this machine.

    Args:
        name: a topology such as `v5e:2x4` or `h200:32x8`, see KNOWN.

    Raises:
        UserError: USAGE, for an unknown name or a missing extra.
    """
    if name is None:
        return jax.devices()
    kind, sizes = _parse(name)
    if kind == "cpu":
        return _cpu_devices(math.prod(sizes))
    jax.config.update("jax_platforms", "cpu")
    return _gpu_devices(GPUS[kind], sizes) if kind in GPUS else _tpu_devices(kind, sizes)


def kind_and_count(name: str) -> tuple[str, int]:
    """Return the kind of a topology's devices, as JAX names it, and their number; no compiler need be installed.

    Raises:
        UserError: USAGE, for an unknown name.
    """
    kind, sizes = _parse(name)
    of_jax = (GPUS | _TPUS)[kind].kind if kind != "cpu" else kind
    return of_jax, math.prod(sizes)


def _parse(name: str) -> tuple[str, tuple[int, ...]]:
    """Return the kind and the sides of a topology, such as `v5e` and (2, 4)."""
    kind, _, shape = name.partition(":")
    sizes: tuple[int, ...] = (
        tuple(map(int, shape.split("x"))) if re.fullmatch(r"[1-9]\d{0,5}(x[1-9]\d{0,5})*", shape) else ()
    )
    n_sides = {"cpu": (1,), **dict.fromkeys(GPUS, (1, 2)), **{kind: (tpu.sides,) for kind, tpu in _TPUS.items()}}
    if len(sizes) not in n_sides.get(kind, ()):
        raise UserError(ExitCode.USAGE, "unknown topology", quote(name), f"take one such as {KNOWN}")
    most = _MOST_CPU_DEVICES if kind == "cpu" else _MOST_DEVICES
    if math.prod(sizes) > most:
        what = f"topology of {math.prod(sizes):,} devices"
        raise UserError(ExitCode.USAGE, what, quote(name), f"take at most {most:,}")
    return kind, sizes


def _cpu_devices(count: int) -> Sequence[Device]:
    jax.config.update("jax_platforms", "cpu")
    if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
        with contextlib.suppress(RuntimeError):  # JAX has made its devices already
            jax.config.update("jax_num_cpu_devices", count)
    devices = jax.devices("cpu")
    if len(devices) < count:
        fix = f"set XLA_FLAGS=--xla_force_host_platform_device_count={count}"
        raise UserError(ExitCode.USAGE, f"only {len(devices)} simulated CPU devices", f"cpu:{count}", fix)
    return devices[:count]


def _tpu_devices(kind: str, sizes: tuple[int, ...]) -> Sequence[Device]:
    _installed(("libtpu",), "tpu")
    silence_libtpu()  # no TPU of this machine is used
    # Hosts have four chips, or one chip if a side of the topology is odd.
    options: dict[str, Any] = {"chips_per_host_bounds": (1, 1, 1) if any(size % 2 for size in sizes[:2]) else (2, 2, 1)}
    if kind == "v4":
        options["chip_config_name"] = "megacore"  # JAX runs both cores of a chip as one device
    name = f"{kind}:{'x'.join(map(str, sizes))}"
    try:
        return topologies.get_topology_desc(platform="tpu", topology_name=name, **options).devices
    except RuntimeError as error:
        if "INVALID_ARGUMENT" not in str(error):
            raise
        fix = f"take one such as {KNOWN}"
        raise UserError(ExitCode.USAGE, f"no such TPU: {str(error).splitlines()[0]}", quote(name), fix) from None


def _gpu_devices(gpu: Gpu, sizes: tuple[int, ...]) -> Sequence[Device]:
    plugin = _installed(tuple(_PLUGINS), nvidia.EXTRAS[13])
    # JAX cannot read cached programs of absent GPUs, and would warn about each.
    jax.config.update("jax_enable_compilation_cache", False)
    hosts, gpus = sizes if len(sizes) == 2 else (1, sizes[0])
    description = _description(gpu, *_PLUGINS[plugin])
    return topologies.get_topology_desc(
        platform="cuda", topology_name="", topology=f"1x{hosts}x{gpus}", target_config=description
    ).devices


def _installed(modules: tuple[str, ...], extra: str) -> str:
    """Return the first of `modules` that is installed; raise `UserError` (USAGE) that names the extra if none is."""
    for module in modules:
        with contextlib.suppress(ModuleNotFoundError):  # the package that holds the module
            if importlib.util.find_spec(module) is not None:
                return module
    fix = f"install it with `pip install 'gpt2_flax[{extra}]'`; no accelerator is needed"
    what = "the compiler for this topology is not installed"
    raise UserError(ExitCode.USAGE, what, modules[0].split(".")[-1], fix)


def _description(gpu: Gpu, cuda: tuple[int, ...], cudnn: tuple[int, ...]) -> str:
    """Return XLA's `GpuTargetConfigProto` as text."""
    major, minor = gpu.capability
    features = " feature_extension: ACCELERATED_FEATURES" if major >= 9 else ""
    toolkit, dnn = (".".join(map(str, version)) for version in (cuda, cudnn))
    return f"""
gpu_device_info {{
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: {48 * 1024}
  shared_memory_per_block_optin: {gpu.shared - 1024}
  shared_memory_per_core: {gpu.shared}
  threads_per_core_limit: 2048
  core_count: {gpu.multiprocessors}
  fpus_per_core: {gpu.lanes}
  block_dim_limit_x: {2**31 - 1}
  block_dim_limit_y: {2**16 - 1}
  block_dim_limit_z: {2**16 - 1}
  thread_dim_limit_x: 1024
  thread_dim_limit_y: 1024
  thread_dim_limit_z: 64
  registers_per_core_limit: {2**16}
  registers_per_block_limit: {2**16}
  memory_bandwidth: {bandwidth(gpu.kind):.0f}
  l2_cache_size: {gpu.l2}
  clock_rate_ghz: {gpu.gigahertz}
  device_memory_size: {gpu.memory}
  cuda_compute_capability {{ major: {major} minor: {minor}{features} }}
  device_vendor: "NVIDIA Corporation"
  platform_version: "Compute Capability {major}.{minor}"
  name: "{gpu.kind}"
  driver_version: "{toolkit}"
  runtime_version: "{toolkit}"
  compile_time_toolkit_version: "{toolkit}"
  dnn_version: "{dnn}"
}}
platform_name: "CUDA"
dnn_version_info {{ major: {cudnn[0]} minor: {cudnn[1]} patch: {cudnn[2]} }}
device_description_str: "{gpu.kind}"
"""
