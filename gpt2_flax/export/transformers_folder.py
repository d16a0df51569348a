"""Writes a model as a folder that `transformers` 4.57 and 5 load without network, warning or further file.

config.json  generation_config.json
model.safetensors, or model-00001-of-00002.safetensors ... and model.safetensors.index.json
[pytorch_model.bin]  [model.gguf]
tokenizer.json  tokenizer_config.json  special_tokens_map.json  vocab.txt or spiece.model
README.md    the model card
SHA256SUMS   of all the others, written last
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from gpt2_flax.checkpoint.checksums import SUMS, write_sums
from gpt2_flax.checkpoint.huggingface import CONFIG, to_hf_config, to_state_dict
from gpt2_flax.config import ModelConfig
from gpt2_flax.errors import ExitCode, UserError
from gpt2_flax.export.gguf import import_gguf, write_gguf
from gpt2_flax.export.verify import Verification, verify_folder
from gpt2_flax.export.weight_files import (
    MAX_SHARD_SIZE,
    Dtype,
    compare_safetensors,
    rounded,
    write_safetensors,
    write_torch,
)
from gpt2_flax.folders import new_folder
from gpt2_flax.tokenizers.tokenizer import Tokenizer

MARKER = SUMS
Format = Literal["safetensors", "bin", "gguf"]


def export_folder(
    weights: Mapping[str, np.ndarray],
    config: ModelConfig,
    tokenizer: Tokenizer,
    output: Path,
    *,
    card: str,
    format: Format = "safetensors",
    dtype: Dtype = "float32",
    max_shard_size: int = MAX_SHARD_SIZE,
    overwrite: bool = False,
    verify: bool = True,
    samples: Sequence[str] = (),
) -> Verification | None:
    """Writes `output` and returns how it compared when read back; None when it was not compared.

    Safetensors are always written, pytorch_model.bin or model.gguf beside them; all hold `weights`, float32, rounded to
    `dtype`. `samples` are texts to compare tokenizers on. Raises `UserError`: DATA when the tokenizer does not fit the
    model or a number does not fit `dtype`, CANT_CREATE when `output` may not be written, USAGE when `format` needs what
    is not installed, IO when writing failed, BUG when what was written differs from the model.
    Nothing is published then.
    """
    if tokenizer.vocab_size > config.vocab_size:
        what = f"tokenizer has {tokenizer.vocab_size} tokens, the model {config.vocab_size}"
        raise UserError(ExitCode.DATA, what, output, "export with the tokenizer that the model was trained with")
    if format == "gguf":
        import_gguf(output)
    with new_folder(output, MARKER, overwrite) as folder:
        hf_config = to_hf_config(config, tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id)
        hf_config |= {"dtype": dtype, "torch_dtype": dtype}  # the latter is its name before transformers 4.56
        _write_json(folder / CONFIG, hf_config | _task_defaults(config))
        _write_json(folder / "generation_config.json", _generation_config(config, tokenizer))
        tokenizer.save(folder, model_max_length=config.n_positions)
        state_dict = rounded(to_state_dict(weights), dtype, output)
        write_safetensors(folder, state_dict, max_shard_size)
        if format == "bin":
            write_torch(folder, state_dict)
        elif format == "gguf":
            write_gguf(folder, state_dict, config, tokenizer, dtype, output.resolve().name)
        if verify:
            compare_safetensors(folder, state_dict)
        del state_dict
        verification = verify_folder(folder, weights, config, tokenizer, dtype, samples) if verify else None
        readme = card if verification is None else f"{card}\n{_checked(verification)}"
        (folder / "README.md").write_text(readme, encoding="utf-8")
        write_sums(folder)
    return verification


def takes_pipeline_default(config: ModelConfig) -> bool:
    """Returns whether prompt and the 256 tokens that a pipeline adds by default fit, and no `max_length` is exported.

    transformers 5 warns of a `max_length` in generation_config.json at every call with `max_new_tokens`. Without it a
    pipeline called without a length fails at the last position, so a model of few positions keeps it.
    """
    return config.n_positions >= 2 * 256


def _generation_config(config: ModelConfig, tokenizer: Tokenizer) -> dict[str, Any]:
    pad_id = tokenizer.eos_id if tokenizer.pad_id is None else tokenizer.pad_id
    # No max_new_tokens: calls with `max_length` would be warned of it, and get this many.
    ids = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id, "pad_token_id": pad_id}
    return ids if takes_pipeline_default(config) else ids | {"max_length": config.n_positions}


def _task_defaults(config: ModelConfig) -> dict[str, Any]:
    """Lets `TextGenerationPipeline(model, tokenizer)` of 4.57, a task without a name, obey `max_length` in a call.

    Its default of 256 new tokens would win otherwise. `pipeline("text-generation")` must keep it: these values win over
    its arguments. transformers 5.23 reads none of this.
    """
    return {"task_specific_params": {"": {"max_new_tokens": None}}} if takes_pipeline_default(config) else {}


def _write_json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2, allow_nan=False) + "\n", encoding="utf-8")


def _checked(verification: Verification) -> str:
    return f"## Checked\n\nRead back after the export: {verification}.\n"
