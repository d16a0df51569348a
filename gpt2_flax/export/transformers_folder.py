"""Write a model as a folder that `transformers` 4.57 and 5 load without network access, warnings or other files.

config.json  generation_config.json
model.safetensors, or model-00001-of-00002.safetensors ... and model.safetensors.index.json
[pytorch_model.bin]  [model.gguf]
tokenizer.json  tokenizer_config.json  special_tokens_map.json  vocab.txt or spiece.model
README.md    the model card
SHA256SUMS   of all other files, written last
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from gpt2_flax.checkpoint.checksums import SUMS, write_sums
from gpt2_flax.checkpoint.huggingface import CONFIG, to_hf_config, to_state_dict
from gpt2_flax.config.model import ModelConfig
from gpt2_flax.errors import ExitCode, UserError
from gpt2_flax.export import weight_files
from gpt2_flax.export.verify import Verification, verify_folder
from gpt2_flax.folders import new_folder, write_json
from gpt2_flax.formats.registry import writer
from gpt2_flax.progress import status
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
    dtype: weight_files.Dtype = "float32",
    max_shard_size: int = weight_files.MAX_SHARD_SIZE,
    overwrite: bool = False,
    verify: bool = True,
    samples: Sequence[str] = (),
) -> Verification | None:
    """Write `output`, read it back, and return the comparison; None if it was not compared.

    Args:
        weights: float32 arrays by path; the files hold them rounded to `dtype`.
        card: The text of README.md.
        format: "bin" and "gguf" write pytorch_model.bin or model.gguf beside model.safetensors.
        max_shard_size: In bytes.
        samples: Texts on which tokenizers are compared.

    Raises:
        UserError: DATA if the tokenizer does not fit the model or a number does not fit `dtype`; CANT_CREATE if
            `output` may not be written; USAGE if `format` needs a missing package; IO if writing failed; BUG if the
            files differ from the model. `output` does not appear then.
    """
    if tokenizer.vocab_size > config.vocab_size:
        what = f"tokenizer has {tokenizer.vocab_size} tokens, the model {config.vocab_size}"
        raise UserError(ExitCode.DATA, what, output, "export with the tokenizer that the model was trained with")
    if format == "gguf":
        writer("gguf").check_installed(output)
    with new_folder(output, MARKER, overwrite) as folder, status("exporting: writing the files") as show:
        hf_config = to_hf_config(config, tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id)
        hf_config |= {"dtype": dtype, "torch_dtype": dtype}  # `torch_dtype` is the name before transformers 4.56
        write_json(folder / CONFIG, hf_config | _task_defaults(config))
        write_json(folder / "generation_config.json", generation_config(config, tokenizer))
        tokenizer.save(folder, model_max_length=config.n_positions)
        state_dict = weight_files.rounded(to_state_dict(weights), dtype, output)
        weight_files.write_safetensors(folder, state_dict, max_shard_size)
        if format == "bin":
            weight_files.write_torch(folder, state_dict)
        elif format == "gguf":
            writer("gguf").write_file(folder, state_dict, config, tokenizer, dtype, output.resolve().name)
        show("exporting: comparing with transformers")
        if verify:
            weight_files.compare_safetensors(folder, state_dict)
        del state_dict
        verification = verify_folder(folder, weights, config, tokenizer, dtype, samples) if verify else None
        checked = f"\n## Checked\n\nRead back after the export: {verification}.\n" if verification else ""
        (folder / "README.md").write_text(card + checked, encoding="utf-8")
        write_sums(folder)
    return verification


def takes_pipeline_default(config: ModelConfig) -> bool:
    """Return whether a prompt and the 256 new tokens of a pipeline fit, so that no `max_length` is exported.

    transformers 5 warns about a `max_length` in generation_config.json at every call with `max_new_tokens`. Without
    `max_length`, a pipeline called without a length fails at the last position, so a model of few positions keeps it.
    """
    return config.n_positions >= 2 * 256


def generation_config(config: ModelConfig, tokenizer: Tokenizer) -> dict[str, Any]:
    pad_id = tokenizer.eos_id if tokenizer.pad_id is None else tokenizer.pad_id
    # No max_new_tokens: it would win over `max_length` in a call, with a warning.
    ids = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id, "pad_token_id": pad_id}
    return ids if takes_pipeline_default(config) else ids | {"max_length": config.n_positions}


def _task_defaults(config: ModelConfig) -> dict[str, Any]:
    """Return fields that let `TextGenerationPipeline(model, tokenizer)` of 4.57 obey `max_length` in a call.

    That pipeline is a task without a name, whose default of 256 new tokens would win otherwise. The named task
    "text-generation" must keep its default, because these fields win over its arguments. transformers 5.23 reads none
    of them.
    """
    return {"task_specific_params": {"": {"max_new_tokens": None}}} if takes_pipeline_default(config) else {}
