"""Pre-train GPT-2 in JAX on your own text and hand it over in `transformers` format."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gpt2_flax.api.load import load
    from gpt2_flax.api.model import Model
    from gpt2_flax.api.run import Run, train
    from gpt2_flax.api.text import Dataset, prepare, train_tokenizer
    from gpt2_flax.errors import ExitCode, UserError

__version__ = "0.2.0"
__all__ = ["Dataset", "ExitCode", "Model", "Run", "UserError", "load", "prepare", "train", "train_tokenizer"]

_MODULES = {
    "gpt2_flax.api.load": ("load",),
    "gpt2_flax.api.model": ("Model",),
    "gpt2_flax.api.run": ("Run", "train"),
    "gpt2_flax.api.text": ("Dataset", "prepare", "train_tokenizer"),
    "gpt2_flax.errors": ("ExitCode", "UserError"),
}


def __getattr__(name: str) -> Any:
    for module, names in _MODULES.items():  # imported at their first use, so that `import gpt2_flax` takes no time
        if name in names:
            return getattr(importlib.import_module(module), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
