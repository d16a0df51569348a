"""A model in memory, which generates, evaluates, scores and exports."""

import warnings
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, overload

from pydantic import Field

from gpt2_flax.api.arguments import Length, LocalPath, Rows, Seed, Share, Source, Step, Text, checked
from gpt2_flax.errors import ExitCode, UserError
from gpt2_flax.input_files import MOST_POSITIONS, MOST_TOKENS
from gpt2_flax.text.documents import CorpusFormat, CorpusOptions, OnError, Separator

if TYPE_CHECKING:
    import numpy as np

    from gpt2_flax.checkpoint.source import Source as LoadedSource
    from gpt2_flax.config.model import ModelConfig
    from gpt2_flax.inference.evaluation import Evaluation
    from gpt2_flax.inference.generate import Generator
    from gpt2_flax.model.gpt2 import GPT2
    from gpt2_flax.tokenizers.tokenizer import Tokenizer


class Model:
    """A GPT-2 in memory with its tokenizer, made by `load`.

    `generate`, `score` and `logits` compute in float32. `evaluate` computes as training did, and on all devices.
    """

    def __init__(self, source: "LoadedSource"):
        self._source = source

    def __repr__(self) -> str:
        size = sum(array.size for array in self._source.weights.values())
        return f"<Model {self.origin}: {size:,} parameters>"

    @property
    def origin(self) -> str:
        """Where the model came from, such as `runs/mine at step 1000`."""
        return self._source.origin

    @property
    def step(self) -> int | None:
        """The step of the checkpoint; None if the model does not come from a run."""
        return self._source.step

    @property
    def metrics(self) -> Mapping[str, float]:
        """The metrics of the run at that step, such as `validation/loss`; empty if the model comes from no run."""
        return self._source.metrics

    @property
    def config(self) -> "ModelConfig":
        """The architecture; its attributes are the keys of the section `model` of a config, such as `n_layer`."""
        return self._source.model

    @cached_property
    def tokenizer(self) -> "Tokenizer":
        """The tokenizer, with `vocab_size`, `bos_id`, `eos_id`, `pad_id` and `unk_id`; an id is None if missing."""
        return self._source.tokenizer()

    @cached_property
    def _generator(self) -> "Generator":
        from gpt2_flax.inference.generate import Generator

        return Generator(self._source)

    @cached_property
    def _in_float32(self) -> "GPT2":
        from gpt2_flax.checkpoint.weights import model_from_weights

        return model_from_weights(self.config.model_copy(update={"dtype": "float32"}), self._source.weights)

    @checked
    def encode(self, text: Text) -> list[int]:
        """Return the ids of a text as the begin of a document: the special id `bos_id`, and the ids of the text."""
        from gpt2_flax.inference.generate import prompt_ids

        return prompt_ids(self.tokenizer, [text])[0]

    def decode(self, ids: "Sequence[int] | np.ndarray") -> str:
        """Return the text of ids, without special and unknown tokens.

        Args:
            ids: Token ids of shape (T,): a list, or an array of integers.
        """
        return self.tokenizer.decode([int(token) for token in ids])

    @overload
    def generate(
        self, prompt: str, max_new_tokens: int = 0, *, stream: Literal[True], **more: Any
    ) -> Iterator[str]: ...
    @overload
    def generate(self, prompt: str, max_new_tokens: int = 0, *, stream: Literal[False] = False, **more: Any) -> str: ...
    @overload
    def generate(
        self,
        prompt: list[str] | tuple[str, ...],
        max_new_tokens: int = 0,
        *,
        stream: Literal[False] = False,
        **more: Any,
    ) -> list[str]: ...

    @checked
    def generate(
        self,
        prompt: Text | Sequence[Text],
        max_new_tokens: Length = 100,
        *,
        samples: Rows = 1,
        temperature: Annotated[float, Field(ge=0.0, le=1000.0)] = 1.0,
        top_k: Annotated[int, Field(ge=0, le=MOST_TOKENS)] = 50,
        top_p: Share = 1.0,
        min_p: Share = 0.0,
        repetition_penalty: Annotated[float, Field(ge=1.0, le=1000.0)] = 1.0,
        no_repeat_ngram: Annotated[int, Field(ge=0, le=MOST_POSITIONS)] = 0,
        allow_unknown: bool = False,
        stream: bool = False,
        seed: Seed = 0,
    ) -> str | list[str] | Iterator[str]:
        """Continue a text, or each of several texts.

        Args:
            prompt: The beginning of a text, or a list of beginnings.
            max_new_tokens: The maximum number of new tokens of a text.
            samples: The number of texts for each prompt.
            temperature: Higher values give more varied text; 0 takes the most likely token (greedy).
            top_k: Sample from this many most likely tokens; 0 for all.
            top_p: Keep the most likely tokens up to this total probability.
            min_p: Skip tokens below this share of the probability of the most likely token.
            repetition_penalty: Above 1, tokens of the text so far become less likely.
            no_repeat_ngram: Never repeat a sequence of this many tokens; 0 for no limit.
            allow_unknown: Allow unknown tokens in the text.
            stream: Yield the new text of one prompt in pieces, as it comes.
            seed: The same seed gives the same texts, in any batch.

        Returns:
            The text with its prompt; a list for a list of prompts, and for `samples` above 1, where the samples of a
            prompt follow each other. With `stream`, an iterator over pieces of the text after the prompt.

        Raises:
            UserError: DATA if a prompt leaves no room for a token; USAGE for `stream` with several texts.
        """
        from gpt2_flax.inference.generate import unknown_warning, with_text_only
        from gpt2_flax.inference.sampling import Sampling

        prompts, one = [prompt] if isinstance(prompt, str) else list(prompt), isinstance(prompt, str) and samples == 1
        if stream and not one:
            fix = "give one prompt and one sample"
            raise UserError(ExitCode.USAGE, "stream is for one text", "gpt2_flax.Model.generate", fix)
        if found := unknown_warning(self.tokenizer, prompts):
            warnings.warn(found, stacklevel=3)
        sampling = Sampling(temperature, top_k, top_p, min_p, repetition_penalty, no_repeat_ngram)
        sampling = with_text_only(sampling, self.tokenizer, self.config.vocab_size, unknown=allow_unknown)
        if stream:
            return self._generator.stream(prompts[0], max_new_tokens, sampling, seed)
        texts = self._generator.texts(prompts, max_new_tokens, sampling, seed, samples)
        return texts[0] if one else texts

    @checked
    def evaluate(
        self,
        data: Source | None = None,
        *,
        seq_length: Length | None = None,
        batch_size: Rows = 16,
        batches: Step = 0,
        split: Literal["train", "validation"] | None = None,
        per_document: LocalPath | None = None,
        format: CorpusFormat = "auto",
        separator: Separator = "line",
        field: str = "text",
        encoding: str = "auto",
        on_error: OnError = "stop",
    ) -> "Evaluation":
        """Evaluate the model on held-out text.

        Args:
            data: A dataset or a corpus; None for the datasets of the run.
            seq_length: The number of tokens in a row; None for the length of the run, or else `n_positions`.
            batch_size: The number of rows in a batch.
            batches: The number of batches; 0 for all.
            split: The split of a dataset; None for `validation`.
            per_document: A new file, with a line of JSON for each document.
            format, separator, field, encoding, on_error: How to read a corpus, as in `prepare`.

        Raises:
            UserError: USAGE if there is no data; CONFIG if the dataset has another tokenizer; DATA for damaged data.
        """
        from gpt2_flax.inference.evaluate import evaluate_source

        options = CorpusOptions(format, separator, field, encoding, on_error)
        name = None if data is None else str(data)
        lines = None if per_document is None else Path(per_document)
        return evaluate_source(self._source, name, seq_length, batch_size, batches, options, split, lines)

    @overload
    def score(self, text: str) -> "Evaluation": ...
    @overload
    def score(self, text: list[str] | tuple[str, ...]) -> "list[Evaluation]": ...

    @checked
    def score(self, text: Text | Sequence[Text]) -> "Evaluation | list[Evaluation]":
        """Return how well the model predicts a text, or each of several texts.

        Each text is a document of its own. All tokens after the begin count, and so does the end of the document. A
        text that is longer than the model can see is predicted in several segments, each without the segments before.

        Args:
            text: One text, or a list of texts.

        Returns:
            For each text the sums and figures of its tokens. The log-probability of a text is `-nats`.
        """
        from gpt2_flax.inference.generate import prompt_ids
        from gpt2_flax.inference.score import evaluate_texts

        texts = [text] if isinstance(text, str) else list(text)
        ids = [[*ids, self.tokenizer.eos_id] for ids in prompt_ids(self.tokenizer, texts)]
        found = evaluate_texts(self._in_float32, ids, list(map(len, texts)))
        return found[0] if isinstance(text, str) else found

    def logits(self, ids: "Sequence[int] | Sequence[Sequence[int]] | np.ndarray") -> "np.ndarray":
        """Return the logits of the next token at each position.

        Args:
            ids: Token ids of shape (T,), or rows of the same length, of shape (B, T). No special id is added: `encode`
                gives ids with the begin of the document.

        Returns:
            Float32 logits of shape (T, vocab_size) or (B, T, vocab_size).

        Raises:
            UserError: DATA if `ids` are no such array, too long for the model, or outside the vocabulary.
        """
        from gpt2_flax.inference.score import logits_of_ids

        return logits_of_ids(self._in_float32, ids)

    @checked
    def export(
        self,
        output: LocalPath,
        *,
        format: Literal["safetensors", "bin", "gguf"] = "safetensors",
        dtype: Literal["float32", "bfloat16", "float16"] = "float32",
        max_shard_size: str = "5GB",
        name: str | None = None,
        language: str | None = None,
        license: str | None = None,
        prompt: str | None = None,
        dataset: Sequence[str] | None = None,
        hardware: str | None = None,
        card_extra: LocalPath | None = None,
        overwrite: bool = False,
    ) -> str:
        """Export the model as a `transformers` folder, and check that it computes the same there.

        Args:
            output: The new folder.
            format: `bin` and `gguf` add `pytorch_model.bin` or `model.gguf` to `model.safetensors`.
            dtype: The type of the weights.
            max_shard_size: The size limit of a file of weights, such as `500MB`.
            name: The title of the model card; None for the name of the folder.
            language: The language code for the model card, such as `zh`.
            license: The license for the model card, such as `apache-2.0`.
            prompt: The example of the model card; None for one from the run.
            dataset: Names of datasets on the Hugging Face hub, for the model card.
            hardware: The hardware, for the model card; None for the hardware of the run.
            card_extra: A Markdown file to append to the model card.
            overwrite: Whether `output` may replace a folder from an earlier call.

        Returns:
            A sentence that says what was compared, with the largest difference found.

        Raises:
            UserError: CANT_CREATE if `output` exists; BUG if `transformers` computes something else.
        """
        from gpt2_flax.export.publish import publish
        from gpt2_flax.export.verify import NOT_VERIFIED
        from gpt2_flax.export.weight_files import shard_size

        folder = Path(output)
        verification = publish(
            self._source,
            folder,
            format=format,
            dtype=dtype,
            max_shard_size=shard_size(max_shard_size),
            overwrite=overwrite,
            card_extra=None if card_extra is None else Path(card_extra),
            name=name or folder.resolve().name,
            language=language,
            license=license,
            prompt=prompt,
            datasets=tuple(dataset or ()) or None,
            hardware=hardware,
        )
        return str(verification or NOT_VERIFIED)
