"""The cache of compiled programs: in the user's cache folder, where no other user may write."""

import contextlib
import fcntl
import hashlib
import os
import platform
import sys
from collections.abc import Sequence
from pathlib import Path

from gpt2_flax.folders import cache_folder

_MOST_BYTES = 4 * 2**30  # beyond this size, the least recently used programs are deleted
_OTHERS_WRITE = 0o022


def keep_compiled_programs() -> None:
    """Set JAX's cache folder in the environment, unless it is set, and in JAX, if JAX is already imported.

    The user may set `JAX_COMPILATION_CACHE_DIR` to another folder, or to nothing for no cache.
    """
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        os.environ["JAX_COMPILATION_CACHE_DIR"] = str(_folder())
    os.environ.setdefault("JAX_COMPILATION_CACHE_MAX_SIZE", str(_MOST_BYTES))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")
    jax = sys.modules.get("jax")
    if jax is not None and jax.config.jax_compilation_cache_dir is None:
        jax.config.update("jax_compilation_cache_dir", os.environ["JAX_COMPILATION_CACHE_DIR"])
        jax.config.update("jax_compilation_cache_max_size", int(os.environ["JAX_COMPILATION_CACHE_MAX_SIZE"]))
        seconds = float(os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"])
        jax.config.update("jax_persistent_cache_min_compile_time_secs", seconds)


def _folder() -> Path | str:
    """Return the cache folder, or "" if it is unusable: JAX would warn about each program, or wait for a lock."""
    with contextlib.suppress(OSError):
        if (cache := cache_folder()) is not None:
            folder = cache / "compiled" / _processor()
            cache.mkdir(parents=True, exist_ok=True)
            if danger := _danger((cache, folder.parent, folder)):
                print(
                    f"warning: compiled programs are not kept: {danger}; check who made it, or delete it",
                    file=sys.stderr,
                )
                return ""
            with open(folder / "lock", "w", encoding="utf-8") as file:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            return folder
    return ""


def _danger(folders: Sequence[Path]) -> str | None:
    """Create the nested folders, the last for this user alone; return how another user could add programs, if so."""
    for folder in folders:
        folder.mkdir(mode=0o700, exist_ok=True)
        status = folder.stat()
        if status.st_uid != os.getuid():
            return f"{folder} belongs to another user"
        if status.st_mode & _OTHERS_WRITE:
            if folder == folders[-1]:
                return f"{folder} may be written by other users"
            folder.chmod(status.st_mode & 0o755)  # now no other user can replace the next folder
    last = folders[-1]
    was_private = not last.stat().st_mode & 0o077
    for file in os.scandir(last):
        found = file.stat(follow_symlinks=False)
        if found.st_uid != os.getuid():
            return f"{file.path} belongs to another user"
        if not was_private and found.st_mode & _OTHERS_WRITE and not file.is_symlink():
            return f"{file.path} may be written by other users"
    last.chmod(0o700)
    return None


def _processor() -> str:
    """Return a name for this kind of CPU: machines with other instructions may share the home folder."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = [platform.processor()]
    kinds = {line for line in lines if line.startswith(("model name", "flags", "Features", "CPU part"))} or set(lines)
    return f"{platform.machine()}-{hashlib.sha256('|'.join(sorted(kinds)).encode()).hexdigest()[:12]}"
