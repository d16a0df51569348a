"""Continuations of `training.prompts`, by which a person can judge a run."""

from collections.abc import Callable

from gpt2_flax.config.schema import ResolvedConfig
from gpt2_flax.data.mixture import Mixture
from gpt2_flax.errors import ExitCode, UserError, printable
from gpt2_flax.model.gpt2 import GPT2

_TOP_K = 50

# The functions import generation themselves: most runs have no prompts, and need neither tokenizers nor decoding.


def check_prompts(config: ResolvedConfig, mixture: Mixture) -> None:
    """Raise `UserError` (CONFIG) when a prompt leaves the model no room for a token."""
    prompts, positions = config.training.prompts, config.model.n_positions
    if not prompts:
        return
    from gpt2_flax.inference.generate import prompt_ids

    for prompt, ids in zip(prompts, prompt_ids(mixture.tokenizer(), prompts), strict=True):
        if len(ids) >= positions:
            what = f"a prompt of {len(ids)} tokens leaves no room in {positions} positions"
            raise UserError(ExitCode.CONFIG, what, f"training.prompts, {printable(prompt[:20])}...", "shorten it")


def sampler(config: ResolvedConfig, mixture: Mixture) -> Callable[[GPT2], list[str]]:
    """Return a function that gives each prompt with its continuation; all processes of a run must call it together.

    The texts are sampled with the seed of the run, the same at each step.
    """
    training = config.training
    if not training.prompts:
        return lambda model: []
    from gpt2_flax.inference.generate import Sampling, continue_texts
    from gpt2_flax.model.decoding import decoder_of

    tokenizer, sampling = mixture.tokenizer(), Sampling(top_k=_TOP_K)
    return lambda model: continue_texts(
        decoder_of(model), tokenizer, training.prompts, training.sample_tokens, sampling, training.seed
    )
