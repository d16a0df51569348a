"""Out-of-memory errors of the host or of a device: one sentence with the requested and the available memory."""

import contextlib
import errno
import os
import re
import resource
import sys
from pathlib import Path

from gpt2_flax.errors import ExitCode, UserError

# Messages of JAX (a RuntimeError), C++ and torch. tensorstore's message is left out: a full disk gives the same one.
_MESSAGES = re.compile("RESOURCE_EXHAUSTED|bad_alloc|[Oo]ut of memory|can't allocate memory")
_UNITS = dict(zip("BKMGTP", (1024**power for power in range(6)), strict=True))
_SIZE = r"([\d.]+) ?([KMGTP]?)(?:i?B|bytes|\b)"
_ASKED = re.compile(rf"(?:allocat\w+|reserve|request for|Used) (?:request for )?{_SIZE}")  # numpy, XLA, TPUs
_LIMIT = re.compile(rf"Used [\d.]+[KMGTP]? of {_SIZE}")


def out_of_memory(error: BaseException, where: object, fix: str) -> UserError | None:
    """Return the error to show to the user if `error` says that memory was too small, else None."""
    message = str(error)
    is_runtime_error = isinstance(error, RuntimeError) and bool(_MESSAGES.search(message))
    if not is_runtime_error and not isinstance(error, MemoryError) and getattr(error, "errno", None) != errno.ENOMEM:
        return None
    asked, limit = _bytes(_ASKED.search(message)), _bytes(_LIMIT.search(message))
    limit = limit or (_device_bytes() if is_runtime_error else None)
    owner, size = ("a device", limit) if limit else ("this machine", host_bytes())
    asked_for = f"{_shown(asked)} asked, " if asked else ""
    return UserError(ExitCode.OUT_OF_MEMORY, f"out of memory ({asked_for}{owner} has {_shown(size)})", where, fix)


def _bytes(found: re.Match[str] | None) -> int | None:
    return found and round(float(found[1].rstrip(".")) * _UNITS[found[2] or "B"])


def _shown(n_bytes: int) -> str:
    unit = next((unit for unit in "PTGMK" if n_bytes >= _UNITS[unit]), "B")
    return f"{n_bytes / _UNITS[unit]:.3g} {unit}{'iB' * (unit != 'B')}"


def _device_bytes() -> int | None:
    """Return the memory that JAX may use on its first device; None on a CPU, which uses the memory of the host."""
    with contextlib.suppress(Exception):  # after such an error, any call to the backend may fail
        return sys.modules["jax"].local_devices()[0].memory_stats()["bytes_limit"]
    return None


def host_bytes() -> int:
    """Return the memory that this process may use, in bytes: of the machine, or a lower limit of the process."""
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    limits += [limit for limit in resource.getrlimit(resource.RLIMIT_AS) if limit != resource.RLIM_INFINITY]
    with contextlib.suppress(OSError, ValueError):  # "max" means no limit
        limits.append(int(Path("/sys/fs/cgroup/memory.max").read_text(encoding="utf-8")))
    return min(limits)
