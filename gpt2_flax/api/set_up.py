"""The settings of a process that uses JAX."""

from gpt2_flax.accelerators import silence_what_is_not_here
from gpt2_flax.compilation_cache import keep_compiled_programs
from gpt2_flax.cpu import tune_cpu


def set_up_jax() -> None:
    """Set up this process as the command line does; call this before JAX is used, best before its import."""
    keep_compiled_programs()
    silence_what_is_not_here()
    tune_cpu()
