"""Which implementation of attention suits a model, its rows and the device."""

import importlib.util
import re
from typing import NamedTuple

import jax

from gpt2_flax.config.schema import ModelConfig
from gpt2_flax.errors import ExitCode, UserError
from gpt2_flax.model.attention import Kernel

_TRITON = "jax.experimental.pallas.triton"  # deprecated since JAX 0.11, but there in 0.12
_WIDEST_FLASH_HEAD = 128  # accumulators of wider ones do not fit into registers


class _Obstacle(NamedTuple):
    """Why a kernel cannot be used: `fact`, and `need`; `fix` is what to change."""

    fact: str
    need: str
    fix: str


def choose(cfg: ModelConfig, length: int, *, dropout: bool, documents: bool, platform: str) -> tuple[Kernel, str]:
    """Returns the implementation for rows of `length` tokens, and why it is that one, to be shown.

    dropout: whether this is training, so that `cfg.attn_pdrop` counts. documents: whether segments are told apart.
    Raises `UserError` (CONFIG) when `cfg.attention` names one that cannot do it.
    """
    rate = cfg.attn_pdrop if dropout else 0.0
    if cfg.attention != "auto":
        if (obstacle := _obstacle(cfg.attention, cfg, rate, platform, length, documents)) is None:
            return cfg.attention, "set by model.attention"
        what = f"model.attention is {cfg.attention} but {obstacle.fact}, and {obstacle.need}"
        raise UserError(ExitCode.CONFIG, what, "section [model]", f"set {obstacle.fix} or model.attention = xla")
    kernels: dict[str, tuple[Kernel, ...]] = {
        "gpu": ("flash", "cudnn") if rate or documents else ("cudnn", "flash"),
        "tpu": ("splash",),
    }
    obstacles = []
    for kernel in kernels.get(platform, ()):
        if (obstacle := _obstacle(kernel, cfg, rate, platform, length, documents)) is None:
            return kernel, f"the fastest on a {platform}"
        obstacles.append(obstacle)
    if not obstacles:
        return "xla", f"the fastest on a {platform}"
    return "xla", f"{obstacles[0].fact}, and {obstacles[0].need}"


def _obstacle(
    kernel: Kernel, cfg: ModelConfig, rate: float, platform: str, length: int, documents: bool
) -> _Obstacle | None:
    if kernel == "flash":
        return _flash_obstacle(cfg, platform)
    if kernel == "cudnn":
        return _cudnn_obstacle(cfg, rate, platform, length, documents)
    return _splash_obstacle(rate, platform, length) if kernel == "splash" else None


def _flash_obstacle(cfg: ModelConfig, platform: str) -> _Obstacle | None:
    if (obstacle := _gpu_obstacle(platform, "the flash kernel")) is not None:
        return obstacle
    if cfg.dtype != "bfloat16":
        need = "the flash kernel needs bfloat16"
        return _Obstacle(f"model.dtype is {cfg.dtype}", need, "model.dtype = bfloat16")
    if importlib.util.find_spec(_TRITON) is None:
        fact = f"JAX {jax.__version__} has no Triton backend for Pallas"
        return _Obstacle(fact, "the flash kernel needs one", "model.attention = auto")
    if cfg.head_size > _WIDEST_FLASH_HEAD:
        need = f"the flash kernel needs at most {_WIDEST_FLASH_HEAD}"
        return _Obstacle(f"heads are {cfg.head_size} wide (n_embd / n_head)", need, "another model.n_head")
    return None


def _gpu_obstacle(platform: str, kernel: str) -> _Obstacle | None:
    capability = _compute_capability() if platform == "gpu" else None
    if platform != "gpu" or capability == ():
        return _Obstacle(f"the device is a {platform}", f"{kernel} needs an NVIDIA GPU", "model.attention = auto")
    if capability is not None and capability < (8, 0):
        fact = f"the GPU has compute capability {capability[0]}.{capability[1]}"
        return _Obstacle(fact, f"{kernel} needs 8.0 or more", "model.attention = auto")
    return None


def _cudnn_obstacle(cfg: ModelConfig, rate: float, platform: str, length: int, documents: bool) -> _Obstacle | None:
    if (obstacle := _gpu_obstacle(platform, "cuDNN flash attention")) is not None:
        return obstacle
    widest = 256 if (_compute_capability() or ()) >= (9, 0) else 128
    if rate:
        fact = f"model.attn_pdrop is {rate}"
        return _Obstacle(fact, "cuDNN flash attention has no dropout", "model.attn_pdrop = 0")
    if cfg.dtype != "bfloat16":
        need = "cuDNN flash attention needs bfloat16"
        return _Obstacle(f"model.dtype is {cfg.dtype}", need, "model.dtype = bfloat16")
    if cfg.head_size % 8 or cfg.head_size > widest:
        need = f"cuDNN flash attention needs a multiple of 8 up to {widest}"
        return _Obstacle(f"heads are {cfg.head_size} wide (n_embd / n_head)", need, "another model.n_head")
    if documents and length % 2:
        need = "cuDNN flash attention needs an even number to mask documents"
        return _Obstacle(f"rows have {length} tokens", need, "an even data.seq_length")
    return None


def _splash_obstacle(rate: float, platform: str, length: int) -> _Obstacle | None:
    if platform != "tpu":
        return _Obstacle(f"the device is a {platform}", "splash attention needs a TPU", "model.attention = auto")
    if rate:
        need = "splash attention has no dropout; plain products move 1.6 times as much memory in a layer"
        return _Obstacle(f"model.attn_pdrop is {rate}", need, "model.attn_pdrop = 0")
    if length % 128:
        need = "splash attention needs a multiple of 128"
        return _Obstacle(f"rows have {length} tokens", need, "data.seq_length to a multiple of 128")
    return None


def _compute_capability() -> tuple[int, ...] | None:
    """Returns the compute capability of the first GPU, () if NVIDIA did not make it, and None if no GPU is here."""
    try:
        capability = jax.local_devices(backend="gpu")[0].compute_capability
    except RuntimeError:
        return None
    return tuple(map(int, capability.split("."))) if re.fullmatch(r"\d+\.\d+", capability) else ()
