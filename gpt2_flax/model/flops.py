"""The arithmetic of one training token."""

from gpt2_flax.config.schema import ModelConfig


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
