"""The training step: a pure function of (state, batch), and the layout of its arrays.

Dimension key: B rows, T sequence, A microbatches.
"""

from collections.abc import Callable
from typing import Any, Generic, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import AbstractMesh, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from gpt2_flax.checkpoint.weights import Weights, model_from_weights
from gpt2_flax.config.schema import ResolvedConfig
from gpt2_flax.data.packing import IGNORE, Batch, cut_rows
from gpt2_flax.model.gpt2 import GPT2
from gpt2_flax.model.loss import LossSums
from gpt2_flax.parallel.rules import batch_sharding, tree_shardings
from gpt2_flax.training.compiler_options import compiler_options
from gpt2_flax.training.growth import first_layers, identity_above, stacked, with_first_layers
from gpt2_flax.training.optimizer import learning_rate, make_optimizer


class TrainState(NamedTuple):
    """All that a step changes."""

    model: GPT2
    opt_state: optax.OptState
    step: jax.Array
    """Batches so far, int32 ()."""
    skipped: jax.Array
    """Batches so far that changed nothing, int32 ()."""


Scalar = TypeVar("Scalar")


class StepMetrics(NamedTuple, Generic[Scalar]):
    """Scalars of one optimizer step: on the devices, where reading one waits for the step, or floats on the host."""

    loss: Scalar
    """Mean nats a target."""
    accuracy: Scalar
    grad_norm: Scalar
    learning_rate: Scalar
    real: Scalar
    """Share of the positions that are not padding."""
    targets: Scalar
    """Share of the positions that are trained on."""
    skipped: Scalar
    """Steps of the whole run so far that changed nothing."""


TrainStep = Callable[[TrainState, Batch[jax.Array]], tuple[TrainState, StepMetrics[jax.Array]]]


def state_layout(config: ResolvedConfig, mesh: Mesh | AbstractMesh) -> TrainState:
    """Return the state with a ShapeDtypeStruct, sharding included, in place of each array."""
    shapes = _abstract_state(config)
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        shapes,
        tree_shardings(shapes, mesh),
    )


def initial_state(config: ResolvedConfig, layout: TrainState, weights: Weights | None = None) -> TrainState:
    """Return the state before the first step; every array is created on the devices that keep it.

    The parameters are `weights`, or random numbers of the seed. Layers that come with growth are the identity.
    """
    tx, shardings = make_optimizer(config), jax.tree.map(lambda leaf: leaf.sharding, layout)
    if weights is None:
        seed = jax.random.key(config.training.seed)
        n_layers = config.growth.n_layer or config.model.n_layer
        fresh = jax.jit(
            lambda key: _fresh(identity_above(GPT2(config.model, rngs=nnx.Rngs(key)), n_layers), tx),
            out_shardings=shardings,
        )
        return fresh(seed)
    with jax.default_device(jax.local_devices(backend="cpu")[0]):
        host_model = jax.tree.map(np.asarray, model_from_weights(config.model, weights))
    model = jax.tree.map(
        lambda array, sharding: jax.make_array_from_callback(array.shape, sharding, lambda index: array[index]),
        host_model,
        shardings.model,
    )
    return jax.jit(lambda model: _fresh(model, tx), out_shardings=shardings)(model)


def make_train_step(config: ResolvedConfig, layout: TrainState, mesh: Mesh, grown: bool = True) -> jax.stages.Wrapped:
    """Return the jitted function (state, batch) -> (state, `StepMetrics`); the state that it is given is donated.

    If the model is not `grown`, the function trains its first layers, on the rows of `batch` cut into shorter rows.

    The loss is the mean over all targets of the global batch, at any number of devices and of microbatches. A step
    whose loss or gradient is not finite is skipped: the parameters, the optimizer and its schedule stay as they are,
    and only `step`, and so the data, advances. The devices decide that without the host.
    """
    train_step = _train_step(config) if grown else _train_step_before_growth(config.before_growth())
    shardings = jax.tree.map(lambda leaf: leaf.sharding, layout)
    return jax.jit(
        train_step,
        donate_argnums=0,
        in_shardings=(shardings, batch_sharding(mesh)),
        out_shardings=(shardings, NamedSharding(mesh, P())),
        compiler_options=compiler_options(config, mesh),
    )


def make_growth(config: ResolvedConfig, layout: TrainState) -> jax.stages.Wrapped:
    """Return the jitted function state -> state that `training.growth` describes; its state is donated."""
    n_layers = config.growth.n_layer or config.model.n_layer
    shardings = jax.tree.map(lambda leaf: leaf.sharding, layout)
    return jax.jit(lambda state: stacked(state, n_layers), donate_argnums=0, out_shardings=shardings)


def _train_step_before_growth(config: ResolvedConfig) -> TrainStep:
    """Return the function of `make_train_step` for a model that will grow; `config` is of the smaller model."""
    smaller, train_step = _abstract_state(config), _train_step(config)

    def train_step_before_growth(state: TrainState, batch: Batch[jax.Array]) -> tuple[TrainState, StepMetrics]:
        part, metrics = train_step(first_layers(state, smaller), cut_rows(batch, config.data.seq_length))
        return with_first_layers(state, part), metrics

    return train_step_before_growth


def _train_step(config: ResolvedConfig) -> TrainStep:
    tx, schedule, n_microbatches = make_optimizer(config), learning_rate(config), config.training.accumulation_steps

    def train_step(state: TrainState, batch: Batch[jax.Array]) -> tuple[TrainState, StepMetrics]:
        n_targets = (batch.targets_BT != IGNORE).sum().astype(jnp.float32)
        key = jax.random.fold_in(jax.random.key(config.training.seed), state.step)

        def add_gradients(grads, microbatch_and_key):
            (_, sums), more = jax.value_and_grad(_loss, has_aux=True)(state.model, *microbatch_and_key, n_targets)
            return jax.tree.map(jnp.add, grads, more), sums

        zeros = jax.tree.map(jnp.zeros_like, state.model)
        if n_microbatches == 1:
            grads, sums = add_gradients(zeros, (batch, key))
        else:
            microbatches = Batch(*(_microbatches(x_BT, n_microbatches) for x_BT in batch))
            keys = jax.random.split(key, n_microbatches)
            grads, sums_A = jax.lax.scan(add_gradients, zeros, (microbatches, keys))
            sums = jax.tree.map(jnp.sum, sums_A)
        params: Any = state.model  # a pytree of a kind that the types of optax do not know
        updates, opt_state = tx.update(grads, state.opt_state, params)
        model = jax.tree.map(jnp.add, state.model, updates)
        loss, norm = sums.nats / n_targets, optax.tree.norm(grads)
        good = jnp.isfinite(loss) & jnp.isfinite(norm)
        model, opt_state = jax.tree.map(
            lambda new, old: jnp.where(good, new, old), (model, opt_state), (state.model, state.opt_state)
        )
        skipped = state.skipped + ~good
        metrics = StepMetrics(
            loss,
            sums.correct / n_targets,
            norm,
            schedule(state.step - state.skipped),
            (batch.segments_BT != 0).mean(),
            n_targets / batch.targets_BT.size,
            skipped,
        )
        return TrainState(model, opt_state, state.step + 1, skipped), metrics

    return train_step


@jax.jit
def all_finite(state: TrainState) -> jax.Array:
    """Return whether every number of the state is finite, bool ()."""
    return jnp.stack([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(state)]).all()


def _abstract_state(config: ResolvedConfig) -> TrainState:
    tx = make_optimizer(config)
    return jax.eval_shape(lambda: _fresh(GPT2(config.model, rngs=nnx.Rngs(0)), tx))


def _fresh(model: Any, tx: optax.GradientTransformation) -> TrainState:
    return TrainState(model, tx.init(model), jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32))


def _loss(model: GPT2, batch: Batch, dropout_key: jax.Array, n_targets: jax.Array) -> tuple[jax.Array, LossSums]:
    sums = model.loss(batch, dropout_key)
    return sums.nats / n_targets, sums


def _microbatches(x_BT: jax.Array, count: int) -> jax.Array:
    """Return x_ABT, whose microbatch a has rows a, a + count, ..., so that every device keeps the rows it has."""
    return jnp.swapaxes(x_BT.reshape(-1, count, *x_BT.shape[1:]), 0, 1)
