"""The choices that training makes for a model and its devices, and the reasons; `plan` and benchmarks show them too."""

import jax
from jax.sharding import Mesh

from gpt2_flax.config.schema import ResolvedConfig
from gpt2_flax.model.attention_choice import choose
from gpt2_flax.model.gpt2 import unroll_layers
from gpt2_flax.parallel.mesh import platform
from gpt2_flax.training.compiler_options import compiler_options


def choices(config: ResolvedConfig, mesh: Mesh) -> dict[str, str]:
    """Return each choice by its name, such as {"attention": "xla: the fastest on a cpu"}.

    Raises `UserError` (CONFIG) when the config forces a choice that the mesh's devices cannot run.
    """
    with jax.set_mesh(mesh):
        kernel, why = choose(
            config.model,
            config.data.seq_length,
            dropout=True,
            documents=not config.model.attend_across_documents,
            platform=platform(),
        )
        unrolled, why_unrolled = unroll_layers(config.model, platform())
    options = " ".join(f"{name}={str(value).lower()}" for name, value in compiler_options(config, mesh).items())
    layers = f"{'unrolled' if unrolled else 'scanned'}: {why_unrolled}"
    return {"attention": f"{kernel}: {why}", "layers": layers} | ({"XLA options": options} if options else {})
