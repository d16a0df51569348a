"""Out of memory, of the host or of a device: one sentence with what was asked, what there is, and what helps."""

import contextlib
import errno
import os
import re
import resource
import sys
from pathlib import Path

from gpt2_flax.errors import ExitCode, UserError

# Of JAX (its error is a RuntimeError), of C++, and of torch. Not of tensorstore: there a full disk says the same.
_TOLD = re.compile("RESOURCE_EXHAUSTED|bad_alloc|[Oo]ut of memory|can't allocate memory")
_UNITS = dict(zip("BKMGTP", (1024**power for power in range(6)), strict=True))
_SIZE = r"([\d.]+) ?([KMGTP]?)(?:i?B|bytes|\b)"
_ASKED = re.compile(rf"(?:allocat\w+|reserve|request for|Used) (?:request for )?{_SIZE}")  # numpy's, XLA's, of a TPU
_LIMIT = re.compile(rf"Used [\d.]+[KMGTP]? of {_SIZE}")


def out_of_memory(error: BaseException, where: object, fix: str) -> UserError | None:
    """Return what the user reads about an `error` that says that memory was too small, None for any other."""
    message = str(error)
    told = isinstance(error, RuntimeError) and _TOLD.search(message)
    if not told and not isinstance(error, MemoryError) and getattr(error, "errno", None) != errno.ENOMEM:
        return None
    asked, limit = _bytes(_ASKED.search(message)), _bytes(_LIMIT.search(message))
    device = None if limit or not told else _device_bytes()
    owner, size = ("a device", limit or device) if limit or device else ("this machine", host_bytes())
    asked_for = f"{_shown(asked)} asked, " if asked else ""
    return UserError(ExitCode.OUT_OF_MEMORY, f"out of memory ({asked_for}{owner} has {_shown(size)})", where, fix)


def _bytes(found: re.Match[str] | None) -> int | None:
    return found and round(float(found[1].rstrip(".")) * _UNITS[found[2] or "B"])


def _shown(n_bytes: int) -> str:
    unit = next((unit for unit in "PTGMK" if n_bytes >= _UNITS[unit]), "B")
    return f"{n_bytes / _UNITS[unit]:.3g} {unit}{'iB' * (unit != 'B')}"


def _device_bytes() -> int | None:
    """What JAX may use of its fullest kind of device; None on a CPU, where that is the memory of the host."""
    with contextlib.suppress(Exception):  # after such an error the backend may refuse anything
        return sys.modules["jax"].local_devices()[0].memory_stats()["bytes_limit"]
    return None


def host_bytes() -> int:
    """Return the memory that this process may use, in bytes: the machine's, or less where a limit is set."""
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    limits += [limit for limit in resource.getrlimit(resource.RLIMIT_AS) if limit != resource.RLIM_INFINITY]
    with contextlib.suppress(OSError, ValueError):  # "max" is none
        limits.append(int(Path("/sys/fs/cgroup/memory.max").read_text(encoding="utf-8")))
    return min(limits)
