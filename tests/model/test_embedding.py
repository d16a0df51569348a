"""Gradients of embeddings on a GPU: the sum of each row in one order, without a scatter that adds, on any mesh.

No test needs a GPU: the look-up is told that it runs on one, or is compiled for one.
"""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from gpt2_flax.config.model import ModelConfig
from gpt2_flax.data.packing import Batch
from gpt2_flax.model import embedding
from gpt2_flax.model.embedding import embed_positions, embed_tokens, replicate, sum_by_id
from gpt2_flax.model.gpt2 import GPT2
from gpt2_flax.parallel.mesh import MeshSizes, make_mesh
from gpt2_flax.plan.topology import devices_for

VOCABULARY, WIDTH = 400, 24
MESHES = [None, (8, 1, 1), (1, 8, 1), (1, 1, 4), (2, 2, 2)]


@pytest.fixture
def on_gpu(monkeypatch):
    monkeypatch.setattr(embedding, "platform", lambda: "gpu")


def zipf(n, n_ids, seed=0):
    """Return ids distributed like words: a few make up most of a text and fill blocks; many never occur."""
    return (np.random.default_rng(seed).zipf(1.2, n) % n_ids).astype(np.int32)


def normal(*shape, dtype="float32"):
    return jnp.asarray(np.random.default_rng(1).normal(size=shape), dtype)


def added_up(x_ND, ids_N, n_ids):
    """Return sums_VD in float64, and the sums of absolute values, which bound rounding errors."""
    sums_VD, sizes_VD = np.zeros((2, n_ids, x_ND.shape[-1]))
    np.add.at(sums_VD, np.ravel(ids_N), np.asarray(x_ND, np.float64).reshape(-1, x_ND.shape[-1]))
    np.add.at(sizes_VD, np.ravel(ids_N), np.abs(np.asarray(x_ND, np.float64)).reshape(-1, x_ND.shape[-1]))
    return sums_VD, sizes_VD


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize(
    ("n", "n_ids"), [(1, 1), (127, 3), (128, 400), (5000, 1), (5000, 7), (5000, 400), (4096, 20_000)]
)
def test_rows_are_added_up_by_id_as_exactly_as_float32_can(n, n_ids, dtype):
    x_ND, ids_N = normal(n, WIDTH, dtype=dtype), zipf(n, n_ids)
    sums_VD, sizes_VD = added_up(x_ND, ids_N, n_ids)
    found_VD = jax.jit(sum_by_id, static_argnums=2)(x_ND, ids_N, n_ids)
    assert found_VD.dtype == jnp.float32
    assert (np.abs(found_VD - sums_VD) <= 1e-6 * sizes_VD).all()  # so 0 where an id does not occur


@pytest.mark.slow
def test_a_row_alone_with_its_id_is_its_own_sum():
    x_ND, ids_N = normal(1000, WIDTH), np.random.default_rng(0).permutation(1000)
    np.testing.assert_array_equal(sum_by_id(x_ND, jnp.asarray(ids_N, jnp.int32), 1000)[ids_N], x_ND)


@pytest.mark.slow
def test_ones_add_up_to_their_number():
    np.testing.assert_array_equal(sum_by_id(jnp.ones((2**16, 4), jnp.bfloat16), jnp.zeros(2**16, jnp.int32), 1), 2**16)


@pytest.mark.slow
@pytest.mark.parametrize("sizes", MESHES, ids=str)
@pytest.mark.parametrize("table", ["tokens", "positions"])
def test_gradients_on_gpus_are_the_sums_of_all_rows_of_all_devices(table, sizes, on_gpu):
    ids_BT, of_x_BTD = zipf(16 * 64, VOCABULARY).reshape(16, 64), normal(16, 64, WIDTH)
    table_VD = normal(VOCABULARY, WIDTH)

    @jax.jit
    def gradient(table_VD, ids_BT, of_x_BTD):
        def output(table_VD):
            if table == "tokens":
                x_BTD = embed_tokens(replicate(table_VD), ids_BT, "float32")
            else:
                x_BTD = embed_positions(table_VD, ids_BT)
            return (x_BTD * of_x_BTD).sum(), x_BTD

        return jax.grad(output, has_aux=True)(table_VD)

    with jax.set_mesh(mesh_of(sizes)):
        found_VD, x_BTD = gradient(table_VD, ids_BT, of_x_BTD)
    np.testing.assert_array_equal(x_BTD, np.asarray(table_VD)[ids_BT])
    sums_VD, sizes_VD = added_up(of_x_BTD, ids_BT, VOCABULARY)
    assert (np.abs(found_VD - sums_VD) <= 1e-6 * sizes_VD).all()


def mesh_of(sizes):
    sizes = (1, 1, 1) if sizes is None else sizes
    config = MeshSizes(**dict(zip(("data", "fsdp", "tensor"), sizes, strict=True)))
    return make_mesh(config, jax.devices()[: math.prod(sizes)])


CFG = ModelConfig(vocab_size=VOCABULARY, n_positions=64, n_layer=2, n_head=2, n_embd=WIDTH, dtype="bfloat16")


def gradient_of_loss():
    """Return the gradient of a model's loss as a function, and the shapes of its arguments."""
    ids = jax.ShapeDtypeStruct((4, 64), jnp.int32)
    model = jax.eval_shape(lambda: GPT2(CFG, rngs=nnx.Rngs(0)))
    return jax.grad(lambda model, batch: model.loss(batch).nats), (model, Batch(*[ids] * len(Batch._fields)))


@pytest.mark.slow
def test_a_gradient_for_gpus_scatters_nothing_and_sorts_ids_alone(on_gpu):
    gradient, arguments = gradient_of_loss()
    program = jax.jit(gradient).trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()
    assert "stablehlo.scatter" not in program
    sorted_shapes = re.findall(r'"stablehlo\.sort".*?\}\) : \((.*?)\)', program, re.DOTALL)
    assert set(sorted_shapes) == {"tensor<256xi32>, tensor<256xi32>"}


@pytest.mark.slow
def test_a_gpu_does_not_round_what_it_adds_up():
    """By default a GPU multiplies float32 as TF32, of 10 bits; a CPU cannot show that."""
    arguments = jax.ShapeDtypeStruct((300, WIDTH), jnp.float32), jax.ShapeDtypeStruct((300,), jnp.int32)
    program = jax.jit(sum_by_id, static_argnums=2).lower(*arguments, VOCABULARY).as_text()
    products = re.findall(r"stablehlo\.dot_general.*", program)
    assert len(products) == 2
    assert all("precision = [HIGHEST, HIGHEST]" in product for product in products)


@pytest.mark.slow
def test_a_gradient_for_cpus_scatters_as_it_is_quickest_there():
    gradient, arguments = gradient_of_loss()
    program = jax.jit(gradient).lower(*arguments).as_text()
    assert program.count('"stablehlo.scatter"(') == 2
    assert "stablehlo.sort" not in program


@pytest.mark.slow
def test_a_program_compiled_for_a_gpu_scatters_nothing():
    pytest.importorskip("jax_plugins.xla_cuda12")
    gradient, arguments = gradient_of_loss()
    with jax.set_mesh(make_mesh(MeshSizes(), devices_for("h200:1"))):
        program = jax.jit(gradient).lower(*arguments).compile().as_text()
    assert " scatter(" not in program
    assert {int(n) for n in re.findall(r"= \(?s32\[(\d+)\]\S* (?:s32\S* )?sort\(", program)} <= {256}
