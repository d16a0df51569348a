"""From a loaded model to a published folder: what is known of the run goes onto the model card."""

from pathlib import Path
from typing import Any

from gpt2_flax.checkpoint.source import Source
from gpt2_flax.config import Config
from gpt2_flax.data.mixture import Mixture
from gpt2_flax.errors import UserError
from gpt2_flax.export.model_card import CardFacts, model_card
from gpt2_flax.export.transformers_folder import export_folder
from gpt2_flax.export.verify import Verification
from gpt2_flax.text.tokenizer import load_tokenizer
from gpt2_flax.text.wordpiece import WordPieceTokenizer

_OPTIMIZERS = {
    "adamw": "AdamW",
    "adamw_uer": "AdamW without bias correction, as in UER-py",
    "muon": "Muon for matrices and AdamW for all else",
}


def publish(
    source: Source, output: Path, *, torch_bin: bool, overwrite: bool, **card: str | None
) -> Verification | None:
    """Exports `source`; `card` holds the fields of `CardFacts` that only a person knows. As `export_folder`."""
    tokenizer = load_tokenizer(source.tokenizer_folder)
    facts = CardFacts(
        model=source.model,
        wordpiece=isinstance(tokenizer, WordPieceTokenizer),
        parameters=sum(array.size for array in source.weights.values()),
        **(_run_facts(source, source.config) if source.config else {}),
        **card,
    )
    return export_folder(
        source.weights,
        source.model,
        tokenizer,
        output,
        card=model_card(facts),
        torch_bin=torch_bin,
        overwrite=overwrite,
    )


def _run_facts(source: Source, config: Config) -> dict[str, Any]:
    optimizer = config.optimizer
    facts = {
        "seq_length": config.data.seq_length,
        "steps": source.step,
        "batch_rows": config.data.global_batch_size,
        "optimizer": (
            f"{_OPTIMIZERS[optimizer.name]}, betas {optimizer.b1:g} and {optimizer.b2:g}, "
            f"weight decay {optimizer.weight_decay:g}"
        ),
        "learning_rate": optimizer.learning_rate,
        "schedule": f"{optimizer.schedule} after {config.warmup_steps:,} steps of warm-up",
        "training_loss": source.metrics.get("train/loss"),
        "validation_loss": source.metrics.get("validation/loss"),
        "bits_per_character": source.metrics.get("validation/bits_per_character"),
    }
    try:
        datasets = Mixture(config.data.datasets).datasets
    except UserError:  # moved or deleted since: its counts are left out
        return facts
    splits = [dataset.train for dataset in datasets.values()]
    characters = [split.n_characters for split in splits]
    return facts | {
        "documents": sum(split.n_documents for split in splits),
        "tokens": sum(split.n_tokens for split in splits),
        "characters": None if None in characters else sum(characters),
        "sources": tuple(dict.fromkeys(source for dataset in datasets.values() for source in dataset.info.sources)),
        "mixture": tuple((Path(folder).name, weight) for folder, weight in config.data.datasets.items()),
    }
