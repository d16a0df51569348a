"""The training step: a pure function of (state, batch), and where its arrays live.

Dimension key: B rows, T sequence, A accumulation parts.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from gpt2_flax.checkpoint.weights import Weights, model_from_weights
from gpt2_flax.config import Config
from gpt2_flax.data.packing import IGNORE, Batch
from gpt2_flax.model.gpt2 import GPT2
from gpt2_flax.model.loss import LossSums
from gpt2_flax.parallel.rules import batch_sharding, tree_shardings
from gpt2_flax.training.compiler_options import compiler_options
from gpt2_flax.training.optimizer import learning_rate, make_optimizer


class TrainState(NamedTuple):
    """All that a step changes. `step` counts batches, int32, and `skipped` those of them that changed nothing."""

    model: GPT2
    opt_state: optax.OptState
    step: jax.Array
    skipped: jax.Array


class StepMetrics(NamedTuple):
    """Scalars of one optimizer step, on the devices: reading one waits for the step."""

    loss: jax.Array
    accuracy: jax.Array
    grad_norm: jax.Array
    learning_rate: jax.Array
    real: jax.Array
    """Share of the positions that are not padding."""
    targets: jax.Array
    """Share of the positions that are trained on."""
    skipped: jax.Array
    """Steps of the whole run so far that changed nothing, int32."""


def state_layout(config: Config, mesh: Mesh) -> TrainState:
    """Returns the state with a ShapeDtypeStruct, sharding included, for each array."""
    tx = make_optimizer(config)
    shapes = jax.eval_shape(lambda: _fresh(GPT2(config.model, rngs=nnx.Rngs(0)), tx))
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        shapes,
        tree_shardings(shapes, mesh),
    )


def initial_state(config: Config, layout: TrainState, weights: Weights | None = None) -> TrainState:
    """Returns step 0: parameters drawn from the seed, or `weights`; every array is made where it will live."""
    tx, shardings = make_optimizer(config), jax.tree.map(lambda leaf: leaf.sharding, layout)
    if weights is None:
        seed = jax.random.key(config.training.seed)
        return jax.jit(lambda key: _fresh(GPT2(config.model, rngs=nnx.Rngs(key)), tx), out_shardings=shardings)(seed)
    with jax.default_device(jax.local_devices(backend="cpu")[0]):
        host_model = jax.tree.map(np.asarray, model_from_weights(config.model, weights))
    model = jax.tree.map(
        lambda array, sharding: jax.make_array_from_callback(array.shape, sharding, lambda index: array[index]),
        host_model,
        shardings.model,
    )
    return jax.jit(lambda model: _fresh(model, tx), out_shardings=shardings)(model)


def make_train_step(
    config: Config, layout: TrainState, mesh: Mesh
) -> Callable[[TrainState, Batch], tuple[TrainState, StepMetrics]]:
    """Returns the compiled-on-first-use step; the state it is given is used up (donated).

    The loss is the mean over all targets of the global batch, whatever the number of devices or of parts. A step whose
    loss or gradient is not finite is skipped: it changes neither the parameters nor the optimizer, whose schedule waits
    with it; only `step` goes on, and with it the data. All that is decided on the devices.
    """
    tx, schedule, parts = make_optimizer(config), learning_rate(config), config.training.accumulation_steps

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, StepMetrics]:
        n_targets = (batch.targets_BT != IGNORE).sum().astype(jnp.float32)
        key = jax.random.fold_in(jax.random.key(config.training.seed), state.step)

        def part(grads, batch_and_key):
            (_, sums), part_grads = jax.value_and_grad(_loss, has_aux=True)(state.model, *batch_and_key, n_targets)
            return jax.tree.map(jnp.add, grads, part_grads), sums

        if parts == 1:
            grads, sums = part(jax.tree.map(jnp.zeros_like, state.model), (batch, key))
        else:
            split = (Batch(*(_split_rows(x_BT, parts) for x_BT in batch)), jax.random.split(key, parts))
            grads, sums_A = jax.lax.scan(part, jax.tree.map(jnp.zeros_like, state.model), split)
            sums = jax.tree.map(jnp.sum, sums_A)
        updates, opt_state = tx.update(grads, state.opt_state, state.model)
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

    shardings = jax.tree.map(lambda leaf: leaf.sharding, layout)
    return jax.jit(
        train_step,
        donate_argnums=0,
        in_shardings=(shardings, batch_sharding(mesh)),
        out_shardings=(shardings, NamedSharding(mesh, P())),
        compiler_options=compiler_options(config, mesh),
    )


@jax.jit
def all_finite(state: TrainState) -> jax.Array:
    """Returns whether every number of the state is finite, bool ()."""
    return jnp.stack([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(state)]).all()


def _fresh(model: GPT2, tx: optax.GradientTransformation) -> TrainState:
    return TrainState(model, tx.init(model), jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32))


def _loss(model: GPT2, batch: Batch, dropout_key: jax.Array, n_targets: jax.Array) -> tuple[jax.Array, LossSums]:
    sums = model.loss(batch, dropout_key)
    return sums.nats / n_targets, sums


def _split_rows(x_BT: jax.Array, parts: int) -> jax.Array:
    """Returns x_ABT: every `parts`-th row, so that each device keeps the rows it has."""
    return jnp.swapaxes(x_BT.reshape(-1, parts, *x_BT.shape[1:]), 0, 1)
