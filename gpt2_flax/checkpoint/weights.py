"""Translate a model from and to `Weights`, a flat dict of float32 numpy arrays by path.

Checkpoints, exports and imports share this form.

Dimension key: V vocabulary, D n_embd, B batch, T time.
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from gpt2_flax.config.model import ModelConfig
from gpt2_flax.model.gpt2 import GPT2
from gpt2_flax.parallel.rules import path_of

Weights = dict[str, np.ndarray]

_BY_TOKEN = ("wte/embedding", "lm_head/embedding")  # arrays with a row for each token


def abstract_model(config: ModelConfig) -> GPT2:
    """Return the model with ShapeDtypeStructs in place of arrays."""
    return jax.eval_shape(lambda: GPT2(config, rngs=nnx.Rngs(0)))


def weights_of(model: GPT2) -> Weights:
    """Return the parameters as float32 numpy arrays, embedding and head without padding rows."""
    leaves = jax.tree_util.tree_leaves_with_path(model)
    weights = {path_of(key_path): np.asarray(leaf, np.float32) for key_path, leaf in leaves}
    return weights | {path: weights[path][: model.cfg.vocab_size] for path in _BY_TOKEN if path in weights}


def model_from_weights(config: ModelConfig, weights: Weights) -> GPT2:
    """Return a model on the default device; the inverse of `weights_of`. Raises KeyError or ValueError on a misfit."""
    padding = config.padded_vocab_size - config.vocab_size
    weights = weights | {path: np.pad(weights[path], ((0, padding), (0, 0))) for path in _BY_TOKEN if path in weights}
    model = abstract_model(config)
    surplus = weights.keys() - {path_of(key_path) for key_path, _ in jax.tree_util.tree_leaves_with_path(model)}
    if surplus:
        raise KeyError(f"not parameters of the model: {sorted(surplus)}")

    def place(key_path, leaf):
        array = weights[path_of(key_path)]
        if array.shape != leaf.shape:
            raise ValueError(f"{path_of(key_path)} has shape {array.shape}, expected {leaf.shape}")
        return jnp.asarray(array, leaf.dtype)

    return jax.tree_util.tree_map_with_path(place, model)


def logits_of(weights: Weights, config: ModelConfig, tokens_BT: np.ndarray) -> np.ndarray:
    """Return the logits (B, T, V) of a model, computed in float32 on every device."""
    return model_logits(model_from_weights(config.model_copy(update={"dtype": "float32"}), dict(weights)), tokens_BT)


def model_logits(model: GPT2, tokens_BT: np.ndarray) -> np.ndarray:
    """Return the logits (B, T, V), with matrix products as exact as the dtype of the model allows."""
    # By default GPUs and TPUs round the factors of a float32 product.
    with jax.default_matmul_precision("highest"):
        return np.asarray(_logits(model, tokens_BT.astype(np.int32)))


_logits = jax.jit(lambda model, tokens_BT: model(tokens_BT))
