"""How much arithmetic a token takes."""

from gpt2_flax.config.schema import ModelConfig


def flops_per_token(model: ModelConfig, seq_length: int) -> int:
    """Returns the floating point operations that training on one token takes, forward and backward.

    As in PaLM (Chowdhery et al., arXiv:2204.02311, appendix B) and Megatron-LM (Narayanan et al., arXiv:2104.04473): 6
    for each parameter of a matrix product, the head included and looking up embeddings not, and 12 * n_layer *
    n_embd * seq_length for attention, whole rows, though half of them is masked. What is computed again going backward
    and the padding of the vocabulary count for nothing.
    """
    in_blocks = 12 * model.n_layer * model.n_embd**2  # 3 query, key, value, 1 output, 4 + 4 MLP
    head = model.vocab_size * model.n_embd
    return 6 * (in_blocks + head) + 12 * model.n_layer * model.n_embd * seq_length
