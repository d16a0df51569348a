"""Compiled programs are kept between calls, in the user's cache folder."""

import contextlib
import fcntl
import hashlib
import os
import platform
from pathlib import Path

from gpt2_flax.folders import cache_folder

_MOST_BYTES = 4 * 2**30  # the least recently used are deleted beyond that


def keep_compiled_programs() -> None:
    """Tells JAX, which must not be imported yet, where to keep them; what the environment says already stays so.

    `JAX_COMPILATION_CACHE_DIR` is another folder, or none when it is empty.
    """
    settings = {
        "JAX_COMPILATION_CACHE_DIR": _folder(),
        "JAX_COMPILATION_CACHE_MAX_SIZE": _MOST_BYTES,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": 0.2,
    }
    for name, value in settings.items():
        os.environ.setdefault(name, str(value))


def _folder() -> Path | str:
    """Returns where programs are kept, "" where they cannot be: JAX would warn at each, or wait for a lock."""
    with contextlib.suppress(OSError):
        if (cache := cache_folder()) is not None:
            folder = cache / "compiled" / _processor()
            folder.mkdir(parents=True, exist_ok=True)
            with open(folder / "lock", "w", encoding="utf-8") as file:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            return folder
    return ""


def _processor() -> str:
    """Programs for a CPU use its instructions, and a home folder may be shared by different machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = [platform.processor()]
    kinds = {line for line in lines if line.startswith(("model name", "flags", "Features", "CPU part"))} or set(lines)
    return f"{platform.machine()}-{hashlib.sha256('|'.join(sorted(kinds)).encode()).hexdigest()[:12]}"
