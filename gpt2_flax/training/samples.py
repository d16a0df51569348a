"""Continuations of a few prompts, by which a person can judge a run."""

from pathlib import Path

from gpt2_flax.config import Config
from gpt2_flax.data.inspect import dataset_tokenizer
from gpt2_flax.data.mixture import Mixture
from gpt2_flax.errors import ExitCode, UserError, printable
from gpt2_flax.inference.generate import Sampling, continue_texts, prompt_ids
from gpt2_flax.model.decoding import decoder_of
from gpt2_flax.model.gpt2 import GPT2
from gpt2_flax.tokenizers.tokenizer import load_tokenizer

_SAMPLING = Sampling(top_k=50)


def check_prompts(config: Config, mixture: Mixture) -> None:
    """Raises `UserError`: CONFIG when one of `training.prompts` leaves the model no room for a token, and as
    `dataset_tokenizer`, since the run keeps the tokenizer."""
    prompts, positions = config.training.prompts, config.model.n_positions
    tokenizer = dataset_tokenizer(next(iter(mixture.datasets.values())))
    for prompt, ids in zip(prompts, prompt_ids(tokenizer, prompts), strict=True):
        if len(ids) >= positions:
            what = f"a prompt of {len(ids)} tokens leaves no room in {positions} positions"
            raise UserError(ExitCode.CONFIG, what, f"training.prompts, {printable(prompt[:20])}...", "shorten it")


class Samples:
    """Continues `training.prompts`; all processes of a run call it together."""

    def __init__(self, config: Config, tokenizer_folder: Path):
        self._prompts, self._training = config.training.prompts, config.training
        self._tokenizer = load_tokenizer(tokenizer_folder) if self._prompts else None

    def texts(self, model: GPT2) -> list[str]:
        """Returns each prompt with its continuation, drawn with the run's seed: only the model makes a difference."""
        if not self._prompts:
            return []
        tokens, seed = self._training.sample_tokens, self._training.seed
        return continue_texts(decoder_of(model), self._tokenizer, self._prompts, tokens, _SAMPLING, seed)
