"""Check the machine and the installed packages, without JAX, which may be the fault."""

import importlib.metadata
import os
import platform
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path

import gpt2_flax
from gpt2_flax import nvidia
from gpt2_flax.doctor.report import Report
from gpt2_flax.memory import host_bytes
from gpt2_flax.nvidia import Gpu, Process

PLUGINS = {13: "jax-cuda13-plugin", 12: "jax-cuda12-plugin"}
_PACKAGES = (
    *("jax", "jaxlib", *PLUGINS.values(), "jax-cuda13-pjrt", "jax-cuda12-pjrt", "libtpu", "flax", "optax"),
    *("orbax-checkpoint", "numpy", "nvidia-cudnn-cu13", "nvidia-cudnn-cu12", "nvidia-nccl-cu13", "nvidia-nccl-cu12"),
    *("torch", "transformers"),
)
_SETTINGS = ("JAX_", "XLA_", "NCCL_", "CUDA_VISIBLE_DEVICES", "LD_LIBRARY_PATH", "LIBTPU_INIT_ARGS", "TF_GPU_ALLOCATOR")
PCI = Path("/sys/bus/pci/devices")
_TPUS = {  # Google's PCI device ids, as in JAX
    **{"0x0027": "TPU v3", "0x005e": "TPU v4", "0x0062": "TPU v5p"},
    **{"0x0063": "TPU v5e", "0x006f": "TPU v6e", "0x0076": "TPU7x"},
}


def machine(report: Report) -> None:
    """Report versions, hardware, driver and settings, and which of them do not fit together."""
    installed = packages()
    report.line("gpt2_flax", gpt2_flax.__version__)
    report.line("python", platform.python_version())
    for name, version in installed.items():
        report.line(name, version)
    cores, memory = len(os.sched_getaffinity(0)), host_bytes()
    report.line("system", f"{platform.platform()}, {_distribution()}")
    report.line("cpu", f"{cores} cores, {memory / 2**30:.1f} GiB of memory", cores=cores, memory=memory)
    found, working = [], []
    try:
        found, working = nvidia.gpus(), nvidia.processes()
    except OSError as error:
        if nvidia.is_here():
            report.wrong(f"nvidia-smi fails: {error}; install the driver again, or restart the machine")
    driver = nvidia.driver_version() or next((gpu.driver for gpu in found), None)
    if driver:
        report.line("driver", driver)
    for gpu in found:
        memory = f"{_gib(gpu.used)} of {_gib(gpu.total)} in use"
        report.line(f"gpu {gpu.index}", f"{gpu.name}, {memory}", gpu=asdict(gpu))
    for tpu, count in tpus().items():
        report.line("tpu", f"{count} x {tpu}")
    for name, value in sorted(os.environ.items()):
        if name.startswith(_SETTINGS):
            report.line("environment", f"{name}={value}")
    for sentence in [
        *wrong_packages(installed, driver, [gpu.capability for gpu in found if gpu.capability]),
        *wrong_memory(nvidia.visible(found, os.environ.get("CUDA_VISIBLE_DEVICES")), working, os.environ),
    ]:
        report.wrong(sentence)


def packages() -> dict[str, str]:
    """Return the versions of the installed packages that matter, by name."""
    versions = {}
    for name in _PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def tpus() -> dict[str, int]:
    """Return the number of TPU chips on the PCI bus, by kind."""
    counts: dict[str, int] = {}
    for folder in PCI.glob("*"):
        try:
            vendor, device = ((folder / name).read_text(encoding="utf-8").strip() for name in ("vendor", "device"))
        except OSError:
            continue
        if vendor == "0x1ae0" and device in _TPUS:
            counts[_TPUS[device]] = counts.get(_TPUS[device], 0) + 1
    return counts


def wrong_packages(installed: Mapping[str, str], driver: str | None, capabilities: list[float]) -> Iterator[str]:
    """Yield a sentence for each fault of the installed packages that keeps JAX from working on NVIDIA GPUs."""
    plugins = {cuda: plugin for cuda, plugin in PLUGINS.items() if plugin in installed}
    best = nvidia.cuda_for(driver, min(capabilities, default=None))
    if len(plugins) > 1:
        other = next(cuda for cuda in plugins if cuda != best)
        yield (
            f"{' and '.join(plugins.values())} are both installed, and JAX loads only one: "
            f"run pip uninstall {plugins[other]} {plugins[other].replace('plugin', 'pjrt')}"
        )
    for cuda, plugin in plugins.items():
        if installed.get("jaxlib") not in (None, installed[plugin]):
            yield (
                f"{plugin} is {installed[plugin]} but jaxlib is {installed['jaxlib']}, and JAX needs the same version: "
                f"run pip install 'jax[cuda{cuda}]=={installed['jaxlib']}'"
            )
        pjrt = plugin.replace("plugin", "pjrt")
        if installed.get(pjrt) not in (None, installed[plugin]):
            yield (
                f"{pjrt} is {installed[pjrt]} but {plugin} is {installed[plugin]}: "
                f"run pip install '{pjrt}=={installed[plugin]}'"
            )
        if driver and nvidia.major(driver) < nvidia.DRIVERS[cuda]:
            yield (
                f"driver {driver} is too old for {plugin}, and CUDA {cuda} needs {nvidia.DRIVERS[cuda]} or newer: "
                f"update the driver{_instead(plugin, best)}"
            )
        elif capabilities and min(capabilities) < nvidia.CAPABILITIES[cuda]:
            yield (
                f"a GPU has compute capability {min(capabilities)}, and CUDA {cuda} of {plugin} needs "
                f"{nvidia.CAPABILITIES[cuda]}: use a newer GPU{_instead(plugin, best)}"
            )


def wrong_memory(gpus: list[Gpu], processes: list[Process], environment: Mapping[str, str]) -> Iterator[str]:
    """Yield a sentence for each process on these GPUs, and for each GPU with less free memory than JAX allocates."""
    by_uuid = {gpu.uuid: gpu for gpu in gpus}
    for process in processes:
        if process.uuid in by_uuid:
            held = "memory" if process.used is None else _gib(process.used)
            yield (
                f"process {process.pid} ({process.name}) holds {held} of GPU {by_uuid[process.uuid].index}: "
                "end it, or choose other GPUs with CUDA_VISIBLE_DEVICES"
            )
    share = _share_taken(environment)
    for gpu in gpus if share else ():
        free = gpu.total - gpu.used
        if free < share * gpu.total:
            fraction = int(95 * free / gpu.total) / 100
            yield (
                f"GPU {gpu.index} has {_gib(free)} of {_gib(gpu.total)} free but JAX takes {_gib(share * gpu.total)} "
                f"when it starts: end what uses it, or set XLA_PYTHON_CLIENT_MEM_FRACTION={fraction:.2f}"
            )


def extra_for(driver: str | None, capabilities: list[float]) -> str:
    """Return how to install JAX for the NVIDIA GPUs of this machine."""
    best = nvidia.cuda_for(driver, min(capabilities, default=None))
    if best is not None:
        return f"run pip install 'gpt2_flax[{nvidia.EXTRAS[best]}]'"
    if nvidia.cuda_for(driver) is not None:
        return "no CUDA that JAX supports runs on a GPU as old as this one"
    return f"update the driver to {nvidia.DRIVERS[13]} or newer, and run pip install 'gpt2_flax[{nvidia.EXTRAS[13]}]'"


def _instead(plugin: str, cuda: int | None) -> str:
    if cuda is None:
        return ""
    remove = f"pip uninstall {plugin} {plugin.replace('plugin', 'pjrt')}"
    return f", or run {remove} and pip install 'gpt2_flax[{nvidia.EXTRAS[cuda]}]'"


def _share_taken(environment: Mapping[str, str]) -> float:
    """Return the share of a GPU's memory that JAX allocates when it starts; 0 if it allocates memory as needed."""
    preallocates = environment.get("XLA_PYTHON_CLIENT_PREALLOCATE", "true").lower() not in ("false", "0")
    if not preallocates or environment.get("XLA_PYTHON_CLIENT_ALLOCATOR", "default").lower() == "platform":
        return 0.0
    fractions = (environment.get(f"XLA{name}_MEM_FRACTION") for name in ("_CLIENT", "_PYTHON_CLIENT"))
    try:
        return float(next(filter(None, fractions), 0.75))
    except ValueError:
        return 0.75


def _distribution() -> str:
    try:
        return platform.freedesktop_os_release()["PRETTY_NAME"]
    except (OSError, KeyError):
        return "unknown distribution"


def _gib(n_bytes: float) -> str:
    return f"{n_bytes / 2**30:.1f} GiB"
