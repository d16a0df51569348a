"""Settings for fast training on a CPU that JAX does not make itself."""

import ctypes
import os

_MALLOC_NUMBERS = {
    "M_TRIM_THRESHOLD": (-1, -1),
    "M_TOP_PAD": (-2, 2**28),
    "M_MMAP_MAX": (-4, 0),
    "M_ARENA_MAX": (-8, 1),
}
"""The number in glibc's malloc.h and the new value of each parameter."""

_ONE_PASS = "xla_cpu_use_multi_output_fusion=true"
_EXTRA_OPTIONS = "--xla_backend_extra_options="


def tune_cpu() -> None:
    """Set up this process before it uses JAX; nothing changes on accelerators."""
    _keep_freed_memory()
    _compute_in_one_pass()


def _keep_freed_memory() -> None:
    """Let glibc's malloc keep freed memory; other C libraries stay unchanged.

    A training step on a CPU allocates gigabytes and frees them at its end. If malloc returned them to the system, the
    system would clear and map every page again in each step, which took a tenth of its time.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):
        return
    for number, value in _MALLOC_NUMBERS.values():
        mallopt(number, value)


def _compute_in_one_pass() -> None:
    """Let XLA compute several results of the same arrays in one pass over memory, as it does on accelerators.

    This makes AdamW three times as fast. Versions of XLA without the option ignore it.
    """
    flags = os.environ.get("XLA_FLAGS", "")
    if _EXTRA_OPTIONS not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} {_EXTRA_OPTIONS}{_ONE_PASS}".strip()
