"""Sums over tokens, rows and devices are float32 whatever the compute dtype is: a bfloat16 sum of ones ends at 256."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from gpt2_flax.checkpoint.weights import model_from_weights, weights_of
from gpt2_flax.config.model import ModelConfig
from gpt2_flax.data.packing import Batch
from gpt2_flax.model.block import Mlp
from gpt2_flax.model.gpt2 import GPT2
from gpt2_flax.model.layers import LayerNorm, Linear
from gpt2_flax.parallel.mesh import MeshSizes, make_mesh
from gpt2_flax.parallel.rules import batch_sharding, path_of, tree_shardings

pytestmark = pytest.mark.slow

N_TOKENS = 2**16
CFG = ModelConfig(vocab_size=512, n_positions=128, n_layer=2, n_head=2, n_embd=64, dtype="bfloat16")
SMALL = CFG.model_copy(update={"n_embd": 4, "n_head": 2, "n_layer": 1, "n_positions": 4})
NORM = LayerNorm(SMALL, rngs=nnx.Rngs(0))


def gradient_of_ones(module, output, x_BTD):
    return jax.jit(jax.grad(lambda module: output(module, x_BTD).astype(jnp.float32).sum()))(module)


@pytest.fixture(scope="module")
def x_BTD():
    return jnp.ones((4, N_TOKENS // 4, SMALL.n_embd), jnp.bfloat16)


def test_the_bias_of_a_linear_layer_gets_one_from_each_token(x_BTD):
    mlp = gradient_of_ones(Mlp(SMALL, rngs=nnx.Rngs(0)), lambda mlp, x_BTD: mlp(x_BTD, NORM), x_BTD)
    np.testing.assert_array_equal(mlp.c_proj.bias[...], N_TOKENS)


def test_the_bias_of_a_linear_layer_with_heads_gets_one_from_each_token(x_BTD):
    x_BTHK = x_BTD.reshape(*x_BTD.shape[:2], 2, 2)
    linear = gradient_of_ones(Linear(SMALL, (2, 2), (3, 2, 2), rngs=nnx.Rngs(0)), Linear.__call__, x_BTHK)
    np.testing.assert_array_equal(linear.bias[...], N_TOKENS)


def test_the_kernel_of_a_linear_layer_gets_one_from_each_token():
    tokens_BTHK = jnp.ones((1, 257, 2, 2), jnp.bfloat16)  # in bfloat16, 257 is 256
    linear = gradient_of_ones(Linear(SMALL, (2, 2), (4,), rngs=nnx.Rngs(0)), Linear.__call__, tokens_BTHK)
    np.testing.assert_array_equal(linear.kernel[...], 257)


def test_the_bias_of_a_layer_norm_gets_one_from_each_token(x_BTD):
    norm = gradient_of_ones(NORM, LayerNorm.__call__, x_BTD)
    np.testing.assert_array_equal(norm.bias[...], N_TOKENS)


@pytest.mark.parametrize("table", ["wte", "wpe"])
def test_a_row_of_an_embedding_gets_one_from_each_token(table):
    def looked_up(model):
        x_BTD = getattr(model, table)(jnp.zeros((4, N_TOKENS // 4), jnp.int32)).astype(CFG.dtype)
        return x_BTD.astype(jnp.float32).sum()

    gradient = jax.jit(jax.grad(looked_up))(GPT2(SMALL, rngs=nnx.Rngs(0)))
    np.testing.assert_array_equal(getattr(gradient, table).embedding[0], N_TOKENS)


@pytest.fixture(scope="module")
def batch():
    """64 rows of 16 short documents each: the first positions are used a thousand times."""
    draw = np.random.default_rng(0)
    tokens_BT = draw.integers(5, 512, (64, 128), np.int32)
    starts_BT = np.zeros((64, 128), bool)
    for row in range(64):
        starts_BT[row, draw.choice(128, 16, replace=False)] = True
    starts_BT[:, 0] = True
    tokens_BT[starts_BT] = 2
    segments_BT = starts_BT.cumsum(1)
    positions_BT = np.arange(128) - np.maximum.accumulate(np.where(starts_BT, np.arange(128), 0), axis=1)
    arrays = {"tokens_BT": tokens_BT, "targets_BT": np.roll(tokens_BT, -1, 1)}
    arrays |= {"segments_BT": segments_BT, "positions_BT": positions_BT}
    return Batch(**{name: jnp.asarray(array, jnp.int32) for name, array in arrays.items()})


def gradients(dtype, batch, mesh=None):
    """Returns the gradient of the mean loss, path -> float64 array, without dropout."""
    cfg = CFG.model_copy(update={"dtype": dtype})
    model = model_from_weights(cfg, weights_of(GPT2(CFG, rngs=nnx.Rngs(0))))
    grad = jax.jit(jax.grad(lambda model, batch: model.loss(batch).nats / batch.tokens_BT.size))
    if mesh is None:
        gradient = grad(model, batch)
    else:
        with jax.set_mesh(mesh):
            batch = jax.device_put(batch, batch_sharding(mesh))
            gradient = grad(jax.device_put(model, tree_shardings(model, mesh)), batch)
    leaves = jax.tree_util.tree_leaves_with_path(gradient)
    return {path_of(path): np.asarray(leaf, np.float64) for path, leaf in leaves}


@pytest.fixture(scope="module")
def exact(batch):
    return gradients("float32", batch)


@pytest.mark.parametrize("sizes", [None, (8, 1, 1), (1, 8, 1), (2, 2, 2)], ids=str)
def test_gradients_in_bfloat16_are_those_of_float32_within_a_hundredth(batch, exact, sizes):
    found = gradients("bfloat16", batch, None if sizes is None else mesh_of(sizes))
    assert found.keys() == exact.keys()
    errors = {path: np.linalg.norm(found[path] - exact[path]) / np.linalg.norm(exact[path]) for path in exact}
    assert max(errors.values()) < 0.01, errors


@pytest.mark.parametrize("sizes", [None, (8, 1, 1), (1, 8, 1), (1, 1, 2), (2, 2, 2)], ids=str)
def test_no_gradient_of_a_parameter_is_ever_rounded_to_bfloat16(batch, sizes):
    found = gradients("bfloat16", batch, None if sizes is None else mesh_of(sizes))
    rounded = {path: (array == array.astype(jnp.bfloat16)).mean() for path, array in found.items()}
    del rounded["wte/embedding"], rounded["wpe/embedding"]  # rows that no token used are 0
    assert max(rounded.values()) < 0.1, rounded  # of float32 numbers by chance one in 65,536


def mesh_of(sizes):
    config = MeshSizes(**dict(zip(("data", "fsdp", "tensor"), sizes, strict=True)))
    return make_mesh(config, jax.devices()[: math.prod(sizes)])
