"""The config.json of UER-py and TencentPretrain.

Fields that decide what the model computes must have the values of GPT-2.
"""

from collections.abc import Mapping
from typing import Any

from gpt2_flax.config.model import ModelConfig
from gpt2_flax.errors import ExitCode, UserError, quote

# The values of architecture fields that this package's model computes. A missing field has one of these values.
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
_WITHOUT_EFFECT = ("deep_init", "labels_num", "learning_rate", "optimizer", "pooling", "scheduler", "warmup")


def model_values(uer_config: Mapping[str, Any], where: object) -> dict[str, Any]:
    """Return the fields of `ModelConfig` that a UER config.json gives. Raises `UserError` (DATA)."""
    check_architecture(uer_config, where)
    names = {"n_embd": "hidden_size", "n_layer": "layers_num", "n_head": "heads_num", "n_positions": "max_seq_length"}
    values = {ours: uer_config[theirs] for ours, theirs in names.items() if theirs in uer_config}
    width = values.get("n_embd")
    for name, expected in (("emb_size", width), ("feedforward_size", 4 * width if isinstance(width, int) else None)):
        if expected is not None and uer_config.get(name, expected) != expected:
            what = f"{name} {quote(uer_config[name])} cannot be used with hidden_size {width}"
            raise UserError(ExitCode.DATA, what, where, f"only {expected} can")
    values |= dict.fromkeys(("embd_pdrop", "attn_pdrop", "resid_pdrop"), uer_config.get("dropout", 0.1))
    if (tied := is_tied(uer_config)) is not None:
        values["tie_word_embeddings"] = tied
    return values


def to_uer_config(config: ModelConfig) -> dict[str, Any]:
    """Return the content of the file for `--config_path` of UER-py."""
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


def is_tied(uer_config: Mapping[str, Any]) -> bool | None:
    """Return whether the output layer is the embedding, None if the config does not say."""
    return uer_config.get("tie_weights", uer_config.get("tie_weight"))


def check_architecture(uer_config: Mapping[str, Any], where: object) -> None:
    """Raise `UserError` (DATA) for a field that is unknown, or whose value our model does not compute."""
    for name, value in uer_config.items():
        if name in _ONLY and not any(type(value) is type(one) and value == one for one in _ONLY[name]):
            fix = f"only {' or '.join(map(repr, _ONLY[name]))} can be used"
            raise UserError(ExitCode.DATA, f"{name} {quote(value)} is not supported", where, fix)
        if name not in _ONLY and name not in _SIZES and name not in _WITHOUT_EFFECT:
            fix = "take it out of the file if the model computes the same without it"
            raise UserError(ExitCode.DATA, f"unknown field {quote(name)}", where, fix)
