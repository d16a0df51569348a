"""Read models of UER-py and TencentPretrain: their tensor names, shapes and arithmetic.

Their layer norm is gamma * (x - mean) / (deviation + 1e-6) + beta, where the deviation divides by n - 1. This package
adds epsilon to the variance, which divides by n. Gamma times sqrt((n - 1) / n) corrects for n. An epsilon of 1e-7 has
the same effect as their 1e-6 where deviations are near 0.05, as they are in a residual stream.

Dimension key: B batch, T time, V vocab_size, N n_positions, D n_embd, F 4 * n_embd.
"""

import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from gpt2_flax.checkpoint.huggingface import weight_shapes
from gpt2_flax.checkpoint.tensor_files import Tensor, check_finite, check_tensors, read_torch, torch_tensors, unwrapped
from gpt2_flax.checkpoint.weights import logits_of
from gpt2_flax.config.model import ModelConfig
from gpt2_flax.config.parse import parse_model
from gpt2_flax.errors import ExitCode, UserError, quote
from gpt2_flax.formats.uer_config import check_architecture, is_tied, model_values
from gpt2_flax.input_files import read_object

LAYER_NORM_EPSILON = 1e-7
HEAD_SIZE = 64  # the head size of all published models; shapes do not tell it
WORDS = "embedding.word.embedding.weight"

_POSITIONS = "embedding.pos.embedding.weight"
_HEAD = "target.lm.output_layer.weight"
_OLD_NAMES = {
    "embedding.word_embedding.weight": WORDS,
    "embedding.position_embedding.weight": _POSITIONS,
    "target.output_layer.weight": _HEAD,
}
_LAYER = re.compile(r"encoder\.transformer\.(\d{1,4})\.")
_FIX = "copy it again, or save its state dict again with torch.save"


class Entry(NamedTuple):
    """A tensor of UER-py: its name (`{}` is the layer), its axes, and the slice of our parameter that it holds."""

    name: str
    axes: str
    path: str
    slices: tuple[slice | int, ...] = ()

    @property
    def stacked(self) -> bool:
        return "{}" in self.name

    @property
    def transposed(self) -> bool:
        """Whether the tensor is a torch Linear, [out, in]; our kernels are [in, out]."""
        return self.stacked and len(self.axes) > 1


def _block() -> Iterator[Entry]:
    layer = "encoder.transformer.{}."
    for number in (1, 2):
        yield Entry(f"{layer}layer_norm_{number}.gamma", "D", f"h/ln_{number}/scale")
        yield Entry(f"{layer}layer_norm_{number}.beta", "D", f"h/ln_{number}/bias")
    for number in range(3):  # q, k, v
        linear = f"{layer}self_attn.linear_layers.{number}"
        yield Entry(f"{linear}.weight", "DD", "h/attn/c_attn/kernel", (slice(None), number))
        yield Entry(f"{linear}.bias", "D", "h/attn/c_attn/bias", (number,))
    for theirs, ours, axes in (
        ("self_attn.final_linear", "attn/c_proj", "DD"),
        ("feed_forward.linear_1", "mlp/c_fc", "FD"),
        ("feed_forward.linear_2", "mlp/c_proj", "DF"),
    ):
        yield Entry(f"{layer}{theirs}.weight", axes, f"h/{ours}/kernel")
        yield Entry(f"{layer}{theirs}.bias", axes[0], f"h/{ours}/bias")


TABLE = (
    Entry(WORDS, "VD", "wte/embedding"),
    Entry(_POSITIONS, "ND", "wpe/embedding"),
    *_block(),
    Entry("encoder.layer_norm.gamma", "D", "ln_f/scale"),
    Entry("encoder.layer_norm.beta", "D", "ln_f/bias"),
)
HEAD = Entry(_HEAD, "VD", "lm_head/embedding")  # an output layer that is not tied to the embedding


class Comparison(NamedTuple):
    """The largest difference between the logits of UER-py and our logits."""

    max_logit_difference: float
    max_logit: float
    tokens: int
    epsilon: float

    def __str__(self) -> str:
        note = f" (layer_norm_epsilon is {self.epsilon:g} here, where {LAYER_NORM_EPSILON:g} is nearest to UER-py)"
        note = "" if self.epsilon == LAYER_NORM_EPSILON else note
        return f"logits of {self.tokens} tokens are those of UER-py within {self.max_logit_difference:.1e}{note}"


def read_uer(path: Path, uer_config: Path | None = None) -> tuple[ModelConfig, dict[str, np.ndarray]]:
    """Return the config and float32 weights of a `.bin` file; `uer_config` is the config.json of UER-py.

    Raises:
        UserError: NO_INPUT if a file is missing; DATA if one is damaged, unsafe or of another model; USAGE if torch is
            not installed or the number of heads must be given.
    """
    if not path.is_file():
        raise UserError(ExitCode.NO_INPUT, "file not found", path, "check the path")
    values = _read_config(uer_config)
    return from_uer(open_uer(path), values, path, uer_config or path)


def read_content(
    content: Mapping[str, Any], path: Path, config_file: Path | None = None
) -> tuple[ModelConfig, dict[str, np.ndarray]]:
    """Return the config and float32 weights of an opened `.bin` file. Raises as `read_uer`."""
    tensors = unwrapped(torch_tensors(content, path, _FIX))
    return from_uer(tensors, _read_config(config_file), path, config_file or path)


def open_uer(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a `.bin` file under the names of the newest UER-py. Raises as `torch_tensors`."""
    return _renamed(unwrapped(torch_tensors(read_torch(path, _FIX), path, _FIX)), path)


def from_uer(
    tensors: Mapping[str, Tensor], uer_config: Mapping[str, Any], where: object, where_config: object
) -> tuple[ModelConfig, dict[str, np.ndarray]]:
    """Return a config with the sizes of the tensors, and float32 weights that compute the same as UER-py.

    Args:
        uer_config: May give heads_num (default: width / 64), dropout, tie_weights (default: whether the output layer
            equals the embedding), and fields that must have the values of GPT-2.

    Raises:
        UserError: DATA for tensors that are missing, surplus or of another shape, for an output layer that differs
            from the embedding against `tie_weights`, and for a config of another model; USAGE if the number of heads
            is unknown.
    """
    tensors = _renamed(tensors, where)
    check_architecture(uer_config, where_config)
    config = _config(tensors, uer_config, where, where_config)
    sizes = sizes_by_axis(config)
    expected = {
        entry.name.format(layer): tuple(sizes[axis] for axis in entry.axes)
        for entry in (*TABLE, HEAD)
        for layer in range(config.n_layer if entry.stacked else 1)
    }
    check_tensors(tensors, expected, _HEAD, "tensors are not those of a GPT-2 of UER-py", where)
    config = config.model_copy(update={"tie_word_embeddings": _head_is_tied(tensors, is_tied(uer_config), where)})
    weights = {path: np.empty(shape, np.float32) for path, shape in weight_shapes(config).items()}
    for entry, name, target in views(weights, config.n_layer):
        array = tensors[name].load()
        check_finite(name, array, where)
        target[...] = (array.T if entry.transposed else array).reshape(target.shape)
        if name.endswith(".gamma"):
            target *= gain(config)
    return config, weights


def compare(
    path: Path, weights: Mapping[str, np.ndarray], config: ModelConfig, where: Path | None = None
) -> Comparison:
    """Return how the logits of a model differ from the file at `path`, computed like UER-py.

    Args:
        where: The path that an error names, if not `path`.

    Raises:
        UserError: DATA if the file computes numbers that are not finite.
    """
    tokens_BT = np.random.default_rng(0).integers(0, config.vocab_size, (2, min(64, config.n_positions)))
    ours_BTV = logits_of(dict(weights), config, tokens_BT)
    difference = float(np.abs(ours_BTV - _logits(open_uer(path), config, tokens_BT)).max())
    if not math.isfinite(difference):
        raise UserError(
            ExitCode.DATA, "it computes numbers that are not finite", where or path, "use an earlier checkpoint"
        )
    return Comparison(difference, float(np.abs(ours_BTV).max()), tokens_BT.size, config.layer_norm_epsilon)


def views(weights: Mapping[str, np.ndarray], n_layer: int) -> Iterator[tuple[Entry, str, np.ndarray]]:
    """Yield each tensor of UER-py: its entry, its name, and a view of our array that holds its numbers."""
    for entry in (*TABLE, HEAD) if HEAD.path in weights else TABLE:
        for layer in range(n_layer if entry.stacked else 1):
            array = weights[entry.path][layer] if entry.stacked else weights[entry.path]
            yield entry, entry.name.format(layer), array[entry.slices]


def gain(config: ModelConfig) -> np.float32:
    """Return our layer norm scale divided by their gamma."""
    return np.float32(math.sqrt((config.n_embd - 1) / config.n_embd))


def sizes_by_axis(config: ModelConfig) -> dict[str, int]:
    """Return the size of each axis in `Entry.axes`."""
    return {"V": config.vocab_size, "N": config.n_positions, "D": config.n_embd, "F": 4 * config.n_embd}


def _read_config(path: Path | None) -> dict[str, Any]:
    if path is not None and not path.is_file():
        raise UserError(ExitCode.NO_INPUT, "file not found", path, "check the path")
    return {} if path is None else read_object(path)


def _renamed(tensors: Mapping[str, Tensor], where: object) -> dict[str, Tensor]:
    renamed = {_OLD_NAMES.get(name, name): tensor for name, tensor in tensors.items()}
    if len(renamed) < len(tensors):
        twice = next(new for old, new in _OLD_NAMES.items() if old in tensors and new in tensors)
        raise UserError(ExitCode.DATA, f"{twice} stands there twice, under its old name too", where, "remove one")
    return renamed


def _config(
    tensors: Mapping[str, Tensor], uer_config: Mapping[str, Any], where: object, where_config: object
) -> ModelConfig:
    for name in (WORDS, _POSITIONS):
        if name not in tensors or len(tensors[name].shape) != 2:
            fix = "it should be a GPT-2 of UER-py or TencentPretrain; for a transformers model give its folder"
            raise UserError(ExitCode.DATA, f"no {name} with two axes", where, fix)
    (vocabulary, width), (positions, _) = tensors[WORDS].shape, tensors[_POSITIONS].shape
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


def _head_is_tied(tensors: Mapping[str, Tensor], asked: bool | None, where: object) -> bool:
    """Return whether the output layer equals the embedding; `asked` is `tie_weights` of the config."""
    if _HEAD not in tensors:
        if asked:
            return True
        fix = 'if it is the token embedding say so: --uer-config FILE.json with {"tie_weights": true}'
        raise UserError(ExitCode.DATA, f"{_HEAD} missing", where, fix)
    if asked is False:
        return False
    head_VD, words_VD = (tensors[name].load() for name in (_HEAD, WORDS))
    check_finite(_HEAD, head_VD, where)
    check_finite(WORDS, words_VD, where)
    difference = float(np.abs(head_VD - words_VD).max(initial=0))
    if asked and difference != 0:
        what = f"tie_weights is true but {_HEAD} differs from {WORDS} by up to {difference:.1e}"
        raise UserError(ExitCode.DATA, what, where, "give the config that the model was trained with")
    return difference == 0


def _logits(tensors: Mapping[str, Tensor], config: ModelConfig, tokens_BT: np.ndarray) -> np.ndarray:
    """Return float32 logits (B, T, V), loading one layer at a time."""

    def load(name: str) -> np.ndarray:
        return tensors[name].load().astype(np.float32, copy=False)

    def linear(x: np.ndarray, name: str) -> np.ndarray:
        return x @ load(f"{name}.weight").T + load(f"{name}.bias")

    def norm(x: np.ndarray, name: str) -> np.ndarray:
        deviation = x.std(-1, ddof=1, keepdims=True)
        return load(f"{name}.gamma") * (x - x.mean(-1, keepdims=True)) / (deviation + 1e-6) + load(f"{name}.beta")

    def attention(x: np.ndarray, name: str) -> np.ndarray:
        rows, length, width = x.shape
        q, k, v = (
            linear(x, f"{name}.linear_layers.{number}").reshape(rows, length, config.n_head, -1).swapaxes(1, 2)
            for number in range(3)
        )
        scores = q @ k.swapaxes(2, 3) / np.float32(math.sqrt(config.head_size))
        scores = np.where(np.tri(length, dtype=bool), scores, scores - np.float32(10_000))
        shares = np.exp(scores - scores.max(-1, keepdims=True))
        mixed = shares / shares.sum(-1, keepdims=True) @ v
        return linear(mixed.swapaxes(1, 2).reshape(rows, length, width), f"{name}.final_linear")

    def gelu(x: np.ndarray) -> np.ndarray:
        return 0.5 * x * (1 + np.tanh(np.float32(math.sqrt(2 / math.pi)) * (x + 0.044715 * x**3)))

    words_VD = load(WORDS)
    x_BTD = words_VD[tokens_BT] + load(_POSITIONS)[: tokens_BT.shape[1]]
    for layer in range(config.n_layer):
        block = f"encoder.transformer.{layer}"
        x_BTD = x_BTD + attention(norm(x_BTD, f"{block}.layer_norm_1"), f"{block}.self_attn")
        inner = gelu(linear(norm(x_BTD, f"{block}.layer_norm_2"), f"{block}.feed_forward.linear_1"))
        x_BTD = x_BTD + linear(inner, f"{block}.feed_forward.linear_2")
    head_VD = words_VD if config.tie_word_embeddings else load(_HEAD)
    return norm(x_BTD, "encoder.layer_norm") @ head_VD.T
