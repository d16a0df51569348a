"""The arithmetic of training."""

from gpt2_flax.config.model import ModelConfig
from gpt2_flax.config.schema import ResolvedConfig


def flops_per_token(model: ModelConfig, seq_length: int) -> int:
    """Return the floating point operations of training on one token, forward and backward.

    Counted as in PaLM (Chowdhery et al., arXiv:2204.02311, appendix B) and Megatron-LM (Narayanan et al.,
    arXiv:2104.04473): 6 operations for each parameter of a matrix product, including the head but not the embedding
    look-up, and 12 * n_layer * n_embd * seq_length for attention over whole rows, although half of each row is masked.
    Rematerialization and the padding of the vocabulary do not count.
    """
    in_blocks = 12 * model.n_layer * model.n_embd**2  # 3 query, key, value, 1 output, 4 + 4 MLP
    head = model.vocab_size * model.n_embd
    return 6 * (in_blocks + head) + 12 * model.n_layer * model.n_embd * seq_length


def flops_of_steps(config: ResolvedConfig, first: int, last: int) -> int:
    """Return the operations of the steps `first` + 1 to `last` of a run, counted as in `flops_per_token`."""
    n_before_growth = max(0, min(last, config.growth_steps) - first)
    smaller, positions = config.before_growth(), config.data.global_batch_size * config.data.seq_length
    return positions * (
        n_before_growth * flops_per_token(smaller.model, smaller.data.seq_length)
        + (last - first - n_before_growth) * flops_per_token(config.model, config.data.seq_length)
    )
