"""Publish a loaded model as a folder, with a model card of the known facts about the run."""

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gpt2_flax.checkpoint.source import Source
from gpt2_flax.config.schema import Config
from gpt2_flax.data.dataset import TokenDataset
from gpt2_flax.data.dataset_info import sum_if_known
from gpt2_flax.data.mixture import Mixture
from gpt2_flax.errors import ExitCode, UserError
from gpt2_flax.export.example import example_prompt
from gpt2_flax.export.model_card import CardFacts, model_card
from gpt2_flax.export.transformers_folder import Format, export_folder
from gpt2_flax.export.verify import Verification
from gpt2_flax.export.weight_files import MAX_SHARD_SIZE, Dtype
from gpt2_flax.formats.registry import writer
from gpt2_flax.input_files import CONFIG_BYTES, read_whole
from gpt2_flax.tokenizers.tokenizer import Tokenizer
from gpt2_flax.tokenizers.wordpiece import WordPieceTokenizer

_OPTIMIZERS = {
    "adamw": "AdamW",
    "adamw_uer": "AdamW without bias correction, as in UER-py",
    "muon": "Muon for matrices and AdamW for all else",
}
_MOST_SAMPLES = 200  # texts for the comparison of tokenizers
_SAMPLE_TOKENS = 1000  # the maximum length of a text


def publish(
    source: Source,
    output: Path,
    *,
    format: Format = "safetensors",
    dtype: Dtype = "float32",
    max_shard_size: int = MAX_SHARD_SIZE,
    overwrite: bool = False,
    card_extra: Path | None = None,
    **card: Any,
) -> Verification | None:
    """Export `source` with a model card; see `export_folder` for the other arguments.

    Args:
        card_extra: A Markdown file to append to the card.
        card: Fields of `CardFacts` that only a person knows; None means unknown.

    Raises:
        UserError: As `export_folder`; NO_INPUT or DATA if `card_extra` cannot be read.
    """
    extra = None if card_extra is None else _read_text(card_extra)
    tokenizer = source.tokenizer()
    datasets = _datasets(source.config)
    samples = sample_texts(datasets, tokenizer)
    run = run_facts(source, source.config, datasets) if source.config else {}
    prompts = (card.pop("prompt", None), *(source.config.training.prompts if source.config else ()))
    facts = CardFacts(
        model=source.model,
        wordpiece=isinstance(tokenizer, WordPieceTokenizer),
        parameters=sum(array.size for array in source.weights.values()),
        dtype=dtype,
        gguf=format == "gguf",
        gguf_remarks=writer("gguf").remarks(tokenizer) if format == "gguf" else "",
        bos_id=tokenizer.bos_id,
        prompt=example_prompt(prompts, samples, tokenizer, source.model.n_positions),
        extra=extra,
        trained_here=source.config is not None,
        **(run | {field: value for field, value in card.items() if value is not None}),
    )
    return export_folder(
        source.weights,
        source.model,
        tokenizer,
        output,
        card=model_card(facts),
        format=format,
        dtype=dtype,
        max_shard_size=max_shard_size,
        overwrite=overwrite,
        samples=samples,
    )


def _read_text(path: Path) -> str:
    try:
        return read_whole(path, CONFIG_BYTES).decode("utf-8-sig")
    except UnicodeDecodeError:
        raise UserError(ExitCode.DATA, "not UTF-8", path, "give a Markdown file in UTF-8") from None
    except OSError as error:
        raise UserError(ExitCode.NO_INPUT, "cannot be read", path, f"the system says: {error.strerror}") from None


def _datasets(config: Config | None) -> Mapping[str, TokenDataset]:
    """Return the datasets of a run by folder; none if they were moved or deleted."""
    try:
        return Mixture(config.data.datasets).datasets if config else {}
    except UserError:
        return {}


def sample_texts(datasets: Mapping[str, TokenDataset], tokenizer: Tokenizer) -> list[str]:
    """Return texts of validation documents, or of training documents where there are none."""
    texts = []
    for dataset in datasets.values():
        if dataset.info.tokenizer_fingerprint != tokenizer.fingerprint:
            continue  # the dataset was prepared again with another tokenizer
        split = dataset.validation if dataset.validation.n_documents else dataset.train
        n_texts = min(split.n_documents, max(1, _MOST_SAMPLES // len(datasets)))
        with contextlib.suppress(UserError):  # a damaged dataset does not damage the model
            for index in range(n_texts):
                start, stop = split.bounds(index * split.n_documents // n_texts)
                texts.append(tokenizer.decode(split.read(start, min(stop, start + _SAMPLE_TOKENS))))
    return [text for text in texts if text]


def _growth(config: Config) -> str | None:
    growth, layers, length = config.growth, config.model.n_layer, config.data.seq_length
    smaller = f"{growth.n_layer or layers} of {layers} layers, rows of {growth.seq_length or length:,} tokens"
    return f"{smaller} in the first {config.growth_steps:,} steps" if config.growth_steps else None


def run_facts(source: Source, config: Config, datasets: Mapping[str, TokenDataset]) -> dict[str, Any]:
    optimizer, steps = config.optimizer, source.step or None
    facts = {
        "hardware": source.hardware,
        "seq_length": config.data.seq_length,
        "prompt_separator": config.data.prompt_separator,
        "steps": steps,
        "tokens_trained": steps and steps * config.data.global_batch_size * config.data.seq_length,
        "batch_rows": config.data.global_batch_size,
        "optimizer": (
            f"{_OPTIMIZERS[optimizer.name]}, betas {optimizer.b1:g} and {optimizer.b2:g}, "
            f"weight decay {optimizer.weight_decay:g}"
        ),
        "learning_rate": optimizer.learning_rate,
        "schedule": f"{optimizer.schedule} after {config.warmup_steps:,} steps of warm-up",
        "growth": _growth(config),
        "averaged": ", ".join(f"{step:,}" for step in source.averaged) or None,
        "training_loss": source.metrics.get("train/loss"),
        "validation_loss": source.metrics.get("validation/loss"),
        "bits_per_character": source.metrics.get("validation/bits_per_character"),
    }
    if not datasets:
        return facts
    splits = [dataset.train for dataset in datasets.values()]
    return facts | {
        "documents": sum(split.n_documents for split in splits),
        "tokens": sum(split.n_tokens for split in splits),
        "characters": sum_if_known(split.n_characters for split in splits),
        "sources": tuple(dict.fromkeys(source for dataset in datasets.values() for source in dataset.info.sources)),
        "mixture": tuple((Path(folder).name, weight) for folder, weight in config.data.datasets.items()),
    }
