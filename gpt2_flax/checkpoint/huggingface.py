"""Translate GPT-2 weights and configs from and to `transformers`, with one table for both directions.

Our weights are a flat dict of the model tree (path -> float32, blocks stacked). `transformers` has one tensor for each
layer and flattens the heads. Its Conv1D is [in, out] like Flax, so a reshape translates every tensor.

Dimension key: V vocab_size, N n_positions, D n_embd, H n_head, K head size, F 4 * n_embd; 3 is q, k, v.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors import SafetensorError

from gpt2_flax.checkpoint.checksums import check_sums
from gpt2_flax.checkpoint.tensor_files import Tensor, check_finite, check_tensors, open_tensors
from gpt2_flax.config.model import ModelConfig
from gpt2_flax.config.parse import parse_model
from gpt2_flax.errors import ExitCode, UserError, quote
from gpt2_flax.input_files import read_object

CONFIG = "config.json"


class Entry(NamedTuple):
    """A parameter: our path, the name in `transformers` (`{}` is the layer), and our axes, grouped by their axes."""

    path: str
    name: str
    axes: str

    @property
    def stacked(self) -> bool:
        return "{}" in self.name


TABLE = (
    Entry("wte/embedding", "wte.weight", "V D"),
    Entry("wpe/embedding", "wpe.weight", "N D"),
    Entry("h/ln_1/scale", "h.{}.ln_1.weight", "D"),
    Entry("h/ln_1/bias", "h.{}.ln_1.bias", "D"),
    Entry("h/attn/c_attn/kernel", "h.{}.attn.c_attn.weight", "D 3HK"),
    Entry("h/attn/c_attn/bias", "h.{}.attn.c_attn.bias", "3HK"),
    Entry("h/attn/c_proj/kernel", "h.{}.attn.c_proj.weight", "HK D"),
    Entry("h/attn/c_proj/bias", "h.{}.attn.c_proj.bias", "D"),
    Entry("h/ln_2/scale", "h.{}.ln_2.weight", "D"),
    Entry("h/ln_2/bias", "h.{}.ln_2.bias", "D"),
    Entry("h/mlp/c_fc/kernel", "h.{}.mlp.c_fc.weight", "D F"),
    Entry("h/mlp/c_fc/bias", "h.{}.mlp.c_fc.bias", "F"),
    Entry("h/mlp/c_proj/kernel", "h.{}.mlp.c_proj.weight", "F D"),
    Entry("h/mlp/c_proj/bias", "h.{}.mlp.c_proj.bias", "D"),
    Entry("ln_f/scale", "ln_f.weight", "D"),
    Entry("ln_f/bias", "ln_f.bias", "D"),
)

HEAD = Entry("lm_head/embedding", "lm_head.weight", "V D")  # for a head that is not tied to the token embedding

_PREFIX = "transformer."
_MASKS = (".attn.bias", ".attn.masked_bias")  # causal masks, which old versions stored

_SAME_FIELDS = (
    *("vocab_size", "n_positions", "n_layer", "n_head", "n_embd"),
    *("embd_pdrop", "attn_pdrop", "resid_pdrop", "layer_norm_epsilon", "initializer_range", "tie_word_embeddings"),
)
# The defaults of transformers that are not ours.
_THEIR_DEFAULTS = {"vocab_size": 50257, **dict.fromkeys(("embd_pdrop", "attn_pdrop", "resid_pdrop"), 0.1)}
# The values that our model computes. The first value is the default of a missing field.
_ONLY = {
    "activation_function": ("gelu_new", "gelu_pytorch_tanh"),  # two names of the tanh approximation
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "add_cross_attention": (False,),
    "quantization_config": (None,),
}
# The fields of a GPT-2 config.json of 2019 or early 2020. It has no model_type; other fields show another model.
_OLD_FIELDS = {
    *(*_SAME_FIELDS, *_ONLY, "n_inner", "n_ctx", "vocab_size_or_config_json_file", "architectures"),
    *("bos_token_id", "eos_token_id", "pad_token_id", "do_sample", "eos_token_ids", "finetuning_task", "id2label"),
    *("is_decoder", "label2id", "length_penalty", "max_length", "num_beams", "num_labels", "num_return_sequences"),
    *("output_attentions", "output_hidden_states", "output_past", "predict_special_tokens", "pruned_heads"),
    *("repetition_penalty", "summary_activation", "summary_first_dropout", "summary_proj_to_labels", "summary_type"),
    *("summary_use_proj", "task_specific_params", "temperature", "top_k", "top_p", "torchscript", "use_bfloat16"),
}


def table(tied: bool) -> tuple[Entry, ...]:
    """Return the parameters of a model with a tied or an untied head."""
    return TABLE if tied else (*TABLE, HEAD)


def to_state_dict(weights: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return the state dict of GPT2LMHeadModel: contiguous arrays, a tied head stored once, as wte."""
    state_dict = {}
    for entry in table(tied=HEAD.path not in weights):
        stack = weights[entry.path] if entry.stacked else weights[entry.path][None]
        for layer, array in enumerate(stack):
            name = entry.name if entry is HEAD else _PREFIX + entry.name.format(layer)
            state_dict[name] = np.ascontiguousarray(array).reshape(_grouped(entry, array.shape))
    return state_dict


def read_folder(folder: Path) -> tuple[ModelConfig, dict[str, np.ndarray]]:
    """Return the config and float32 weights of a GPT-2 folder; data is read after everything else was checked.

    Raises:
        UserError: NO_INPUT if a file is missing; DATA if a file is damaged, hostile or of another model; USAGE if
            there is only pytorch_model.bin and torch is not installed.
    """
    path = folder / CONFIG
    if not path.is_file():
        what = "no config.json in folder" if folder.is_dir() else "folder not found"
        raise UserError(ExitCode.NO_INPUT, what, folder, "give a folder as `save_pretrained` of transformers writes it")
    try:
        check_sums(folder, [CONFIG])
        values = read_object(path)
        config = from_hf_config(values, path)
        with open_tensors(folder) as tensors:
            return config, assemble(tensors, config, folder)
    except SafetensorError as error:
        what = f"damaged safetensors file ({quote(str(error))})"
        raise UserError(ExitCode.DATA, what, folder, "copy or download it again") from None
    except OSError as error:
        fix = f"the system says: {error.strerror}"
        raise UserError(ExitCode.NO_INPUT, "cannot be read", error.filename or folder, fix) from None


def weight_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Return the shapes of our arrays by path, blocks stacked."""
    sizes, stacks = _sizes(config), {True: (config.n_layer,), False: ()}
    return {
        entry.path: (*stacks[entry.stacked], *(sizes[axis] for axis in entry.axes.replace(" ", "")))
        for entry in table(config.tie_word_embeddings)
    }


def to_hf_config(config: ModelConfig, bos_id: int, eos_id: int, pad_id: int | None) -> dict[str, Any]:
    """Return the content of config.json."""
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "activation_function": "gelu_new",
        **{field: getattr(config, field) for field in _SAME_FIELDS},
        "n_inner": None,
        "use_cache": True,
        # The default is 50256, an id that most vocabularies lack: generation would never stop.
        "bos_token_id": bos_id,
        "eos_token_id": eos_id,
        # transformers 5 warns about each text that begins or ends with the padding token.
        "pad_token_id": None if pad_id in (bos_id, eos_id) else pad_id,
        "dtype": "float32",
        "torch_dtype": "float32",  # the name of `dtype` before transformers 4.56
    }


def from_hf_config(values: Mapping[str, Any], where: object) -> ModelConfig:
    """Return the config of a model that computes the same as config.json.

    Raises:
        UserError: DATA that names a field that is malformed, or whose value our model does not compute.
    """
    if "model_type" not in values and {"n_embd", "n_head", "n_layer"} <= values.keys() <= _OLD_FIELDS:
        old_names = {"vocab_size": "vocab_size_or_config_json_file", "n_positions": "n_ctx"}
        old = {field: values[name] for field, name in old_names.items() if name in values}
        values = {"model_type": "gpt2"} | old | dict(values)
    if values.get("model_type") != "gpt2":
        raise _unsupported("model_type", values.get("model_type"), ("gpt2",), where)
    for field, allowed in _ONLY.items():
        if values.get(field, allowed[0]) not in allowed:
            raise _unsupported(field, values[field], allowed, where)
    fields = _THEIR_DEFAULTS | {field: values[field] for field in _SAME_FIELDS if field in values}
    fix = "the file is damaged or of another model"
    if fields["vocab_size"] is None:
        raise UserError(ExitCode.DATA, "bad value of vocab_size: null", where, fix)
    config = parse_model(fields, where, fix)
    if values.get("n_inner") not in (None, 4 * config.n_embd):
        raise _unsupported("n_inner", values["n_inner"], (None, 4 * config.n_embd), where)
    return config


def _unsupported(field: str, value: object, allowed: tuple, where: object) -> UserError:
    fix = f"only {' or '.join(map(repr, allowed))} can be used"
    return UserError(ExitCode.DATA, f"{field} {quote(value)} is not supported", where, fix)


def assemble(tensors: Mapping[str, Tensor], config: ModelConfig, where: object) -> dict[str, np.ndarray]:
    """Check the names, shapes and dtypes of all tensors, then load them into stacked float32 arrays by our paths.

    Names may lack the prefix `transformer.`. Stored causal masks are ignored. A tied head may be stored too, with the
    numbers of the token embedding.

    Raises:
        UserError: DATA that names the first tensors that are missing, surplus, of another shape or dtype, or not
            finite.
    """
    kept = {name: tensor for name, tensor in tensors.items() if not name.endswith(_MASKS)}
    found = {name.removeprefix(_PREFIX): tensor for name, tensor in kept.items()}
    if len(found) < len(kept):
        what = f"a tensor stands there twice, with and without {_PREFIX!r}"
        raise UserError(ExitCode.DATA, what, where, "save the model again")
    check_tensors(found, expected_shapes(config), HEAD.name, "tensors do not fit the model", where)
    _check_head(found, config.tie_word_embeddings, where)
    weights = {path: np.empty(shape, np.float32) for path, shape in weight_shapes(config).items()}
    for entry in table(config.tie_word_embeddings):
        stack = weights[entry.path] if entry.stacked else weights[entry.path][None]
        for layer, array in enumerate(stack):
            name = entry.name.format(layer)
            array[...] = found[name].load().reshape(array.shape)
            check_finite(name, array, where)
    return weights


def _check_head(found: Mapping[str, Tensor], tied: bool, where: object) -> None:
    """Raise `UserError` (DATA) if an untied head is missing, or a tied head differs from the token embedding."""
    if not tied and HEAD.name not in found:
        what = f"tie_word_embeddings is false but {HEAD.name} is missing"
        raise UserError(ExitCode.DATA, what, where, "save the model again, or correct config.json")
    if not tied or HEAD.name not in found:
        return
    head_VD, words_VD = (found[name].load().astype(np.float32) for name in (HEAD.name, "wte.weight"))
    check_finite(HEAD.name, head_VD, where)
    check_finite("wte.weight", words_VD, where)
    if (largest := np.abs(head_VD - words_VD).max(initial=0)) != 0:
        what = f"tie_word_embeddings is true but {HEAD.name} differs from wte.weight by up to {largest:.1e}"
        fix = "set it to false in config.json if that head is meant; if not, take the tensor out"
        raise UserError(ExitCode.DATA, what, where, fix)


def expected_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Return the shapes in `transformers` by name without prefix, and the shape of the head, which may be missing."""
    sizes, shapes = _sizes(config), {}
    for entry in table(tied=False):
        shape = _grouped(entry, [sizes[axis] for axis in entry.axes.replace(" ", "")])
        shapes |= {entry.name.format(layer): shape for layer in range(config.n_layer if entry.stacked else 1)}
    return shapes


def _grouped(entry: Entry, sizes: Any) -> tuple[int, ...]:
    """Return the shape in `transformers` from the sizes of our axes without the layer."""
    remaining = iter(sizes)
    return tuple(math.prod(next(remaining) for _ in group) for group in entry.axes.split())


def _sizes(config: ModelConfig) -> dict[str, int]:
    sizes = {"3": 3, "V": config.vocab_size, "N": config.n_positions, "D": config.n_embd}
    return sizes | {"H": config.n_head, "K": config.head_size, "F": 4 * config.n_embd}
