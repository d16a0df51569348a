import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from gpt2_flax.checkpoint.weights import model_from_weights, weights_of
from gpt2_flax.config.model import ModelConfig
from gpt2_flax.data.packing import IGNORE
from gpt2_flax.model.decoding import Cache, decoder_of
from gpt2_flax.model.gpt2 import GPT2
from gpt2_flax.model.loss import cross_entropy
from gpt2_flax.parallel.mesh import MeshSizes, make_mesh

CFG = ModelConfig(vocab_size=64, n_positions=16, n_layer=2, n_head=2, n_embd=16, dtype="float32")
TOKENS_BT = np.random.default_rng(0).integers(0, 64, (4, 16)).astype(np.int32)


run = jax.jit(lambda model, *arguments, **more: model(*arguments, **more))


@jax.jit
def gradient(model):
    return jax.grad(lambda m: cross_entropy(m.hidden(TOKENS_BT), m.wte.embedding[...][None], TOKENS_BT, 64).nats)(model)


@pytest.fixture(scope="module")
def model():
    return GPT2(CFG, rngs=nnx.Rngs(0))


def test_future_tokens_do_not_change_past_logits(model):
    changed_BT = TOKENS_BT.copy()
    changed_BT[:, 10:] = (changed_BT[:, 10:] + 1) % 64
    np.testing.assert_array_equal(run(model, TOKENS_BT)[:, :10], run(model, changed_BT)[:, :10])


def test_past_tokens_do_change_future_logits(model):
    changed_BT = TOKENS_BT.copy()
    changed_BT[:, 0] = (changed_BT[:, 0] + 1) % 64
    assert not np.allclose(run(model, TOKENS_BT)[:, -1], run(model, changed_BT)[:, -1])


@pytest.mark.slow
def test_loss_equals_float64_numpy(model):
    x_BTD = model.hidden(TOKENS_BT)
    targets_BT = np.where(np.arange(16) % 3 == 0, IGNORE, TOKENS_BT)
    sums = cross_entropy(x_BTD, model.wte.embedding[...][None], targets_BT, 64)
    logits_BTV = np.asarray(x_BTD, np.float64) @ np.asarray(model.wte.embedding[...], np.float64)[:64].T
    nats_BT = np.log(np.exp(logits_BTV).sum(-1)) - np.take_along_axis(logits_BTV, TOKENS_BT[..., None], -1)[..., 0]
    counted_BT = targets_BT != IGNORE
    np.testing.assert_allclose(sums.nats, nats_BT[counted_BT].sum(), rtol=1e-6)
    assert sums.targets == counted_BT.sum()
    assert sums.correct == (logits_BTV.argmax(-1) == TOKENS_BT)[counted_BT].sum()


@pytest.mark.slow
def test_documents_packed_in_a_row_get_the_logits_they_get_alone(model):
    segments_1T = np.array([[1] * 5 + [2] * 8 + [3] * 3])
    positions_1T = np.concatenate([np.arange(5), np.arange(8), np.arange(3)])[None]
    packed_TV = run(model, TOKENS_BT[:1], segments_1T, positions_1T)[0]
    for start, stop in ((0, 5), (5, 13), (13, 16)):
        alone_TV = run(model, TOKENS_BT[:1, start:stop])[0]
        np.testing.assert_allclose(packed_TV[start:stop], alone_TV, atol=1e-6)


@pytest.mark.slow
def test_dropout_is_off_without_a_key_and_reproducible_with_one():
    model = GPT2(CFG.model_copy(update={"attn_pdrop": 0.5}), rngs=nnx.Rngs(0))
    key = jax.random.key(3)
    plain, dropped = run(model, TOKENS_BT), run(model, TOKENS_BT, dropout_key=key)
    np.testing.assert_array_equal(dropped, run(model, TOKENS_BT, dropout_key=key))
    assert not np.allclose(plain, dropped)
    assert not np.allclose(dropped, run(model, TOKENS_BT, dropout_key=jax.random.key(4)))


@pytest.mark.slow
@pytest.mark.parametrize("rate", ["embd_pdrop", "attn_pdrop", "resid_pdrop"])
def test_each_dropout_keeps_the_mean_and_does_something(rate):
    model = GPT2(
        CFG.model_copy(update={"embd_pdrop": 0, "attn_pdrop": 0, "resid_pdrop": 0, rate: 0.2}), rngs=nnx.Rngs(0)
    )
    run = jax.jit(jax.vmap(lambda key: model.hidden(TOKENS_BT, dropout_key=key)))
    x_NBTD = run(jax.random.split(jax.random.key(0), 400))
    assert float(x_NBTD.std(0).mean()) > 0.01
    assert float(jnp.abs(x_NBTD.mean(0) - model.hidden(TOKENS_BT)).mean()) < 0.1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("remat", "layers"),
    [("none", "scanned"), ("selected", "scanned"), ("full", "scanned"), ("selected", "unrolled"), ("full", "unrolled")],
)
def test_how_layers_are_computed_changes_no_gradient(model, remat, layers):
    twin = model_from_weights(CFG.model_copy(update={"remat": remat, "layers": layers}), weights_of(model))
    for plain, rematted in zip(jax.tree.leaves(gradient(model)), jax.tree.leaves(gradient(twin)), strict=True):
        np.testing.assert_allclose(plain, rematted, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_bfloat16_follows_float32(model):
    half = model_from_weights(CFG.model_copy(update={"dtype": "bfloat16"}), weights_of(model))
    assert half.hidden(TOKENS_BT).dtype == jnp.bfloat16
    assert run(half, TOKENS_BT).dtype == jnp.float32
    np.testing.assert_allclose(run(half, TOKENS_BT), run(model, TOKENS_BT), atol=0.02)


@pytest.mark.slow
def test_padding_rows_of_the_vocabulary_are_zero_get_no_gradient_and_no_probability(model):
    assert model.wte.embedding[...].shape == (128, 16)
    assert not model.wte.embedding[...][64:].any()
    assert run(model, TOKENS_BT).shape[-1] == 64
    embedding_VD = gradient(model).wte.embedding[...]
    assert not embedding_VD[64:].any()
    assert embedding_VD[:64].any()


def test_weights_round_trip_exactly(model):
    weights = weights_of(model)
    again = weights_of(model_from_weights(CFG, weights))
    assert weights.keys() == again.keys()
    for path, array in weights.items():
        np.testing.assert_array_equal(array, again[path])


@pytest.mark.slow
@pytest.mark.parametrize("layers", ["apart", "as they lie"])
def test_decoding_with_a_cache_gives_the_logits_of_the_whole_sequence(model, layers):
    """Rows read padded prompts of 6 and 1 tokens, then two steps of 3 tokens; the second row takes back one token."""
    decoder = decoder_of(model)
    if layers == "as they lie":
        with jax.set_mesh(make_mesh(MeshSizes(), jax.devices()[:1])):
            decoder = decoder_of(model)
    decode = jax.jit(lambda tokens_BT, first_B, cache: decoder(tokens_BT, first_B, cache))
    whole_BTV = run(model, TOKENS_BT[:2])
    prompts_BT = np.array([TOKENS_BT[0, :6], [*TOKENS_BT[1, :1], 3, 3, 3, 3, 3]])
    x_BTD, cache = decode(prompts_BT, np.array([0, 0]), Cache.empty(CFG, 2, 16))
    logits_BTV = decoder.logits(x_BTD)
    np.testing.assert_allclose(logits_BTV[0], whole_BTV[0, :6], atol=1e-5)
    np.testing.assert_allclose(logits_BTV[1, 0], whole_BTV[1, 0], atol=1e-5)
    for first_B in ([6, 1], [9, 3]):
        tokens_BT = np.stack([TOKENS_BT[row, first : first + 3] for row, first in enumerate(first_B)])
        x_BTD, cache = decode(tokens_BT, np.array(first_B), cache)
        for row, first in enumerate(first_B):
            found_TV = decoder.logits(x_BTD)[row]
            np.testing.assert_allclose(found_TV, whole_BTV[row, first : first + 3], atol=1e-5)
