"""Weights drawn at random, and `transformers` folders made of them, for tests of reading and writing such folders."""

import json
from pathlib import Path

import numpy as np
from hypothesis import strategies as st
from safetensors.numpy import save_file

from gpt2_flax.checkpoint.huggingface import assemble, table, to_hf_config, to_state_dict
from gpt2_flax.checkpoint.tensor_files import Tensor
from gpt2_flax.config.model import ModelConfig

CONFIG = ModelConfig(vocab_size=50, n_positions=12, n_layer=2, n_head=3, n_embd=12, dtype="float32")


@st.composite
def configs(draw):
    heads, size = draw(st.integers(1, 4)), draw(st.integers(1, 5))
    sizes = {field: draw(st.integers(1, 9)) for field in ("vocab_size", "n_positions", "n_layer")}
    rates = {field: draw(st.sampled_from([0.0, 0.1])) for field in ("embd_pdrop", "attn_pdrop", "resid_pdrop")}
    rates["tie_word_embeddings"] = draw(st.booleans())
    return ModelConfig(**sizes, **rates, n_head=heads, n_embd=heads * size, layer_norm_epsilon=draw(st.floats(1e-9, 1)))


def random_weights(config: ModelConfig, seed: int = 0) -> dict[str, np.ndarray]:
    sizes = {"3": 3, "V": config.vocab_size, "N": config.n_positions, "D": config.n_embd, "H": config.n_head}
    sizes |= {"K": config.head_size, "F": 4 * config.n_embd}
    rng, weights = np.random.default_rng(seed), {}
    for entry in table(config.tie_word_embeddings):
        shape = [config.n_layer] if entry.stacked else []
        shape += [sizes[axis] for axis in entry.axes.replace(" ", "")]
        weights[entry.path] = 0.3 * rng.standard_normal(shape, np.float32) + (entry.path.endswith("scale"))
    return weights


def as_tensors(arrays: dict[str, np.ndarray]) -> dict[str, Tensor]:
    return {name: Tensor(array.shape, array.dtype.name, lambda array=array: array) for name, array in arrays.items()}


def from_state_dict(state_dict: dict[str, np.ndarray], config: ModelConfig) -> dict[str, np.ndarray]:
    return assemble(as_tensors(state_dict), config, "state dict")


def write_folder(folder: Path, config: ModelConfig = CONFIG, **changes: object) -> Path:
    """A good folder, but for `changes` to config.json."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(to_hf_config(config, 1, 2, 0) | changes))
    save_file(to_state_dict(random_weights(config)), folder / "model.safetensors")
    return folder
