"""The architecture of a model: every default, type, bound and line of help."""

from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from gpt2_flax.input_files import MOST_POSITIONS, MOST_TOKENS

Positions = Annotated[int, Field(gt=0, le=MOST_POSITIONS)]
Width = Annotated[int, Field(gt=0, le=2**17)]


class Section(BaseModel, frozen=True):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class ModelOptions(Section, frozen=True):
    """The architecture as a user asks for it, with the names of `transformers.GPT2Config`, and how to compute it."""

    vocab_size: int | None = Field(
        default=None, gt=0, le=MOST_TOKENS, description="rows of the token embedding; the dataset's when left out"
    )
    n_positions: Positions = Field(default=1024, description="longest sequence the model can see, in tokens")
    n_layer: int = Field(default=12, gt=0, le=512, description="number of blocks")
    n_head: Width = Field(default=12, description="attention heads a block")
    n_embd: Width = Field(default=768, description="width of the residual stream; a multiple of n_head")
    embd_pdrop: float = Field(default=0.0, ge=0, lt=1, description="dropout on the summed embeddings")
    attn_pdrop: float = Field(default=0.0, ge=0, lt=1, description="dropout on the attention probabilities")
    resid_pdrop: float = Field(default=0.0, ge=0, lt=1, description="dropout on what each half of a block adds")
    layer_norm_epsilon: float = Field(default=1e-5, gt=0, description="added to the variance in layer norms")
    initializer_range: float = Field(default=0.02, gt=0, description="standard deviation of fresh weights")
    initializer: Literal["gpt2", "uer"] = Field(
        default="gpt2", description="gpt2: residual projections / sqrt(2 n_layer), biases 0; uer: all alike"
    )
    tie_word_embeddings: bool = Field(
        default=True, description="share the token embedding with the head; false: the head has its own parameters"
    )
    dtype: Literal["float32", "bfloat16"] = Field(
        default="bfloat16", description="type of activations; parameters, softmax and loss stay float32"
    )
    attend_across_documents: bool = Field(default=False, description="let attention cross document boundaries in a row")
    attention: Literal["auto", "xla", "flash", "cudnn", "splash"] = Field(
        default="auto",
        description="kernel: flash (GPU), cudnn (GPU, no dropout), splash (TPU, no dropout), xla; auto: the fastest",
    )
    layers: Literal["auto", "scanned", "unrolled"] = Field(
        default="auto", description="scanned: compiled once; unrolled: in line, faster on CPU; auto: by device"
    )
    remat: Literal["none", "selected", "full"] = Field(
        default="none", description="activations to recompute in the backward pass: none, all but two a layer, all"
    )

    @model_validator(mode="after")
    def _heads_divide_width(self) -> Self:
        if self.n_embd % self.n_head:
            raise ValueError(f"model.n_embd {self.n_embd} is not a multiple of model.n_head {self.n_head}")
        return self

    def with_vocab_size(self, vocab_size: int) -> "ModelConfig":
        """Return the architecture with a vocabulary of `vocab_size` tokens."""
        return ModelConfig.model_validate(self.model_dump() | {"vocab_size": vocab_size})


class ModelConfig(ModelOptions, frozen=True):
    """The architecture of a model whose vocabulary is known."""

    vocab_size: int = Field(gt=0, le=MOST_TOKENS)

    @property
    def head_size(self) -> int:
        return self.n_embd // self.n_head

    @property
    def parameters(self) -> int:
        """Number of parameters; a head that shares the token embedding counts once."""
        block = 12 * self.n_embd**2 + 13 * self.n_embd
        return self.embedding_parameters + 2 * self.n_embd + self.n_layer * block

    @property
    def embedding_parameters(self) -> int:
        """Number of parameters in the token embedding, the position embedding, and an untied head."""
        tables = 1 if self.tie_word_embeddings else 2
        return (tables * self.vocab_size + self.n_positions) * self.n_embd

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding and the head in memory and in checkpoints.

        A multiple of 128 tiles and shards well on every device. The rows past `vocab_size` are zero, get no
        probability, and are never exported.
        """
        return -(-self.vocab_size // 128) * 128
