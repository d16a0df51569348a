"""Writes a model as a folder that `transformers` 4.57 and 5 load without network, warning or further file.

config.json  generation_config.json  model.safetensors  [pytorch_model.bin]
tokenizer.json  tokenizer_config.json  special_tokens_map.json  vocab.txt or spiece.model
README.md    the model card
SHA256SUMS   of all the others, written last
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import save_file

from gpt2_flax.checkpoint.checksums import SUMS, write_sums
from gpt2_flax.checkpoint.huggingface import CONFIG, to_hf_config, to_state_dict
from gpt2_flax.checkpoint.tensor_files import TORCH_WEIGHTS, WEIGHTS
from gpt2_flax.config import ModelConfig
from gpt2_flax.errors import ExitCode, UserError
from gpt2_flax.export.verify import Verification, verify_folder
from gpt2_flax.folders import new_folder
from gpt2_flax.text.tokenizer import Tokenizer

MARKER = SUMS


def export_folder(
    weights: Mapping[str, np.ndarray],
    config: ModelConfig,
    tokenizer: Tokenizer,
    output: Path,
    *,
    card: str,
    torch_bin: bool = False,
    overwrite: bool = False,
    verify: bool = True,
) -> Verification | None:
    """Writes `output` and returns how it compared when read back; None when it was not compared.

    Raises `UserError`: DATA when the tokenizer does not fit the model, CANT_CREATE when `output` may not be written,
    USAGE when `torch_bin` is asked for and torch is not installed, BUG when what was written differs from the model.
    Nothing is published then.
    """
    if tokenizer.vocab_size > config.vocab_size:
        what = f"tokenizer has {tokenizer.vocab_size} tokens, the model {config.vocab_size}"
        raise UserError(ExitCode.DATA, what, output, "export with the tokenizer that the model was trained with")
    with new_folder(output, MARKER, overwrite) as folder:
        _write_json(folder / CONFIG, to_hf_config(config, tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id))
        _write_json(folder / "generation_config.json", _generation_config(config, tokenizer))
        _write_weights(folder, to_state_dict(weights), torch_bin)
        tokenizer.save(folder, model_max_length=config.n_positions)
        verification = verify_folder(folder, weights, config, tokenizer) if verify else None
        readme = card if verification is None else f"{card}\n{_checked(verification)}"
        (folder / "README.md").write_text(readme, encoding="utf-8")
        write_sums(folder)
    return verification


def _generation_config(config: ModelConfig, tokenizer: Tokenizer) -> dict[str, Any]:
    pad_id = tokenizer.eos_id if tokenizer.pad_id is None else tokenizer.pad_id
    # No max_new_tokens: transformers 4.57 would run past the last position and crash.
    ids = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id, "pad_token_id": pad_id}
    return ids | {"max_length": config.n_positions}


def _write_weights(folder: Path, state_dict: dict[str, np.ndarray], torch_bin: bool) -> None:
    try:
        save_file(state_dict, folder / WEIGHTS, metadata={"format": "pt"})
        # safetensors keeps its files from all others; this one is as readable as its neighbours.
        (folder / WEIGHTS).chmod((folder / CONFIG).stat().st_mode)
        if torch_bin:
            _write_torch(folder / TORCH_WEIGHTS, state_dict)
    except (SafetensorError, RuntimeError) as error:  # what they make of an OSError
        fix = f"free some space and run the same command again ({error})"
        raise UserError(ExitCode.IO, "weights could not be written", folder, fix) from None


def _write_torch(path: Path, state_dict: dict[str, np.ndarray]) -> None:
    try:
        import torch
    except ImportError:
        fix = "run: pip install 'gpt2_flax[export]', or leave that file out"
        raise UserError(ExitCode.USAGE, f"{TORCH_WEIGHTS} needs torch, which is not installed", path, fix) from None
    # A copy each: a view would drag the whole stack of its layer into the file.
    torch.save({name: torch.from_numpy(array.copy()) for name, array in state_dict.items()}, path)


def _write_json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2, allow_nan=False) + "\n", encoding="utf-8")


def _checked(verification: Verification) -> str:
    return f"## Checked\n\nRead back after the export: {verification}.\n"
