"""The model formats of other programs: how to recognize a file, and which module reads or writes the format.

The rest of the package reaches the modules only through this table, which imports a module when it is used.
A reader has two functions:
    read_content(content, path, config_file): return the config and the float32 weights of an opened file.
    compare(path, weights, config): return how the logits differ from the logits of the other program, as a sentence.
A writer has the functions that its module documents.
"""

import importlib
from collections.abc import Mapping
from types import ModuleType
from typing import Any, NamedTuple


class Format(NamedTuple):
    """A model format; a reader or writer is the name of a module in this folder."""

    program: str
    """The name that users know."""
    reader: str | None = None
    writer: str | None = None
    keys: frozenset[str] = frozenset()
    """The keys that identify a dict saved by `torch.save`."""
    vocabulary: str = ""
    """The usual value of `--tokenizer` for a file, which holds no vocabulary."""
    note: str = ""
    """More advice for users who gave no `--tokenizer`."""


FORMATS = {
    "nanogpt": Format(
        "nanoGPT",
        reader="nanogpt",
        keys=frozenset({"model", "model_args"}),
        vocabulary="FOLDER",
        note=" (a meta.pkl is never read: see docs/from_nanogpt.md)",
    ),
    "uer": Format("UER-py", reader="uer", writer="uer_export", vocabulary="vocab.txt"),
    "gguf": Format("llama.cpp", writer="gguf"),
}


def recognize(content: Mapping[Any, Any]) -> str:
    """Return the name of the format of a dict saved by `torch.save`. A plain state dict is UER-py's."""
    named = (name for name, one in FORMATS.items() if one.keys and one.keys <= content.keys())
    return next(named, "uer")


def reader(name: str) -> ModuleType:
    """Import the module that reads a format."""
    return importlib.import_module(f"gpt2_flax.formats.{FORMATS[name].reader}")


def writer(name: str) -> ModuleType:
    """Import the module that writes a format."""
    return importlib.import_module(f"gpt2_flax.formats.{FORMATS[name].writer}")
