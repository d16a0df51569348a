"""Write folders that UER-py and TencentPretrain load.

model.bin         the state dict, for --pretrained_model_path
uer_config.json   for --config_path
vocab.txt         for --vocab_path
"""

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from gpt2_flax.checkpoint.source import Source
from gpt2_flax.config.model import ModelConfig
from gpt2_flax.errors import ExitCode, UserError, missing_package
from gpt2_flax.folders import new_folder, write_json
from gpt2_flax.formats.uer import HEAD, WORDS, Comparison, compare, gain, open_uer, sizes_by_axis, views
from gpt2_flax.formats.uer_config import to_uer_config
from gpt2_flax.tokenizers.wordpiece import WordPieceTokenizer

MARKER = "uer_config.json"


def write_folder(source: Source, output: Path, overwrite: bool = False) -> Comparison:
    """Write a folder for UER-py, read it back, and return how its logits compare with the logits of the source.

    Raises:
        UserError: USAGE if torch is not installed; CANT_CREATE if `output` may not be written; DATA if the tokenizer
            is not a BERT vocabulary of the size of the embedding; BUG if other numbers were read back.
    """
    try:
        import torch
    except ImportError:
        raise missing_package("--format uer", "torch", "export", output) from None
    tokenizer = source.tokenizer()
    if not isinstance(tokenizer, WordPieceTokenizer) or tokenizer.vocab_size != source.model.vocab_size:
        what = f"UER-py needs a BERT vocabulary of as many tokens as the model has rows, {source.model.vocab_size}"
        raise UserError(ExitCode.DATA, what, source.tokenizer_folder, "give it with --tokenizer vocab.txt")
    arrays = to_uer(source.weights, source.model)
    with new_folder(output, MARKER, overwrite) as folder:
        tensors = {id(array): torch.from_numpy(array) for array in arrays.values()}  # a tied array is stored once
        torch.save({name: tensors[id(array)] for name, array in arrays.items()}, folder / "model.bin")
        write_json(folder / MARKER, to_uer_config(source.model))
        (folder / "vocab.txt").write_bytes(tokenizer.vocabulary)
        found = open_uer(folder / "model.bin")
        if found.keys() != arrays.keys() or any(not np.array_equal(found[n].load(), arrays[n]) for n in arrays):
            fix = "nothing was kept; please report this"
            raise UserError(ExitCode.BUG, "other numbers were read back", output, fix)
        return compare(folder / "model.bin", source.weights, source.model, output)


def to_uer(weights: Mapping[str, np.ndarray], config: ModelConfig) -> dict[str, np.ndarray]:
    """Return the state dict of UER-py: contiguous float32 copies. A tied output layer is the array of the embedding.

    UER-py computes the same layer norm only if `config.layer_norm_epsilon` is 1e-7.
    """
    sizes, state_dict = sizes_by_axis(config), {}
    for entry, name, array in views(weights, config.n_layer):
        shape = [sizes[axis] for axis in entry.axes]
        array = array.reshape(shape[::-1]).T if entry.transposed else array.reshape(shape)
        if name.endswith(".gamma"):
            array = array / gain(config)
        state_dict[name] = np.array(array, np.float32, order="C")
    state_dict.setdefault(HEAD.name, state_dict[WORDS])
    return state_dict
