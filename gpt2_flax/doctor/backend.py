"""Check which devices JAX sees, and why it does not see a device of this machine."""

import importlib
import logging
import os
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from gpt2_flax import nvidia
from gpt2_flax.doctor.machine import PLUGINS, extra_for, packages, tpus
from gpt2_flax.doctor.report import Report

_LIBRARIES = {"CUDA": "cuda_runtime", "cuDNN": "cudnn", "cuBLAS": "cublas"}


class Hardware(NamedTuple):
    """The accelerators of this machine, found without JAX."""

    nvidia: bool
    driver: str | None
    capabilities: list[float]
    tpus: Mapping[str, int]


def backend(report: Report) -> None:
    """Report the platform and the devices of JAX, the loaded versions of CUDA and cuDNN, and missing devices."""
    there = hardware()
    messages = _Messages(("cuda", "tpu") if there.tpus else ("cuda",))
    import jax

    try:
        devices = jax.local_devices()
    except Exception as error:  # JAX has no error class for this
        said = [*messages.errors, " ".join(str(error).split())]
        if sentence := why_unseen("none", there, packages(), os.environ, said):
            report.wrong(sentence)
        raise
    platform = "gpu" if devices[0].platform in ("gpu", "cuda", "rocm") else devices[0].platform
    report.line("platform", platform)
    for device in devices:
        stats = (device.memory_stats() if platform != "cpu" else None) or {}
        limit, capability = stats.get("bytes_limit"), getattr(device, "compute_capability", None)
        text = f"{device.device_kind}" + (f", compute capability {capability}" if capability else "")
        text += f", {limit / 2**30:.1f} GiB for JAX" if limit else ""
        report.line(f"device {device.id}", text, kind=device.device_kind, capability=capability, memory=limit)
    if platform == "gpu":
        for name, version in _library_versions().items():
            report.line(name, version)
    if sentence := why_unseen(platform, there, packages(), os.environ, messages.errors):
        report.wrong(sentence)
        return
    for message in messages.errors:
        report.line("JAX says", message)


def hardware() -> Hardware:
    """Return the accelerators of this machine, found without JAX."""
    try:
        found = nvidia.gpus()
    except OSError:
        found = []
    driver = nvidia.driver_version() or next((gpu.driver for gpu in found), None)
    capabilities = [gpu.capability for gpu in found if gpu.capability]
    return Hardware(bool(found) or nvidia.is_here(), driver, capabilities, tpus())


def why_unseen(
    platform: str, there: Hardware, installed: Mapping[str, str], environment: Mapping[str, str], errors: Sequence[str]
) -> str | None:
    """Return why JAX does not use an accelerator of this machine, and what to do; None if it uses all.

    Args:
        platform: the platform that JAX uses, or "none".
        there: the accelerators of this machine.
        installed: versions by package.
        environment: environment variables.
        errors: what JAX logged about its backends.
    """
    said = f": {errors[0]}" if errors else ""
    platforms = environment.get("JAX_PLATFORMS", "")
    if there.nvidia and platform != "gpu":
        again = extra_for(there.driver, there.capabilities)
        plugins = [plugin for plugin in PLUGINS.values() if plugin in installed]
        if not plugins:
            return f"an NVIDIA GPU is here but JAX is installed without CUDA: {again}"
        if platforms and not {"cuda", "gpu"} & set(platforms.split(",")):
            return f"an NVIDIA GPU is here but JAX_PLATFORMS is {platforms}: unset it to use the GPU"
        if environment.get("CUDA_VISIBLE_DEVICES", "0").strip() in ("", "-1", "NoDevFiles"):
            hidden = environment["CUDA_VISIBLE_DEVICES"]
            return f"an NVIDIA GPU is here but CUDA_VISIBLE_DEVICES is {hidden!r} and hides it: unset it"
        return f"an NVIDIA GPU is here and {plugins[0]} is installed, but JAX does not use it{said}; {again}"
    if there.tpus and platform != "tpu":
        kind = next(iter(there.tpus))
        if "libtpu" not in installed:
            return f"a {kind} is here but JAX is installed without TPUs: run pip install 'gpt2_flax[tpu]'"
        if platforms and "tpu" not in platforms.split(","):
            return f"a {kind} is here but JAX_PLATFORMS is {platforms}: unset it to use the TPU"
        return f"a {kind} is here and libtpu is installed, but JAX does not use it{said}; end what else uses it"
    if platform == "none" and platforms:
        return f"JAX_PLATFORMS is {platforms} but there is no such device: unset it"
    return None


class _Messages(logging.Handler):
    """Collects JAX's warnings, from before JAX is imported, and quiet failures of the given backends."""

    def __init__(self, backends: Sequence[str]):
        super().__init__(logging.INFO)
        self.errors: list[str] = []
        self._failures = [f"Unable to initialize backend '{name}'" for name in backends]
        logging.getLogger("jax").addHandler(self)
        logging.getLogger("jax._src.xla_bridge").setLevel(logging.INFO)  # failures of backends

    def emit(self, record: logging.LogRecord) -> None:
        message = " ".join(record.getMessage().split())
        if record.exc_info and record.exc_info[1] is not None:
            message += f": {record.exc_info[1]}"
        if record.levelno >= logging.WARNING or any(failure in message for failure in self._failures):
            self.errors.append(message)


def _library_versions() -> dict[str, str]:
    """Return the versions of NVIDIA's loaded libraries, as far as the plugin knows them."""
    for plugin in PLUGINS.values():
        try:
            library: Any = importlib.import_module(f"{plugin.replace('-', '_')}._versions")
        except ImportError:
            continue
        found = {}
        for name, function in _LIBRARIES.items():
            try:
                number = getattr(library, f"{function}_get_version")()
            except (AttributeError, RuntimeError):
                continue
            found[name] = readable(name, number)
        return found
    return {}


def readable(name: str, number: int) -> str:
    """Format the version number of one of NVIDIA's libraries: 12090 of CUDA is 12.9."""
    if name == "CUDA":
        return f"{number // 1000}.{number % 1000 // 10}"
    major, rest = divmod(number, 10000)
    return f"{major}.{rest // 100}.{rest % 100}"
