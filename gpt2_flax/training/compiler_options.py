"""The options that XLA compiles the training step with on GPUs."""

import os
import re
from functools import cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from gpt2_flax.config.schema import ResolvedConfig
from gpt2_flax.parallel.mesh import platform


def compiler_options(config: ResolvedConfig, mesh: Mesh) -> dict[str, str | bool | int | float]:
    """Return options by name; none on CPUs and TPUs.

    Options that the environment's XLA_FLAGS name and options that the compiler does not know are left out.
    """
    with jax.set_mesh(mesh):
        if platform() != "gpu":
            return {}
    # Matrix products of cuBLASLt add biases and apply GELU before they write. Triton leaves that to other kernels,
    # which costs 5 GB of memory traffic in a step of the base model; and autotuning chooses between them at random.
    options: dict[str, str | bool | int | float] = {"xla_gpu_enable_triton_gemm": False}
    if mesh.size > 1:
        # XLA combines collectives up to 30 MiB. In a small model that is all layers together, so that all collectives
        # wait for the last gradient or the first product; in a large model it is less than a layer. The threshold here
        # is one gathered layer in the compute dtype; the float32 gradients of a layer then take two collectives.
        in_layers = config.model.parameters - config.model.embedding_parameters
        layer = jnp.dtype(config.model.dtype).itemsize * in_layers // config.model.n_layer
        options |= {
            "xla_gpu_enable_latency_hiding_scheduler": True,
            "xla_gpu_all_reduce_combine_threshold_bytes": layer,
            "xla_gpu_all_gather_combine_threshold_bytes": layer,
            "xla_gpu_reduce_scatter_combine_threshold_bytes": layer // mesh.shape["fsdp"],
        }
    if config.training.deterministic:
        options["xla_gpu_exclude_nondeterministic_ops"] = True
    users = _flags_of_environment()
    return {name: value for name, value in options.items() if name not in users and is_known(name, value, mesh)}


def _flags_of_environment() -> set[str]:
    """Return the names in XLA_FLAGS, which holds flags or, as XLA reads it, the name of a file with flags."""
    flags = os.environ.get("XLA_FLAGS", "").strip()
    if flags and not flags.startswith("-") and Path(flags).is_file():
        flags = Path(flags).read_text(encoding="utf-8", errors="replace")
    return set(re.findall(r"--(\w+)", flags))


@cache
def is_known(name: str, value: str | bool | int | float, mesh: Mesh) -> bool:
    """Return whether the compiler has an option; XLA drops options between versions, and then refuses to compile."""
    zero = jax.jit(lambda: jnp.zeros(()), out_shardings=NamedSharding(mesh, P()))
    try:
        option: dict[str, Any] = {name: value}
        zero.lower().compile(compiler_options=option)
    except jax.errors.JaxRuntimeError as error:
        if "No such compile option" not in str(error):
            raise
        return False
    return True
