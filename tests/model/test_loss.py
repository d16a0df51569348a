"""The chunked loss against a plain float64 one, on every mesh, and what it may cost."""

import math
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.configs import changed
from support.one_device import step_and_state

from gpt2_flax.data.packing import IGNORE
from gpt2_flax.model import loss
from gpt2_flax.model.embedding import copies, look_up
from gpt2_flax.model.loss import cross_entropy
from gpt2_flax.parallel.mesh import MeshSizes, make_mesh

MESHES = {"1x1x1": (1, 1, 1), "8x1x1": (8, 1, 1), "1x8x1": (1, 8, 1), "2x2x2": (2, 2, 2)}


def on_mesh(shape):
    sizes = dict(zip(("data", "fsdp", "tensor"), shape, strict=True))
    return jax.set_mesh(make_mesh(MeshSizes(**sizes), jax.devices()[: math.prod(shape)]))


def example(n_rows, length, width, vocab_size, padded, ignored=0.3, seed=0):
    """Returns x_BTD, embedding_VD, whose rows of padding are not zero, and targets_BT."""
    draw = np.random.default_rng(seed)
    x_BTD, embedding_VD = draw.normal(size=(n_rows, length, width)), draw.normal(size=(padded, width))
    targets_BT = draw.integers(0, vocab_size, (n_rows, length))
    targets_BT[draw.random((n_rows, length)) < ignored] = IGNORE
    return x_BTD.astype(np.float32), embedding_VD.astype(np.float32), targets_BT.astype(np.int32)


def expected(x_BTD, embedding_VD, targets_BT, vocab_size):
    """Returns sums and gradients in float64, one token after the other."""
    x_BTD, embedding_VD = np.asarray(x_BTD, np.float64), np.asarray(embedding_VD, np.float64)
    sums, of_x_BTD, of_embedding_VD = np.zeros(3), np.zeros_like(x_BTD), np.zeros_like(embedding_VD)
    for place in zip(*np.nonzero(targets_BT != IGNORE), strict=True):
        logits_V, target = embedding_VD[:vocab_size] @ x_BTD[place], targets_BT[place]
        exp_V = np.exp(logits_V - logits_V.max())
        sums += np.log(exp_V.sum()) + logits_V.max() - logits_V[target], logits_V.argmax() == target, 1
        of_logits_V = exp_V / exp_V.sum() - (np.arange(vocab_size) == target)
        of_x_BTD[place] = of_logits_V @ embedding_VD[:vocab_size]
        of_embedding_VD[:vocab_size] += np.outer(of_logits_V, x_BTD[place])
    return sums, of_x_BTD, of_embedding_VD


@pytest.fixture
def gpu(monkeypatch):
    """Computes the loss as a GPU would: in bfloat16, training keeps float16 logits."""
    monkeypatch.setattr(loss, "platform", lambda: "gpu")


def found(x_BTD, embedding_VD, targets_BT, vocab_size):
    """Returns sums and gradients of twice the nats."""

    def twice(x_BTD, embedding_VD):
        sums = cross_entropy(x_BTD, embedding_VD, targets_BT, vocab_size)
        return 2 * sums.nats, sums

    gradients_and_sums = jax.jit(jax.value_and_grad(twice, argnums=(0, 1), has_aux=True))
    (_, sums), gradients = gradients_and_sums(x_BTD, embedding_VD)
    return jnp.stack(sums), *gradients


def assert_equal(arrays, expected_arrays, tolerance):
    """Holds each array to `tolerance` of the largest number expected in it."""
    for array, expected_array, factor in zip(arrays, expected_arrays, (1, 2, 2), strict=True):
        largest = np.abs(factor * expected_array).max(initial=1e-3)
        np.testing.assert_allclose(array, factor * expected_array, rtol=0, atol=tolerance * largest)


@pytest.mark.slow
@settings(max_examples=25)
@given(
    n_rows=st.integers(1, 4),
    length=st.integers(1, 9),
    vocab_size=st.integers(1, 20),
    padding=st.integers(0, 5),
    chunk=st.integers(1, 40),
    ignored=st.sampled_from([0.0, 0.3, 0.95, 1.0]),
    seed=st.integers(0, 2**32 - 1),
)
def test_sums_and_gradients_equal_float64_numpy(n_rows, length, vocab_size, padding, chunk, ignored, seed):
    arrays = example(n_rows, length, 6, vocab_size, vocab_size + padding, ignored, seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loss, "chunk_tokens", lambda: chunk)
        assert_equal(found(*arrays, vocab_size), expected(*arrays, vocab_size), 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("chunk", [3, 1024])
@pytest.mark.parametrize("mesh", MESHES)
def test_sums_and_gradients_are_the_same_on_every_mesh(mesh, chunk, monkeypatch):
    monkeypatch.setattr(loss, "chunk_tokens", lambda: chunk)
    arrays = example(8, 5, 16, vocab_size=65, padded=128)
    with on_mesh(MESHES[mesh]):
        arrays_found = found(*arrays, 65)
        sums = jax.jit(partial(cross_entropy, vocab_size=65))(*arrays)
    assert_equal(arrays_found, expected(*arrays, 65), 1e-5)
    np.testing.assert_allclose(sums, arrays_found[0], rtol=1e-6)


def test_bfloat16_hidden_states_give_the_gradients_of_float32_within_a_hundredth():
    x_BTD, embedding_VD, targets_BT = example(4, 16, 32, vocab_size=100, padded=128)
    x_BTD, embedding_VD = (array.astype(jnp.bfloat16) for array in (x_BTD, embedding_VD / 4))
    sums, of_x_BTD, of_embedding_VD = found(x_BTD, embedding_VD.astype(np.float32), targets_BT, 100)
    assert (of_x_BTD.dtype, of_embedding_VD.dtype) == (jnp.bfloat16, jnp.float32)
    # Of the gradient of a logit 8 bits remain (2**-9 off at most); the softmax before it is float32.
    wanted = expected(x_BTD, embedding_VD, targets_BT, 100)
    assert_equal((sums, np.asarray(of_x_BTD, np.float32), of_embedding_VD), wanted, 1e-2)
    np.testing.assert_allclose(sums, wanted[0], rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("chunk", [3, 4096])
@pytest.mark.parametrize("mesh", MESHES)
def test_float16_logits_give_the_sums_and_gradients_of_float64_on_every_mesh(mesh, chunk, gpu, monkeypatch):
    monkeypatch.setattr(loss, "chunk_tokens", lambda: chunk)
    x_BTD, embedding_VD, targets_BT = example(8, 5, 16, vocab_size=65, padded=128)
    x_BTD, embedding_VD = x_BTD.astype(jnp.bfloat16), np.float32(embedding_VD.astype(jnp.bfloat16))
    with on_mesh(MESHES[mesh]):
        sums, of_x_BTD, of_embedding_VD = found(x_BTD, embedding_VD, targets_BT, 65)
    assert (of_x_BTD.dtype, of_embedding_VD.dtype) == (jnp.bfloat16, jnp.float32)
    wanted = expected(x_BTD, embedding_VD, targets_BT, 65)
    # As above, the gradients of logits are bfloat16, and so are the sums over `tensor`.
    assert_equal((sums, np.float32(of_x_BTD), of_embedding_VD), wanted, 1e-2)
    np.testing.assert_allclose(sums, wanted[0], rtol=1e-4)


def test_float16_logits_keep_the_label_in_float32(gpu):
    """A likely label: float16 rounds its logit by 0.005, 40 times the loss, which the label's own logit must not be."""
    x_BTD = np.ones((1, 8, 2), jnp.bfloat16)
    embedding_VD = np.zeros((64, 2), np.float32)
    embedding_VD[5] = 13, 5 / 1024
    arrays = x_BTD, embedding_VD, np.full((1, 8), 5)
    np.testing.assert_allclose(found(*arrays, 64)[0], expected(*arrays, 64)[0], rtol=0.02)


@pytest.mark.slow
def test_float16_logits_do_not_make_predictions_right_that_were_not(gpu):
    """Of two likely tokens 0 to 1/64 apart, as far as float16 numbers are at 16, the label is one."""
    draw, cases = np.random.default_rng(0), 512
    tokens_N2 = np.stack([draw.permutation(128)[:2] for _ in range(cases)])
    embedding_VD = np.zeros((128, 2 * cases), np.float32)  # the rough logit of each case, and what is added to it
    embedding_VD[tokens_N2.T, np.arange(cases)] = 16
    embedding_VD[tokens_N2.T, cases + np.arange(cases)] = draw.uniform(0, 1 / 64, (2, cases)).astype(jnp.bfloat16)
    x_BTD = np.tile(np.eye(cases), 2)[None].astype(jnp.bfloat16)
    labels_BT = tokens_N2[:, 0][None]
    right = expected(x_BTD, embedding_VD, labels_BT, 128)[0][1]
    assert found(x_BTD, embedding_VD, labels_BT, 128)[0][1] == pytest.approx(right, abs=0.06 * cases)
    rounded_VN = (embedding_VD @ np.float32(x_BTD[0]).T).astype(np.float16)
    overcount = (rounded_VN[labels_BT[0], np.arange(cases)] == rounded_VN.max(0)).sum() - right
    assert overcount > 0.2 * cases  # had the label's logit been rounded like the others


@pytest.mark.slow
def test_float16_logits_train_as_float32_ones_do(config, monkeypatch):
    """The losses of a whole run that learns a pattern, and how far every tenth step's gradients are from float64's."""
    step, first, batches = step_and_state(changed(config, model__dtype="bfloat16", training__total_steps=40), 40)

    def on(platform):
        def of_loss(model, batch):
            monkeypatch.setattr(loss, "platform", lambda: platform)
            x_BTD = model.hidden(batch.tokens_BT, batch.segments_BT, batch.positions_BT)
            return x_BTD, *found(x_BTD, model.head_VD, batch.targets_BT, model.cfg.vocab_size)

        return jax.jit(of_loss)

    wide, narrow, state, nats_S2 = on("cpu"), on("gpu"), first(), []
    for number, batch in enumerate(batches):
        x_BTD, *of_wide = jax.device_get(wide(state.model, batch))
        _, *of_narrow = jax.device_get(narrow(state.model, batch))
        nats_S2.append((of_wide[0][0], of_narrow[0][0]))
        if number % 10 == 0:
            head_VD, n_tokens = state.model.head_VD.astype(jnp.bfloat16), state.model.cfg.vocab_size
            exact = expected(x_BTD, head_VD, jax.device_get(batch.targets_BT), n_tokens)
            for array, other, exact_array in zip(of_narrow[1:], of_wide[1:], exact[1:], strict=True):
                # Float32 logits are 2e-3 off, as gradients are rounded to bfloat16; bfloat16 logits would add 1.6e-3.
                assert relative_error(array, 2 * exact_array) < relative_error(other, 2 * exact_array) + 5e-4
        state, _ = step(state, batch)
    nats_S2 = np.array(nats_S2)
    np.testing.assert_allclose(nats_S2[:, 1], nats_S2[:, 0], rtol=1e-4)
    assert (nats_S2[:, 0] != nats_S2[:, 1]).any()
    assert nats_S2[-1, 0] < nats_S2[0, 0] / 2


def relative_error(array, exact_array):
    return np.linalg.norm(np.float64(array) - exact_array) / np.linalg.norm(exact_array)


def makes_float16_logits(dtype, gradients):
    """Returns whether the traced loss has a product as wide as the vocabulary in float16, or else one in float32."""

    def nats(x_BTD, embedding_VD):
        return cross_entropy(x_BTD, embedding_VD, jnp.zeros(x_BTD.shape[:2], jnp.int32), 256).nats

    arrays = jax.ShapeDtypeStruct((1, 32, 64), dtype), jax.ShapeDtypeStruct((256, 64), jnp.float32)
    text = str(jax.make_jaxpr(jax.grad(nats, (0, 1)) if gradients else nats)(*arrays))
    products = re.findall(r":(\w+)\[(?:1,)?32,256\] = dot_general", text)
    assert products in (["f16"], ["f32"])
    return products == ["f16"]


@pytest.mark.slow
def test_only_training_in_bfloat16_on_a_gpu_makes_float16_logits(monkeypatch):
    traced = {}
    for platform in ("cpu", "gpu", "tpu"):
        monkeypatch.setattr(loss, "platform", lambda name=platform: name)
        for dtype in ("bfloat16", "float32"):
            for gradients in (False, True):
                traced[platform, dtype, gradients] = makes_float16_logits(dtype, gradients)
    assert [case for case, float16 in traced.items() if float16] == [("gpu", "bfloat16", True)]


@pytest.mark.slow
def test_all_targets_ignored_is_no_loss_and_no_gradient():
    x_BTD, embedding_VD, targets_BT = example(2, 5, 8, vocab_size=16, padded=16, ignored=1.0)
    for array in found(x_BTD, embedding_VD, targets_BT, 16):
        assert not np.asarray(array).any()


@pytest.mark.slow
@pytest.mark.parametrize("mesh", MESHES)
def test_padding_of_the_vocabulary_gets_no_gradient(mesh):
    arrays = example(8, 4, 16, vocab_size=64, padded=128)  # of two parts one is padding alone
    with on_mesh(MESHES[mesh]):
        of_embedding_VD = found(*arrays, 64)[2]
    assert not of_embedding_VD[64:].any()
    assert of_embedding_VD[:64].any()


@pytest.mark.slow
def test_huge_logits_stay_finite():
    x_BTD, embedding_VD, targets_BT = example(2, 4, 8, vocab_size=30, padded=32)
    arrays = x_BTD * 1e3, embedding_VD, targets_BT
    assert_equal(found(*arrays, 30), expected(*arrays, 30), 1e-5)


@pytest.mark.slow
def test_float16_logits_beyond_65504_stay_finite(gpu):
    x_BTD, embedding_VD, targets_BT = example(2, 4, 8, vocab_size=30, padded=32)
    arrays = (x_BTD * 1e4).astype(jnp.bfloat16), embedding_VD * 1e2, targets_BT
    assert expected(*arrays, 30)[0][0] / (targets_BT != IGNORE).sum() > 65504
    for array in found(*arrays, 30):
        assert np.isfinite(np.float32(array)).all()


@pytest.mark.slow
def test_a_hidden_state_that_is_no_number_makes_a_loss_that_is_none(gpu):
    """Training skips such a step."""
    x_BTD, embedding_VD, targets_BT = example(2, 4, 8, vocab_size=30, padded=32, ignored=0)
    x_BTD[1, 2, 3] = np.nan
    assert np.isnan(found(x_BTD.astype(jnp.bfloat16), embedding_VD, targets_BT, 30)[0][0])


@pytest.mark.slow
@pytest.mark.parametrize("mesh", MESHES)
def test_look_up_takes_rows_and_adds_its_gradient_to_that_of_the_head(mesh):
    x_BTD, embedding_VD, targets_BT = example(8, 5, 16, vocab_size=65, padded=128)
    tokens_BT = np.maximum(targets_BT, 0)

    @jax.jit
    def both(embedding_VD):
        embedding_RVD = copies(embedding_VD)
        looked_up_BTD = look_up(embedding_RVD, tokens_BT, jnp.float32)
        return (looked_up_BTD * x_BTD).sum() + cross_entropy(x_BTD, embedding_RVD, targets_BT, 65).nats, looked_up_BTD

    with on_mesh(MESHES[mesh]):
        (_, looked_up_BTD), of_embedding_VD = jax.value_and_grad(both, has_aux=True)(embedding_VD)
    np.testing.assert_array_equal(looked_up_BTD, embedding_VD[tokens_BT])
    expected_VD = expected(x_BTD, embedding_VD, targets_BT, 65)[2]
    np.add.at(expected_VD, tokens_BT, x_BTD)
    np.testing.assert_allclose(of_embedding_VD, expected_VD, atol=1e-4)


def shapes(n_tokens, width, vocab_size):
    """Returns cross_entropy's arrays as shapes, in rows of 512 tokens."""
    rows = n_tokens // 512
    arrays = ((rows, 512, width), jnp.bfloat16), ((vocab_size, width), jnp.float32), ((rows, 512), jnp.int32)
    return [jax.ShapeDtypeStruct(*array) for array in arrays]


def compiled(n_tokens, width=64, vocab_size=4096, mesh=(1, 1, 1), gradients=True):
    def nats(*arrays):
        return cross_entropy(*arrays, vocab_size).nats

    with on_mesh(mesh):
        function = jax.value_and_grad(nats, argnums=(0, 1)) if gradients else nats
        return jax.jit(function).lower(*shapes(n_tokens, width, vocab_size)).compile()


@pytest.mark.slow
@pytest.mark.parametrize(("mesh", "devices"), [((1, 1, 1), 1), ((8, 1, 1), 8)])
def test_memory_does_not_grow_with_tokens_times_vocabulary(mesh, devices):
    few, many = (compiled(n * 1024 * devices, mesh=mesh).memory_analysis().temp_size_in_bytes for n in (2, 8))
    more_tokens, width, vocab_size = 6 * 1024, 64, 4096
    assert many - few <= 4 * 4 * more_tokens * width  # hidden states and their gradients, float32 at most
    assert many < 8 * 1024 * vocab_size * 4 / 2  # half of what all logits take


def flops(n_tokens, width, gradients):
    return compiled(n_tokens, width, gradients=gradients).cost_analysis()["flops"]


@pytest.mark.slow
def test_evaluation_takes_one_product_and_training_three():
    # In one chunk: the analysis counts a loop as one turn. What is not a product does not depend on the width.
    product = 2 * 1024 * 256 * 4096
    for gradients, products in ((False, 1), (True, 3)):
        found = flops(1024, 512, gradients) - flops(1024, 256, gradients)
        assert found == pytest.approx(products * product, rel=0.02)


@pytest.mark.slow
@pytest.mark.parametrize(("platform", "tokens"), [("cpu", 1024), ("tpu", 1024), ("gpu", 4096)])
def test_one_chunk_is_no_loop(platform, tokens, monkeypatch):
    monkeypatch.setattr(loss, "platform", lambda: platform)
    assert " while(" not in compiled(tokens, vocab_size=128).as_text()
    assert " while(" in compiled(2 * tokens, vocab_size=128).as_text()
