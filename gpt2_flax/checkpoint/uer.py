"""GPT-2 in the names, shapes and arithmetic of UER-py and TencentPretrain: one table that serves both directions.

Their layer norm is gamma * (x - mean) / (deviation + 1e-6) + beta, with the deviation of a sample (n - 1). Dividing by
the root of the variance (n) plus 1e-7 is the same once gamma is multiplied by sqrt((n - 1) / n): deviations of a
residual stream are near 0.05, where both terms that are added come to the same.

Dimension key: V vocab_size, N n_positions, D n_embd, F 4 * n_embd.
"""

import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from gpt2_flax.checkpoint.huggingface import weight_shapes
from gpt2_flax.checkpoint.tensor_files import (
    Tensor,
    check_finite,
    check_tensors,
    read_torch,
    torch_tensors,
    unwrapped,
)
from gpt2_flax.config import ModelConfig, parse_model
from gpt2_flax.errors import ExitCode, UserError, quote
from gpt2_flax.input_files import read_object

LAYER_NORM_EPSILON = 1e-7
HEAD_SIZE = 64  # of all their published models; shapes do not tell

_WORDS = "embedding.word.embedding.weight"
_POSITIONS = "embedding.pos.embedding.weight"
_HEAD = "target.lm.output_layer.weight"
_OLD_NAMES = {
    "embedding.word_embedding.weight": _WORDS,
    "embedding.position_embedding.weight": _POSITIONS,
    "target.output_layer.weight": _HEAD,
}
_LAYER = re.compile(r"encoder\.transformer\.(\d{1,4})\.")

# What a config may say of the architecture: the only values that our model computes. Left out, they are taken to be so.
_ONLY: dict[str, tuple[Any, ...]] = {
    "embedding": ("word_pos", ["word_pos"], ["word", "pos"]),
    "remove_embedding_layernorm": (True,),
    "encoder": ("transformer",),
    "decoder": (None,),
    "mask": ("causal",),
    "layernorm_positioning": ("pre",),
    "layernorm": ("normal",),
    "feed_forward": ("dense",),
    "hidden_act": ("gelu_fast",),
    "target": ("lm", ["lm"]),
    "data_processor": ("lm",),
    "tie_weights": (True, False),
    "tie_weight": (True, False),  # an old spelling
    "bidirectional": (False,),
    "factorized_embedding_parameterization": (False,),
    "has_lmtarget_bias": (False,),
    "has_residual_attention": (False,),
    "parameter_sharing": (False,),
    "relative_position_embedding": (False,),
    "remove_attention_scale": (False,),
    "remove_transformer_bias": (False,),
    "rotary_position_embedding": (False,),
}
_SIZES = ("emb_size", "hidden_size", "feedforward_size", "heads_num", "layers_num", "max_seq_length", "dropout")
# These do not change what the model computes.
_FREE = ("deep_init", "labels_num", "learning_rate", "optimizer", "pooling", "scheduler", "warmup")


class Piece(NamedTuple):
    """One tensor of theirs (`{}` is the layer), its axes, and the part of our parameter that it is."""

    name: str
    axes: str
    path: str
    part: tuple[slice | int, ...] = ()

    @property
    def stacked(self) -> bool:
        return "{}" in self.name

    @property
    def transposed(self) -> bool:
        """Whether it is a torch Linear, [out, in]; ours are [in, out]."""
        return self.stacked and len(self.axes) > 1


def _block() -> Iterator[Piece]:
    layer = "encoder.transformer.{}."
    for number in (1, 2):
        yield Piece(f"{layer}layer_norm_{number}.gamma", "D", f"h/ln_{number}/scale")
        yield Piece(f"{layer}layer_norm_{number}.beta", "D", f"h/ln_{number}/bias")
    for number in range(3):  # q, k, v
        linear = f"{layer}self_attn.linear_layers.{number}"
        yield Piece(f"{linear}.weight", "DD", "h/attn/c_attn/kernel", (slice(None), number))
        yield Piece(f"{linear}.bias", "D", "h/attn/c_attn/bias", (number,))
    for theirs, ours, axes in (
        ("self_attn.final_linear", "attn/c_proj", "DD"),
        ("feed_forward.linear_1", "mlp/c_fc", "FD"),
        ("feed_forward.linear_2", "mlp/c_proj", "DF"),
    ):
        yield Piece(f"{layer}{theirs}.weight", axes, f"h/{ours}/kernel")
        yield Piece(f"{layer}{theirs}.bias", axes[0], f"h/{ours}/bias")


TABLE = (
    Piece(_WORDS, "VD", "wte/embedding"),
    Piece(_POSITIONS, "ND", "wpe/embedding"),
    *_block(),
    Piece("encoder.layer_norm.gamma", "D", "ln_f/scale"),
    Piece("encoder.layer_norm.beta", "D", "ln_f/bias"),
)
HEAD = Piece(_HEAD, "VD", "lm_head/embedding")  # only of an output layer that is not the embedding


def read_uer(path: Path, uer_config: Path | None = None) -> tuple[ModelConfig, dict[str, np.ndarray]]:
    """Returns the config and float32 weights of a UER-py or TencentPretrain `.bin`; `uer_config` is their config.json.

    Raises `UserError`: NO_INPUT when a file is missing, DATA when one is damaged, unsafe or of another model, USAGE
    when torch is not installed or the number of heads must be given.
    """
    for file in filter(None, (path, uer_config)):
        if not file.is_file():
            raise UserError(ExitCode.NO_INPUT, "file not found", file, "check the path")
    values = read_object(uer_config) if uer_config else {}
    return from_uer(open_uer(path), values, path, uer_config or path)


def open_uer(path: Path) -> dict[str, Tensor]:
    """Returns the tensors of a UER-py `.bin` under the names of its newest version; as `torch_tensors`."""
    if path.suffix == ".safetensors":
        raise UserError(ExitCode.DATA, "UER-py writes no such file", path, "give the transformers folder that it is in")
    fix = "copy it again, or save its state dict again with torch.save"
    return _renamed(unwrapped(torch_tensors(read_torch(path, fix), path, fix)), path)


def from_uer(
    state_dict: Mapping[str, np.ndarray | Tensor],
    uer_config: Mapping[str, Any],
    where: object = "state dict",
    where_config: object = "UER config",
) -> tuple[ModelConfig, dict[str, np.ndarray]]:
    """Returns a config, its sizes from the shapes, and float32 weights that compute what UER-py does.

    `uer_config` may give heads_num (width / 64 when left out), dropout, tie_weights (whether the output layer holds
    the embedding's numbers when left out), and what must be as in GPT-2.
    Raises `UserError`: DATA naming tensors that are missing, surplus or of another shape, an output layer that is not
    the embedding as it should be, or a config of another model; USAGE when the heads cannot be told.
    """
    tensors = {name: _as_tensor(value) for name, value in _renamed(state_dict, where).items()}
    _check_architecture(uer_config, where_config)
    config = _config(tensors, uer_config, where, where_config)
    _check(tensors, config, where)
    config = config.model_copy(update={"tie_word_embeddings": _head_is_tied(tensors, _tied(uer_config), where)})
    weights = {path: np.empty(shape, np.float32) for path, shape in weight_shapes(config).items()}
    for piece, name, target in _pieces(weights, config.n_layer):
        array = tensors[name].load()
        check_finite(name, array, where)
        target[...] = (array.T if piece.transposed else array).reshape(target.shape)
        if name.endswith(".gamma"):
            target *= _gain(config)
    return config, weights


def to_uer(weights: Mapping[str, np.ndarray], config: ModelConfig) -> dict[str, np.ndarray]:
    """Returns `weights` as UER-py's state dict: contiguous copies, a tied output layer being the embedding's array.

    Its layer norms are ours if `config.layer_norm_epsilon` is 1e-7; UER-py has no other.
    """
    sizes, state_dict = _sizes(config), {}
    for piece, name, array in _pieces(weights, config.n_layer):
        shape = [sizes[axis] for axis in piece.axes]
        array = array.reshape(shape[::-1]).T if piece.transposed else array.reshape(shape)
        if name.endswith(".gamma"):
            array = array / _gain(config)
        state_dict[name] = np.array(array, np.float32, order="C")
    state_dict.setdefault(_HEAD, state_dict[_WORDS])
    return state_dict


def to_uer_config(config: ModelConfig) -> dict[str, Any]:
    """Returns what the file for UER-py's --config_path holds."""
    return {
        "emb_size": config.n_embd,
        "feedforward_size": 4 * config.n_embd,
        "hidden_size": config.n_embd,
        "hidden_act": "gelu_fast",
        "heads_num": config.n_head,
        "layers_num": config.n_layer,
        "max_seq_length": config.n_positions,
        "dropout": config.resid_pdrop,
        "data_processor": "lm",
        "embedding": ["word", "pos"],
        "remove_embedding_layernorm": True,
        "encoder": "transformer",
        "mask": "causal",
        "layernorm_positioning": "pre",
        "target": ["lm"],
        "tie_weights": config.tie_word_embeddings,
    }


def model_values(uer_config: Mapping[str, Any], where: object) -> dict[str, Any]:
    """Returns the fields of `ModelConfig` that a UER config.json gives; raises `UserError` (DATA) as `from_uer`."""
    _check_architecture(uer_config, where)
    names = {"n_embd": "hidden_size", "n_layer": "layers_num", "n_head": "heads_num", "n_positions": "max_seq_length"}
    values = {ours: uer_config[theirs] for ours, theirs in names.items() if theirs in uer_config}
    width = values.get("n_embd")
    for name, expected in (("emb_size", width), ("feedforward_size", 4 * width if isinstance(width, int) else None)):
        if expected is not None and uer_config.get(name, expected) != expected:
            what = f"{name} {quote(uer_config[name])} cannot be used with hidden_size {width}"
            raise UserError(ExitCode.DATA, what, where, f"only {expected} can")
    if "dropout" in uer_config:
        values |= dict.fromkeys(("embd_pdrop", "attn_pdrop", "resid_pdrop"), uer_config["dropout"])
    if (tied := _tied(uer_config)) is not None:
        values["tie_word_embeddings"] = tied
    return values


def _tied(uer_config: Mapping[str, Any]) -> bool | None:
    return uer_config.get("tie_weights", uer_config.get("tie_weight"))


def _as_tensor(value: np.ndarray | Tensor) -> Tensor:
    return value if isinstance(value, Tensor) else Tensor(value.shape, value.dtype.name, lambda: value)


def _renamed(tensors: Mapping[str, Any], where: object) -> dict[str, Any]:
    renamed = {_OLD_NAMES.get(name, name): tensor for name, tensor in tensors.items()}
    if len(renamed) < len(tensors):
        twice = next(new for old, new in _OLD_NAMES.items() if old in tensors and new in tensors)
        raise UserError(ExitCode.DATA, f"{twice} stands there twice, under its old name too", where, "remove one")
    return renamed


def _check_architecture(uer_config: Mapping[str, Any], where: object) -> None:
    for name, value in uer_config.items():
        if name in _ONLY and not any(type(value) is type(one) and value == one for one in _ONLY[name]):
            fix = f"only {' or '.join(map(repr, _ONLY[name]))} can be used"
            raise UserError(ExitCode.DATA, f"{name} {quote(value)} is not supported", where, fix)
        if name not in _ONLY and name not in _SIZES and name not in _FREE:
            fix = "take it out of the file if the model computes the same without it"
            raise UserError(ExitCode.DATA, f"unknown field {quote(name)}", where, fix)


def _config(
    tensors: Mapping[str, Tensor], uer_config: Mapping[str, Any], where: object, where_config: object
) -> ModelConfig:
    for name in (_WORDS, _POSITIONS):
        if name not in tensors or len(tensors[name].shape) != 2:
            fix = "it should be a GPT-2 of UER-py or TencentPretrain; for a transformers model give its folder"
            raise UserError(ExitCode.DATA, f"no {name} with two axes", where, fix)
    (vocabulary, width), (positions, _) = tensors[_WORDS].shape, tensors[_POSITIONS].shape
    layers = {int(found[1]) for name in tensors if (found := _LAYER.match(name))}
    values = {"n_embd": width, "n_layer": max(layers, default=-1) + 1, "n_positions": positions}
    given = model_values(uer_config, where_config)
    for name, found in values.items():
        if given.get(name, found) != found:
            what = f"{name} is {quote(given[name])} by the config but {found} by the tensors"
            raise UserError(ExitCode.DATA, what, where_config, "give the config that the model was trained with")
    if "n_head" not in given and width % HEAD_SIZE:
        what = f"the number of heads cannot be told from width {width}"
        raise UserError(ExitCode.USAGE, what, where, 'give --uer-config FILE.json with {"heads_num": ...}')
    values = {"n_head": width // HEAD_SIZE} | given | values
    values |= {"vocab_size": vocabulary, "layer_norm_epsilon": LAYER_NORM_EPSILON}
    return parse_model(values, where_config, "the file is damaged or of another model")


def _check(tensors: Mapping[str, Tensor], config: ModelConfig, where: object) -> None:
    sizes = _sizes(config)
    expected = {}
    for piece in (*TABLE, HEAD):
        shape = tuple(sizes[axis] for axis in piece.axes)
        expected |= {piece.name.format(layer): shape for layer in range(config.n_layer if piece.stacked else 1)}
    check_tensors(tensors, expected, _HEAD, "tensors are not those of a GPT-2 of UER-py", where)


def _head_is_tied(tensors: Mapping[str, Tensor], said: bool | None, where: object) -> bool:
    """Returns whether the output layer is the embedding, which the config may have `said`."""
    if _HEAD not in tensors:
        if said:
            return True
        fix = 'if it is the token embedding say so: --uer-config FILE.json with {"tie_weights": true}'
        raise UserError(ExitCode.DATA, f"{_HEAD} missing", where, fix)
    if said is False:
        return False
    head_VD, words_VD = (tensors[name].load() for name in (_HEAD, _WORDS))
    check_finite(_HEAD, head_VD, where)
    check_finite(_WORDS, words_VD, where)
    difference = float(np.abs(head_VD - words_VD).max(initial=0))
    if said and difference != 0:
        what = f"tie_weights is true but {_HEAD} differs from {_WORDS} by up to {difference:.1e}"
        raise UserError(ExitCode.DATA, what, where, "give the config that the model was trained with")
    return difference == 0


def _pieces(weights: Mapping[str, np.ndarray], n_layer: int) -> Iterator[tuple[Piece, str, np.ndarray]]:
    """Yields each tensor of theirs: its piece, its name, and a view of our array where its numbers are."""
    for piece in (*TABLE, HEAD) if HEAD.path in weights else TABLE:
        for layer in range(n_layer if piece.stacked else 1):
            array = weights[piece.path][layer] if piece.stacked else weights[piece.path]
            yield piece, piece.name.format(layer), array[piece.part]


def _gain(config: ModelConfig) -> np.float32:
    return np.float32(math.sqrt((config.n_embd - 1) / config.n_embd))


def _sizes(config: ModelConfig) -> dict[str, int]:
    return {"V": config.vocab_size, "N": config.n_positions, "D": config.n_embd, "F": 4 * config.n_embd}
