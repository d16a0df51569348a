"""A training step by itself."""

import jax
from support.configs import changed
from support.rows import batches_of

from gpt2_flax.data.dataset import TokenDataset
from gpt2_flax.parallel.device_batches import device_batch
from gpt2_flax.parallel.mesh import MeshSizes, make_mesh
from gpt2_flax.training.step import initial_state, make_train_step, state_layout


def step_and_state(config, n_batches):
    """A step on one device, a function that makes its first state, and batches."""
    data = TokenDataset(config.data.dataset)
    config = changed(config, model__vocab_size=data.info.vocab_size)
    mesh, n_rows = make_mesh(MeshSizes(), jax.devices()[:1]), config.data.global_batch_size
    loader, layout = batches_of(data.train, config.data.seq_length, seed=0), state_layout(config, mesh)
    batches = [device_batch(mesh, n_rows, loader.batch, number * n_rows) for number in range(n_batches)]
    return make_train_step(config, layout, mesh), lambda: initial_state(config, layout), batches
