"""Every default, type, bound and line of help of a run, and how TOML files and `section.key=value` become one `Config`.

The resolved config is written into the run folder and is itself a valid input.
"""

import difflib
import sys
import tomllib
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal

import tomli_w
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from gpt2_flax.errors import ExitCode, UserError, quote


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class ModelConfig(Section):
    """The architecture, with the names of `transformers.GPT2Config`, and how it is computed."""

    vocab_size: int | None = Field(None, gt=0, description="rows of the token embedding; the dataset's when left out")
    n_positions: int = Field(1024, gt=0, description="longest sequence the model can see, in tokens")
    n_layer: int = Field(12, gt=0, description="number of blocks")
    n_head: int = Field(12, gt=0, description="attention heads a block")
    n_embd: int = Field(768, gt=0, description="width of the residual stream; a multiple of n_head")
    embd_pdrop: float = Field(0.1, ge=0, lt=1, description="dropout on the summed embeddings")
    attn_pdrop: float = Field(0.1, ge=0, lt=1, description="dropout on the attention probabilities")
    resid_pdrop: float = Field(0.1, ge=0, lt=1, description="dropout on what each half of a block adds")
    layer_norm_epsilon: float = Field(1e-5, gt=0, description="added to the variance in layer norms")
    initializer_range: float = Field(0.02, gt=0, description="standard deviation of freshly drawn weights")
    dtype: Literal["float32", "bfloat16"] = Field(
        "bfloat16", description="type of activations; parameters, softmax and loss stay float32"
    )
    remat: bool = Field(False, description="recompute activations going backward: less memory, a third more work")

    @model_validator(mode="after")
    def _heads_divide_width(self) -> "ModelConfig":
        if self.n_embd % self.n_head:
            raise ValueError(f"model.n_embd {self.n_embd} is not a multiple of model.n_head {self.n_head}")
        return self

    @property
    def head_size(self) -> int:
        return self.n_embd // self.n_head

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding in memory and checkpoints: a multiple of 128 tiles and shards well on every device.

        The rows past `vocab_size` are zero, get no probability and never leave the program.
        """
        return -(-self.vocab_size // 128) * 128


class DataConfig(Section):
    """What is read, and in what portions."""

    dataset: str | dict[str, float] = Field(
        description='folder made by `gpt2-flax prepare`, or several and their weights: {"data/zh" = 3, "data/en" = 1}'
    )
    seq_length: int = Field(128, gt=0, description="tokens a row; at most model.n_positions")
    global_batch_size: int = Field(64, gt=0, description="rows an optimizer step, over all devices")

    @field_validator("dataset", mode="before")
    @classmethod
    def _folder_or_weights(cls, value: Any) -> Any:
        if isinstance(value, str):
            return value
        weights = list(value.values()) if isinstance(value, dict) else []
        if not weights or not all(type(w) in (int, float) and 0 < w <= sys.float_info.max for w in weights):
            example = '{"data/zh" = 3, "data/en" = 1}'
            raise ValueError(f"give a folder, or folders and their weights above 0: {example}, not {quote(value)}")
        if min(weights) < sum(map(Fraction, weights)) / 10**6:  # the order of samples is exact down to there
            raise ValueError(f"leave out what weighs less than a millionth of all together in {quote(value)}")
        return value

    @property
    def datasets(self) -> dict[str, float]:
        """The folders and their weights; that of a single one is 1."""
        return {self.dataset: 1.0} if isinstance(self.dataset, str) else self.dataset


class OptimizerConfig(Section):
    """AdamW (arXiv:1711.05101) and its learning rate over the run."""

    learning_rate: float = Field(1e-4, gt=0, description="highest learning rate, reached when warm-up ends")
    schedule: Literal["linear", "cosine", "constant"] = Field("cosine", description="decay after warm-up")
    warmup: int | float = Field(0.1, ge=0, description="rise from 0: steps, or as a fraction the share of total_steps")
    min_learning_rate_ratio: float = Field(0.0, ge=0, le=1, description="last learning rate over the highest")
    b1: float = Field(0.9, ge=0, lt=1, description="decay of the first moment")
    b2: float = Field(0.95, ge=0, lt=1, description="decay of the second moment")
    eps: float = Field(1e-8, gt=0, description="added to the root of the second moment")
    weight_decay: float = Field(
        0.1, ge=0, description="decoupled decay of matrices; not of embeddings, biases, layer norms"
    )
    max_grad_norm: float = Field(1.0, ge=0, description="gradients are scaled down to this global norm; 0 turns it off")

    @model_validator(mode="after")
    def _warmup_is_steps_or_share(self) -> "OptimizerConfig":
        if isinstance(self.warmup, float) and self.warmup > 1:
            raise ValueError(f"optimizer.warmup {self.warmup} is neither a whole number of steps nor a share up to 1.0")
        return self


class TrainingConfig(Section):
    """How long, how often, and from which seed."""

    total_steps: int = Field(gt=0, description="optimizer steps of the whole run")
    accumulation_steps: int = Field(1, gt=0, description="parts a batch is computed in, one after the other")
    seed: int = Field(0, ge=0, lt=2**32, description="of initial weights, data order and dropout")
    log_every: int = Field(10, gt=0, description="steps between lines of metrics")
    evaluate_every: int = Field(1000, gt=0, description="steps between evaluations on validation splits")
    evaluation_batches: int = Field(
        0, ge=0, description="global batches an evaluation reads of each dataset; 0 reads whole splits"
    )
    save_every: int = Field(1000, gt=0, description="steps between checkpoints")
    keep_checkpoints: int = Field(3, gt=0, description="newest checkpoints kept; older ones are deleted")


class MeshConfig(Section):
    """How devices are arranged: their product is the number of devices."""

    data: int = Field(-1, ge=-1, description="copies of the model, each with its own rows; -1 takes what is left")
    fsdp: int = Field(1, gt=0, description="devices that share parameters and optimizer state, each with its own rows")
    tensor: int = Field(1, gt=0, description="devices that share each matrix product")

    @model_validator(mode="after")
    def _data_is_not_zero(self) -> "MeshConfig":
        if self.data == 0:
            raise ValueError("mesh.data must be -1 (what is left) or at least 1")
        return self


class Config(Section):
    """One training run."""

    output: str = Field(description="run folder: checkpoints, metrics, resolved config")
    init_from: str | None = Field(None, description="run, checkpoint or transformers folder to take weights from")
    model: ModelConfig = Field(default_factory=ModelConfig)
    data: DataConfig
    optimizer: OptimizerConfig = Field(default_factory=OptimizerConfig)
    training: TrainingConfig
    mesh: MeshConfig = Field(default_factory=MeshConfig)

    @model_validator(mode="after")
    def _parts_fit(self) -> "Config":
        if self.data.seq_length > self.model.n_positions:
            raise ValueError(
                f"data.seq_length {self.data.seq_length} is above model.n_positions {self.model.n_positions}: "
                "lower the first or raise the second"
            )
        if self.data.global_batch_size % self.training.accumulation_steps:
            raise ValueError(
                f"data.global_batch_size {self.data.global_batch_size} is not a multiple of "
                f"training.accumulation_steps {self.training.accumulation_steps}"
            )
        return self

    @property
    def warmup_steps(self) -> int:
        warmup = self.optimizer.warmup
        return warmup if isinstance(warmup, int) else round(warmup * self.training.total_steps)


def config_keys(section: type[BaseModel] = Config, prefix: str = "") -> dict[str, Any]:
    """Returns every dotted key with its pydantic field, in the order of the classes above."""
    keys: dict[str, Any] = {}
    for name, field in section.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            keys |= config_keys(field.annotation, f"{prefix}{name}.")
        else:
            keys[prefix + name] = field
    return keys


def load_config(path: Path, overrides: Sequence[str] = ()) -> Config:
    """Returns the config of a TOML file with `section.key=value` overrides applied left to right.

    Raises `UserError`: NO_INPUT when the file is missing, CONFIG for anything wrong inside, naming the dotted key.
    """
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        fix = "give the path of a TOML file, such as configs/quickstart.toml"
        raise UserError(ExitCode.NO_INPUT, "config not found", path, fix) from None
    except OSError as error:
        raise UserError(
            ExitCode.NO_INPUT, "config cannot be read", path, f"the system says: {error.strerror}"
        ) from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(ExitCode.CONFIG, "not a TOML file", path, f"mend it: {error}") from None
    for override in overrides:
        _apply_override(values, override)
    return parse_config(values, str(path))


def parse_config(values: dict[str, Any], where: str) -> Config:
    """Checks `values` (nested dicts) and returns them as a `Config`; `where` names their origin in errors."""
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        errors = error.errors(include_url=False)
        # A misspelt key is the cause of the missing one beside it.
        first = next((error for error in errors if error["type"] == "extra_forbidden"), errors[0])
        raise _config_error(first, where) from None


def dump_config(config: Config) -> str:
    """Returns the config as TOML; `load_config` reads it back to an equal object."""
    return tomli_w.dumps(config.model_dump(exclude_none=True))


def _apply_override(values: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not all(part.isidentifier() for part in key.split(".")):
        fix = "write it as section.key=value, for example optimizer.learning_rate=3e-4"
        raise UserError(ExitCode.USAGE, "not an override", quote(override), fix)
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError as error:
        if text.startswith("{"):
            fix = f"""mend it, for example 'data.dataset={{"data/zh" = 3, "data/en" = 1}}': {error}"""
            raise UserError(ExitCode.USAGE, "not a TOML table", quote(override), fix) from None
        value = text  # a bare word is a string: output=runs/two
    *sections, last = key.split(".")
    for section in sections:
        values = values.setdefault(section, {})
        if not isinstance(values, dict):
            raise UserError(ExitCode.CONFIG, "not a section", f"{section} in {quote(override)}", "check the key")
    values[last] = value


def _nearest_key(key: str) -> str | None:
    """Returns the known key or section most like an unknown one: beside it, else anywhere."""
    prefix, name = key[: key.rfind(".") + 1], key.rpartition(".")[2]
    beside = {other.removeprefix(prefix).partition(".")[0] for other in config_keys() if other.startswith(prefix)}
    anywhere = {other.rpartition(".")[2]: other for other in config_keys()}
    for choices in ({word: prefix + word for word in beside}, anywhere):
        initials = [word for word in choices if "".join(part[0] for part in word.split("_")) == name]
        if close := initials or difflib.get_close_matches(name, choices, n=1):
            return choices[close[0]]
    return None


def _config_error(error: Any, where: str) -> UserError:
    key = ".".join(str(part) for part in error["loc"] if part not in ("int", "float"))  # a union names its member
    if error["type"] == "extra_forbidden":
        close = _nearest_key(key)
        fix = f"did you mean {close}?" if close else "`gpt2-flax keys` lists all"
        return UserError(ExitCode.CONFIG, f"unknown key {key}", where, fix)
    if error["type"] == "missing":
        return UserError(ExitCode.CONFIG, f"missing key {key}", where, "add it, or give it on the command line")
    if error["type"] == "value_error":
        what = str(error["ctx"]["error"])
        if key in config_keys():  # one key alone, not several that do not go together
            return UserError(ExitCode.CONFIG, f"bad value of {key}", where, what)
        return UserError(ExitCode.CONFIG, what, where, "change one of them")
    fix = f"{error['msg']}, not {quote(error['input'])}"
    return UserError(ExitCode.CONFIG, f"bad value of {key}", where, fix[0].lower() + fix[1:])
