"""Every default, type, bound and line of help of a run's config; `config.file` reads config files.

The resolved config is written into the run folder and is itself a valid input.
"""

import os
import sys
from fractions import Fraction
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, field_validator, model_validator

from gpt2_flax.config.model import ModelConfig, ModelOptions, Positions, Section
from gpt2_flax.errors import quote
from gpt2_flax.folders import local_path, model_place
from gpt2_flax.input_files import MOST_ROWS, MOST_STEPS

LocalPath = Annotated[str, AfterValidator(local_path)]
InitialWeights = Annotated[str, AfterValidator(lambda given: str(model_place(given, guess=False)))]

Packing = Literal["stream", "best_fit", "document"]
Verify = Literal["first-use", "full", "off"]

Steps = Annotated[int, Field(gt=0, le=MOST_STEPS)]
Rows = Annotated[int, Field(gt=0, le=MOST_ROWS)]


class DataConfig(Section, frozen=True):
    """The datasets, and the rows that are cut from them."""

    dataset: str | dict[str, float] = Field(
        description='folder made by `gpt2-flax prepare`, or several and their weights: {"data/zh" = 3, "data/en" = 1}'
    )
    seq_length: Positions = Field(default=128, description="tokens a row; at most model.n_positions")
    packing: Packing = Field(
        default="stream",
        description="stream: cut every seq_length tokens; best_fit: combine documents; document: one a row",
    )
    prompt_separator: float = Field(
        default=0.0, ge=0, le=1, description="share of training segments with an end token inserted at a random place"
    )
    global_batch_size: Rows = Field(default=64, description="rows an optimizer step, over all devices")
    verify: Verify = Field(
        default="first-use", description="sha256 of shards: check each at its first use, all at the start, or none"
    )

    @field_validator("dataset", mode="before")
    @classmethod
    def _folder_or_weights(cls, value: Any) -> Any:
        if isinstance(value, str):
            return local_path(value)
        weights = list(value.values()) if isinstance(value, dict) else []
        if not weights or not all(type(w) in (int, float) and 0 < w <= sys.float_info.max for w in weights):
            example = '{"data/zh" = 3, "data/en" = 1}'
            raise ValueError(f"give a folder, or folders and their weights above 0: {example}, not {quote(value)}")
        if min(weights) < sum(map(Fraction, weights)) / 10**6:  # the order of samples is exact down to there
            raise ValueError(f"leave out what weighs less than a millionth of all together in {quote(value)}")
        if len(set(map(os.path.abspath, map(local_path, value)))) < len(value):
            raise ValueError(f"name each folder once, with all of its weight, not {quote(value)}")
        return {local_path(folder): weight for folder, weight in value.items()}

    @property
    def datasets(self) -> dict[str, float]:
        """The dataset folders and their weights; a single dataset has weight 1."""
        return {self.dataset: 1.0} if isinstance(self.dataset, str) else self.dataset


PRESETS: dict[str, dict[str, Any]] = {
    "default": {},
    "uer": {  # as UER-py and TencentPretrain train
        "name": "adamw_uer",
        "learning_rate": 1e-4,
        "schedule": "linear",
        "warmup": 0.1,
        "min_learning_rate_ratio": 0.0,
        "b1": 0.9,
        "b2": 0.999,
        "eps": 1e-6,
        "weight_decay": 0.01,
        "decay_embeddings": True,
        "max_grad_norm": 0.0,
    },
}


_OF_ADAMW = {"learning_rate": 6e-4, "schedule": "cosine", "warmup": 0.1, "weight_decay": 0.1}
"""Defaults of AdamW. Its updates are smaller than the updates of Muon, so other rates suit it."""


class OptimizerConfig(Section, frozen=True):
    """The optimizer, Muon (arXiv:2502.16982) or AdamW (arXiv:1711.05101), and its learning rate schedule."""

    preset: Literal["default", "uer"] = Field(
        default="default", description="defaults of the keys below; uer: the defaults of UER-py and TencentPretrain"
    )
    name: Literal["adamw", "adamw_uer", "muon"] = Field(
        default="muon",
        description="muon: for matrices, Adam for the rest; adamw: has defaults of its own; adamw_uer: as UER-py's",
    )
    learning_rate: float = Field(default=0.02, gt=0, description="highest learning rate, reached when warm-up ends")
    schedule: Literal["linear", "cosine", "constant", "wsd", "inverse_sqrt"] = Field(
        default="linear", description="decay after warm-up; wsd: constant, then linear at the end"
    )
    warmup: int | float = Field(
        default=0.05, ge=0, le=MOST_STEPS, description="warm-up from 0: steps, or a fraction of total_steps"
    )
    decay: int | float = Field(
        default=0.2, gt=0, le=MOST_STEPS, description="decay of schedule wsd: steps, or a fraction of total_steps"
    )
    min_learning_rate_ratio: float = Field(
        default=0.0, ge=0, le=1, description="lowest divided by highest learning rate"
    )
    b1: float = Field(default=0.9, ge=0, lt=1, description="decay of the first moment")
    b2: float = Field(default=0.95, ge=0, lt=1, description="decay of the second moment")
    eps: float = Field(default=1e-8, gt=0, description="added to the root of the second moment")
    weight_decay: float = Field(default=0.03, ge=0, description="decoupled decay of matrices; none of biases and norms")
    decay_embeddings: bool = Field(default=False, description="also decay embeddings and an untied head")
    max_grad_norm: float = Field(default=1.0, ge=0, description="clip gradients to this global norm; 0: no clipping")

    @model_validator(mode="before")
    @classmethod
    def _preset_gives_what_is_left_out(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        preset = values.get("preset")
        values = PRESETS[preset] | values if isinstance(preset, str) and preset in PRESETS else values
        return _OF_ADAMW | values if values.get("name") in ("adamw", "adamw_uer") else values

    @model_validator(mode="after")
    def _keys_fit(self) -> "OptimizerConfig":
        for key, value in (("warmup", self.warmup), ("decay", self.decay)):
            if isinstance(value, float) and value > 1:
                raise ValueError(f"optimizer.{key} {value} is neither a whole number of steps nor a share up to 1.0")
        if self.min_learning_rate_ratio and self.schedule in ("constant", "inverse_sqrt"):
            raise ValueError(
                f"optimizer.min_learning_rate_ratio {self.min_learning_rate_ratio} has no meaning with "
                f"optimizer.schedule {self.schedule}, which goes down to no lowest rate"
            )
        return self


class GrowthConfig(Section, frozen=True):
    """A smaller model and shorter rows for the first steps; then the layers are stacked, see `training.growth`."""

    until: int | float = Field(
        default=0, ge=0, le=MOST_STEPS, description="the first steps, or a fraction of total_steps, train less; 0: none"
    )
    n_layer: int | None = Field(default=None, gt=0, le=512, description="layers in these steps, later copied upwards")
    seq_length: Positions | None = Field(default=None, description="tokens a row in these steps; divides data's")

    @model_validator(mode="before")
    @classmethod
    def _switched_off(cls, values: Any) -> Any:
        """Leave out the sizes if `until` is 0, so that `growth.until=0` on a command line ends a config's growth."""
        if isinstance(values, dict) and values.get("until") == 0:
            return {key: value for key, value in values.items() if key not in ("n_layer", "seq_length")}
        return values

    @model_validator(mode="after")
    def _keys_fit(self) -> "GrowthConfig":
        if isinstance(self.until, float) and self.until >= 1:
            raise ValueError(f"growth.until {self.until} is neither a whole number of steps nor a share below 1.0")
        sizes = [f"growth.{name}" for name in ("n_layer", "seq_length") if getattr(self, name) is not None]
        if self.until and not sizes:
            raise ValueError("growth.until needs growth.n_layer or growth.seq_length: how much less to train")
        if sizes and not self.until:
            raise ValueError(f"{sizes[0]} needs growth.until: the steps or the share of the steps that train less")
        return self


class TrainingConfig(Section, frozen=True):
    """How long to train, how often to evaluate and save, and the seed."""

    total_steps: Steps = Field(description="optimizer steps of the whole run")
    accumulation_steps: Rows = Field(default=1, description="microbatches of a batch, computed one after another")
    seed: int = Field(default=0, ge=0, lt=2**32, description="seed of initial weights, data order and dropout")
    deterministic: bool = Field(
        default=False, description="use only GPU kernels that give the same bits each time; slower"
    )
    log_every: Steps = Field(default=10, description="steps between lines of metrics")
    logging: list[Literal["tensorboard", "wandb", "mlflow"]] = Field(
        default=["tensorboard"], description="programs that get the metrics: tensorboard, wandb, mlflow"
    )
    evaluate_every: Steps = Field(default=1000, description="steps between evaluations on validation splits")
    evaluation_batches: int = Field(
        default=0, ge=0, le=MOST_STEPS, description="global batches an evaluation reads of each dataset; 0: all"
    )
    save_every: Steps = Field(default=1000, description="steps between checkpoints")
    keep_checkpoints: Steps = Field(default=3, description="newest checkpoints kept; older ones are deleted")
    keep_best: int = Field(default=1, ge=0, le=MOST_STEPS, description="also keep the best by validation loss")
    keep_every: int = Field(
        default=0,
        ge=0,
        le=MOST_STEPS,
        description="also keep every checkpoint whose step is a multiple of this; 0: none",
    )
    patience: int = Field(
        0,
        ge=0,
        le=MOST_STEPS,
        description="end the run after this many evaluations without a lower validation loss; 0: never",
    )
    max_skipped_steps: Steps = Field(
        default=5, description="end the run after this many steps in a row whose loss or gradient is not finite"
    )
    prompts: list[str] = Field(default=[], description="prompts that each evaluation continues, in samples.txt")
    sample_tokens: Positions = Field(default=64, description="most tokens to generate for each prompt")


class MeshConfig(Section, frozen=True):
    """The device mesh as a user asks for it; the product of its sizes is the number of devices.

    Training chooses the sizes that are left out.
    """

    data: int = Field(
        default=-1,
        ge=-1,
        le=MOST_ROWS,
        description="replicas of the model, each with its own rows; -1: the remaining devices",
    )
    fsdp: int | Literal["auto"] = Field(
        default="auto", description="devices that share parameters and optimizer state, each with its own rows"
    )
    tensor: int | Literal["auto"] = Field(default="auto", description="devices that share each matrix product")

    @model_validator(mode="after")
    def _sizes_are_above_zero(self) -> "MeshConfig":
        if self.data == 0:
            raise ValueError("mesh.data must be -1 (what is left) or at least 1")
        for name, size in (("fsdp", self.fsdp), ("tensor", self.tensor)):
            if isinstance(size, int) and not 1 <= size <= MOST_ROWS:
                raise ValueError(f'mesh.{name} must be "auto", or from 1 to {MOST_ROWS}')
        return self


class Config(Section, frozen=True):
    """One training run."""

    output: LocalPath = Field(description="run folder: checkpoints, metrics, resolved config")
    init_from: InitialWeights | None = Field(
        default=None, description="initial weights: a run, RUN/checkpoints/STEP, a folder, or hf://OWNER/NAME@REVISION"
    )
    model: ModelOptions = ModelOptions()
    data: DataConfig
    optimizer: OptimizerConfig = OptimizerConfig()
    growth: GrowthConfig = GrowthConfig()
    training: TrainingConfig
    mesh: MeshConfig = MeshConfig()

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

    @model_validator(mode="after")
    def _schedule_fits_the_run(self) -> "Config":
        schedule, warmup, total = self.optimizer.schedule, self.warmup_steps, self.training.total_steps
        if schedule == "inverse_sqrt" and not warmup:
            raise ValueError("optimizer.schedule inverse_sqrt needs an optimizer.warmup of at least one step")
        if schedule == "wsd" and warmup + self.decay_steps > total:
            raise ValueError(
                f"optimizer.warmup and optimizer.decay are {warmup} and {self.decay_steps} steps, "
                f"together more than training.total_steps {total}"
            )
        return self

    @model_validator(mode="after")
    def _growth_fits(self) -> "Config":
        growth, layers, length = self.growth, self.model.n_layer, self.data.seq_length
        if growth.n_layer and growth.n_layer > layers:
            raise ValueError(f"growth.n_layer {growth.n_layer} is above model.n_layer {layers}")
        if growth.n_layer and self.init_from:
            raise ValueError(
                "growth.n_layer does not go with init_from, whose weights are of all layers; set growth.until = 0"
            )
        if growth.seq_length and length % growth.seq_length:
            raise ValueError(f"data.seq_length {length} is not a multiple of growth.seq_length {growth.seq_length}")
        if growth.until and not 0 < self.growth_steps < self.training.total_steps:
            raise ValueError(
                f"growth.until is {self.growth_steps} steps, not between 0 and "
                f"training.total_steps {self.training.total_steps}"
            )
        return self

    def with_vocab_size(self, vocab_size: int) -> "ResolvedConfig":
        """Return the config of a run whose vocabulary has `vocab_size` tokens."""
        model = self.model.with_vocab_size(vocab_size)
        return ResolvedConfig.model_construct(self.model_fields_set, **dict(self) | {"model": model})

    @property
    def warmup_steps(self) -> int:
        return self._steps(self.optimizer.warmup)

    @property
    def decay_steps(self) -> int:
        """Steps of the decay of schedule `wsd`."""
        return max(1, self._steps(self.optimizer.decay))

    @property
    def growth_steps(self) -> int:
        """Steps before the model grows; 0 if it does not."""
        return self._steps(self.growth.until)

    def _steps(self, steps_or_share: int | float) -> int:
        return steps_or_share if isinstance(steps_or_share, int) else round(steps_or_share * self.training.total_steps)


class ResolvedConfig(Config, frozen=True):
    """A training run whose vocabulary is known."""

    model: ModelConfig  # pyright: ignore[reportGeneralTypeIssues] - `with_vocab_size` gives it

    def before_growth(self) -> "ResolvedConfig":
        """Return the config by which the steps before `growth_steps` train: fewer layers, more and shorter rows."""
        data, length = self.data, self.growth.seq_length or self.data.seq_length
        n_rows = data.global_batch_size * (data.seq_length // length)
        changed = {
            "model": self.model.model_copy(update={"n_layer": self.growth.n_layer or self.model.n_layer}),
            "data": data.model_copy(update={"seq_length": length, "global_batch_size": n_rows}),
        }
        return self.model_copy(update=changed)
