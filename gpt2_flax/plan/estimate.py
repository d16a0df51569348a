"""Estimate what a run takes, from its config: nothing is compiled or run.

Dimension key: B rows of a device in one microbatch, T sequence, D model width, V vocabulary.
"""

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.extend.core import jaxprs_in_params
from jax.sharding import AbstractMesh, AxisType

from gpt2_flax.config.model import ModelConfig
from gpt2_flax.config.schema import Config, ResolvedConfig
from gpt2_flax.data.mixture import Mixture
from gpt2_flax.data.packing import row_layout
from gpt2_flax.errors import ExitCode, UserError
from gpt2_flax.model.embedding import replicate
from gpt2_flax.model.flops import flops_of_steps, flops_per_token
from gpt2_flax.model.gpt2 import GPT2
from gpt2_flax.model.loss import LossSums, cross_entropy
from gpt2_flax.parallel.auto_mesh import choose_mesh
from gpt2_flax.parallel.device_batches import row_shards
from gpt2_flax.parallel.devices import Device
from gpt2_flax.parallel.mesh import AXES, MeshSizes
from gpt2_flax.training.open_stage import check_rows, with_vocab_size
from gpt2_flax.training.step import state_layout


@dataclass(frozen=True)
class Figures:
    """Counts of a run."""

    parameters: int
    in_embeddings: int
    """Including the head, if it has its own parameters."""
    in_blocks: int
    flops_per_token: int
    """For a forward and a backward pass."""
    tokens_per_step: int
    steps: int
    flops: int
    """Of the whole run."""
    epochs: Mapping[str, float] | None
    """By dataset folder; None if a dataset is missing."""

    @property
    def tokens(self) -> int:
        return self.steps * self.tokens_per_step

    def days(self, peak_flops: float, utilization: float) -> float:
        """Return the days of all steps.

        Args:
            peak_flops: FLOP/s of all devices together.
            utilization: share of the peak that training reaches.
        """
        return self.flops / (peak_flops * utilization) / 86400


@dataclass(frozen=True)
class Memory:
    """Bytes on one device. The last two are estimates; only a compiled program shows what XLA needs."""

    parameters: int
    gradients: int
    optimizer: int
    activations: int
    """Arrays that the forward pass keeps for the backward pass."""
    loss: int
    """The largest chunk of logits, and its gradient."""

    @property
    def total(self) -> int:
        return self.parameters + self.gradients + self.optimizer + self.activations + self.loss


def read_datasets(config: Config) -> tuple[ResolvedConfig, Mixture | None]:
    """Return the config with its vocabulary size, and the datasets, or None if a dataset is missing.

    Raises:
        UserError: CONFIG when the vocabulary size is unknown, or like `Mixture` and `with_vocab_size`.
    """
    try:
        mixture = Mixture(config.data.datasets)
    except UserError as error:
        if error.exit_code != ExitCode.NO_INPUT:
            raise
        if config.model.vocab_size is None:
            fix = "prepare it, or say how many tokens the vocabulary has, such as model.vocab_size=21128"
            raise UserError(
                ExitCode.CONFIG, f"model.vocab_size is not known, and {error.what}", error.where, fix
            ) from None
        return config.with_vocab_size(config.model.vocab_size), None
    return with_vocab_size(config, mixture), mixture


def figures(config: ResolvedConfig, mixture: Mixture | None) -> Figures:
    """Return the counts of a run, without epochs if `mixture` is None."""
    model, n_rows, steps = config.model, config.data.global_batch_size, config.training.total_steps
    return Figures(
        parameters=model.parameters,
        in_embeddings=model.embedding_parameters,
        in_blocks=model.parameters - model.embedding_parameters - 2 * model.n_embd,
        flops_per_token=flops_per_token(model, config.data.seq_length),
        tokens_per_step=n_rows * config.data.seq_length,
        steps=steps,
        flops=flops_of_steps(config, 0, steps),
        epochs=None if mixture is None else _epochs(config, mixture),
    )


def as_many_as_configured(config: ResolvedConfig, devices: Sequence[Device]) -> tuple[Sequence[Device], str]:
    """Return the devices of this machine, or as many of their kind as the mesh of the config needs."""
    sizes = (config.mesh.data, config.mesh.fsdp, config.mesh.tensor)
    given = [size for size in sizes if size != "auto" and size != -1]
    count = math.prod(given)
    if len(devices) == count or (len(given) < len(sizes) and len(devices) % count == 0):
        return devices, "those of this machine"
    here = f"here {'is' if len(devices) == 1 else 'are'} {len(devices)}"
    return [devices[0]] * count, f"as the config's mesh has it; {here}"


def mesh_sizes(config: ResolvedConfig, devices: Sequence[Device]) -> tuple[MeshSizes, str]:
    """Return the mesh that training would choose, and why; if none fits, one for which `memory` raises the error."""
    sizes, why = choose_mesh(config, devices)
    if sizes.data == -1:
        sizes = sizes._replace(data=max(1, len(devices) // (sizes.fsdp * sizes.tensor)))
    return sizes, why


def abstract_mesh(sizes: MeshSizes) -> AbstractMesh:
    """Return a mesh without devices, which is enough to tell how arrays are sharded."""
    return AbstractMesh((sizes.data, sizes.fsdp, sizes.tensor), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def checkpoint_bytes(config: ResolvedConfig) -> int:
    """Return the bytes of one checkpoint: parameters and moments, including the padding of the vocabulary."""
    layout = state_layout(config, abstract_mesh(MeshSizes(1, 1, 1)))
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves((layout.model, layout.opt_state)))


def memory(config: ResolvedConfig, sizes: MeshSizes) -> Memory:
    """Return the bytes on each device of a mesh; raise `UserError` (CONFIG) if rows or arrays do not split evenly."""
    mesh = abstract_mesh(sizes)
    check_rows(config, mesh)
    layout = state_layout(config, mesh)
    parameters = bytes_on_a_device(layout.model)
    rows = config.data.global_batch_size // (row_shards(mesh) * config.training.accumulation_steps)
    activations, loss = _of_one_microbatch(config.model, rows, config.data.seq_length, sizes.tensor)
    return Memory(parameters, parameters, bytes_on_a_device(layout.opt_state), activations, loss)


def bytes_on_a_device(layout: Any) -> int:
    """Return the bytes on each device of all arrays, or shapes, with shardings."""
    leaves = jax.tree.leaves(layout)
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in leaves)


def _epochs(config: ResolvedConfig, mixture: Mixture) -> dict[str, float]:
    batches = mixture.batches(row_layout(config), seed=0)
    weights = config.data.datasets
    samples = config.training.total_steps * config.data.global_batch_size / sum(weights.values())
    of_datasets = zip(weights.items(), batches.rows, strict=True)
    return {folder: samples * weight / rows.n_rows for (folder, weight), rows in of_datasets}


def _of_one_microbatch(model: ModelConfig, n_rows: int, seq_length: int, tensor: int) -> tuple[int, int]:
    """Return the bytes of the activations of a device's rows, and of the largest chunk of logits and its gradient.

    Traces the configured model. Arrays with a dimension of heads, of the inner width or of the vocabulary are split
    over the `tensor` devices.
    """
    shapes = jax.eval_shape(lambda: GPT2(model, rngs=nnx.Rngs(0)))
    ids_BT = jax.ShapeDtypeStruct((n_rows, seq_length), jnp.int32)
    key = jax.eval_shape(lambda: jax.random.key(0))
    heads = {(model.n_head, model.head_size), (n_rows, model.n_head)}

    def size(variable) -> int:
        array = variable.aval
        wide = {4 * model.n_embd, model.padded_vocab_size} & set(array.shape)
        shards = tensor if wide or heads & set(itertools.pairwise(array.shape)) else 1
        return math.prod(array.shape) * array.dtype.itemsize // shards

    def kept(params, tokens_BT, segments_BT, positions_BT, key):
        return jax.vjp(lambda params: params.hidden(tokens_BT, segments_BT, positions_BT, key), params)[1]

    def loss(x_BTD, params, targets_BT):
        sums: LossSums = cross_entropy(x_BTD, replicate(params.head_VD), targets_BT, model.vocab_size)
        return sums.nats

    forward = jax.make_jaxpr(kept)(shapes, ids_BT, ids_BT, ids_BT, key).jaxpr
    given = set(map(id, forward.invars))  # parameters are counted already
    residuals = {id(variable): variable for variable in forward.outvars if id(variable) not in given}
    x_BTD = jax.ShapeDtypeStruct((n_rows, seq_length, model.n_embd), jnp.dtype(model.dtype))
    head = jax.make_jaxpr(jax.grad(loss, (0, 1)))(x_BTD, shapes, ids_BT).jaxpr
    widths = (model.padded_vocab_size,)
    largest = max(size(variable) for variable in _products(head) if variable.aval.shape[-1:] == widths)
    return sum(map(size, residuals.values())), 2 * largest


def _products(jaxpr: Any) -> Iterator[Any]:
    """Yield the results of all matrix products of a traced function and of its callees.

    XLA fuses other operations of that size, so their results take no memory.
    """
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            yield from equation.outvars
        for inner in jaxprs_in_params(equation.params):
            yield from _products(inner)
