"""NVIDIA GPUs and their driver, found without JAX, and which CUDA suits them."""

import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

DEVICE_FILES = ("nvidia[0-9]*", "dxg")  # in /dev; dxg is for Linux on Windows (WSL)
DRIVERS = {13: 580, 12: 525}
"""The oldest driver for each CUDA: https://docs.nvidia.com/deploy/cuda-compatibility/minor-version-compatibility.html"""
CAPABILITIES = {13: 7.5, 12: 5.2}
"""The lowest compute capability of a GPU for each CUDA: https://docs.jax.dev/en/latest/installation.html"""
EXTRAS = {13: "cuda", 12: "cuda12"}
"""The extra of this package that installs JAX for each CUDA."""

DEVICES, DRIVER = Path("/dev"), Path("/proc/driver/nvidia/version")
WINDOWS_PROGRAM = "/usr/lib/wsl/lib/nvidia-smi"  # not on every PATH
_PATIENCE = 20.0  # seconds; a driver without persistence mode is slow


@dataclass(frozen=True)
class Gpu:
    """A GPU in the words of its driver; `total` and `used` are bytes of memory."""

    index: int
    uuid: str
    name: str
    driver: str
    total: int
    used: int
    capability: float | None


class Process(NamedTuple):
    """A process that computes on the GPU `uuid`; `used` is bytes of memory, or None if the driver does not know."""

    pid: int
    uuid: str
    used: int | None
    name: str


def is_here() -> bool:
    """Return whether this machine has an NVIDIA GPU, by its device files."""
    return any(True for pattern in DEVICE_FILES for _ in DEVICES.glob(pattern))


def gpus() -> list[Gpu]:
    """Return the GPUs that `nvidia-smi` lists, or none without it; raise OSError with its message if it fails."""
    rows = _query("gpu", "index,uuid,name,driver_version,memory.total,memory.used")
    try:
        capabilities = [_number(capability) for _, capability in _query("gpu", "index,compute_cap")]
    except OSError:  # a driver from before 2022
        capabilities = [None] * len(rows)
    return [
        Gpu(int(index), uuid, name, driver, _bytes(total) or 0, _bytes(used) or 0, capability)
        for (index, uuid, name, driver, total, used), capability in zip(rows, capabilities, strict=True)
    ]


def processes() -> list[Process]:
    """Return the processes that compute on the GPUs; raise OSError like `gpus`."""
    rows = _query("compute-apps", "pid,gpu_uuid,used_memory,process_name")
    return [Process(int(pid), uuid, _bytes(used), name) for pid, uuid, used, name in rows]


def driver_version() -> str | None:
    """Return the version of the kernel driver, such as `580.95.05`, or None if it is not known."""
    try:
        found = re.search(r"Kernel Module.*?(\d+\.[\d.]+)", DRIVER.read_text(encoding="utf-8", errors="replace"))
    except OSError:
        return None
    return found and found[1]


def visible(found: list[Gpu], environment: str | None) -> list[Gpu]:
    """Return the GPUs that a value of CUDA_VISIBLE_DEVICES selects, in its order; None selects all."""
    if environment is None:
        return found
    chosen = []
    for word in map(str.strip, environment.split(",")):
        match = [gpu for gpu in found if word == str(gpu.index) or (word[:4] == "GPU-" and gpu.uuid.startswith(word))]
        if not match:
            break  # like CUDA, which ignores everything after an unknown name
        chosen += match[:1]
    return chosen


def cuda_for(driver: str | None, capability: float | None = None) -> int | None:
    """Return the newest CUDA for a driver and a GPU, where None is unknown; return None if they are too old."""
    for cuda, oldest in DRIVERS.items():
        new_enough = driver is None or major(driver) >= oldest
        if new_enough and (capability is None or capability >= CAPABILITIES[cuda]):
            return cuda
    return None


def major(version: str) -> int:
    return int(version.partition(".")[0])


def _query(what: str, fields: str) -> list[list[str]]:
    program = shutil.which("nvidia-smi") or (WINDOWS_PROGRAM if os.access(WINDOWS_PROGRAM, os.X_OK) else None)
    if program is None:
        return []
    command = [program, f"--query-{what}={fields}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, timeout=_PATIENCE, encoding="utf-8", errors="replace")
    except subprocess.TimeoutExpired:
        raise OSError(f"no answer within {_PATIENCE:.0f} s") from None
    if done.returncode:
        raise OSError(" ".join((done.stdout + done.stderr).split()) or f"exit code {done.returncode}")
    commas = fields.count(",")
    rows = [[word.strip() for word in line.split(", ", commas)] for line in done.stdout.splitlines()]
    return [row for row in rows if len(row) == commas + 1]  # other lines are remarks, such as `No devices were found`


def _number(text: str) -> float | None:
    return float(text) if re.fullmatch(r"\d+(\.\d+)?", text) else None  # or `[N/A]`


def _bytes(mebibytes: str) -> int | None:
    number = _number(mebibytes)
    return None if number is None else round(number * 2**20)
