"""The choice of an implementation of attention for a model, its rows and the device."""

import importlib.util
import re
from collections.abc import Iterator
from typing import NamedTuple

import jax

from gpt2_flax.config.model import ModelConfig
from gpt2_flax.errors import ExitCode, UserError
from gpt2_flax.model.attention import Kernel

TRITON = "jax.experimental.pallas.triton"  # deprecated since JAX 0.11, still present in 0.12
_WIDEST_FLASH_HEAD = 128  # the accumulators of wider heads do not fit into registers
_NAMES = {
    "xla": "plain attention",
    "flash": "the flash kernel",
    "cudnn": "cuDNN flash attention",
    "splash": "splash attention",
}


class _Obstacle(NamedTuple):
    """Why a kernel cannot be used: the fact, the need of the kernel that it contradicts, and the setting to change."""

    fact: str
    need: str
    fix: str


def choose_attention(
    cfg: ModelConfig, length: int, *, dropout: bool, documents: bool, platform: str
) -> tuple[Kernel, str]:
    """Return the implementation for rows of `length` tokens, and the reason for display.

    `dropout` says whether `cfg.attn_pdrop` applies, as in training, and `documents` whether attention stays inside
    segments.

    Raises:
        UserError: CONFIG, when `cfg.attention` names an implementation that cannot be used.
    """
    rate = cfg.attn_pdrop if dropout else 0.0

    def obstacle_to(kernel: Kernel) -> _Obstacle | None:
        return next(_obstacles(kernel, cfg, rate, platform, length, documents), None)

    if cfg.attention != "auto":
        if (obstacle := obstacle_to(cfg.attention)) is None:
            return cfg.attention, "set by model.attention"
        what = f"model.attention is {cfg.attention} but {obstacle.fact}, and {obstacle.need}"
        raise UserError(ExitCode.CONFIG, what, "section [model]", f"set {obstacle.fix} or model.attention = xla")
    kernels: dict[str, tuple[Kernel, ...]] = {
        "gpu": ("flash", "cudnn") if rate or documents else ("cudnn", "flash"),
        "tpu": ("splash",),
    }
    obstacles = []
    for kernel in kernels.get(platform, ()):
        if (obstacle := obstacle_to(kernel)) is None:
            return kernel, f"the fastest on a {platform}"
        obstacles.append(obstacle)
    if not obstacles:
        return "xla", f"the fastest on a {platform}"
    return "xla", f"{obstacles[0].fact}, and {obstacles[0].need}"


def _obstacles(
    kernel: Kernel, cfg: ModelConfig, rate: float, platform: str, length: int, documents: bool
) -> Iterator[_Obstacle]:
    name, on_gpu = _NAMES[kernel], kernel in ("flash", "cudnn")
    capability = compute_capability() if on_gpu and platform == "gpu" else None
    if on_gpu and (platform != "gpu" or capability == ()):
        yield _Obstacle(f"the device is a {platform}", f"{name} needs an NVIDIA GPU", "model.attention = auto")
    if capability and capability < (8, 0):
        fact = f"the GPU has compute capability {capability[0]}.{capability[1]}"
        yield _Obstacle(fact, f"{name} needs 8.0 or more", "model.attention = auto")
    if kernel == "splash" and platform != "tpu":
        yield _Obstacle(f"the device is a {platform}", f"{name} needs a TPU", "model.attention = auto")
    if kernel in ("cudnn", "splash") and rate:
        more = "; plain products move 1.6 times as much memory in a layer" if kernel == "splash" else ""
        yield _Obstacle(f"model.attn_pdrop is {rate}", f"{name} has no dropout{more}", "model.attn_pdrop = 0")
    if on_gpu and cfg.dtype != "bfloat16":
        yield _Obstacle(f"model.dtype is {cfg.dtype}", f"{name} needs bfloat16", "model.dtype = bfloat16")
    if kernel == "flash" and importlib.util.find_spec(TRITON) is None:
        fact = f"JAX {jax.__version__} has no Triton backend for Pallas"
        yield _Obstacle(fact, f"{name} needs one", "model.attention = auto")
    widest = _WIDEST_FLASH_HEAD if kernel == "flash" else 256 if (capability or ()) >= (9, 0) else 128
    if on_gpu and (cfg.head_size > widest or (kernel == "cudnn" and cfg.head_size % 8)):
        need = f"{name} needs at most {widest}" if kernel == "flash" else f"{name} needs a multiple of 8 up to {widest}"
        yield _Obstacle(f"heads are {cfg.head_size} wide (n_embd / n_head)", need, "another model.n_head")
    if kernel == "cudnn" and documents and length % 2:
        need = f"{name} needs an even number to mask documents"
        yield _Obstacle(f"rows have {length} tokens", need, "an even data.seq_length")
    if kernel == "splash" and length % 128:
        need = f"{name} needs a multiple of 128"
        yield _Obstacle(f"rows have {length} tokens", need, "data.seq_length to a multiple of 128")


def compute_capability() -> tuple[int, ...] | None:
    """Return the first GPU's compute capability: () for a GPU not made by NVIDIA, None without a GPU."""
    try:
        capability = jax.local_devices(backend="gpu")[0].compute_capability
    except RuntimeError:
        return None
    return tuple(map(int, capability.split("."))) if re.fullmatch(r"\d+\.\d+", capability) else ()
