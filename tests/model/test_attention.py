import contextlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.attention_reference import assert_close, attend, draw, mesh_2x2x2, reference, with_gradients

from gpt2_flax.config.model import ModelConfig
from gpt2_flax.errors import UserError
from gpt2_flax.model import blockwise
from gpt2_flax.model.attention import saves_attention
from gpt2_flax.model.decoding import attention
from gpt2_flax.model.gpt2 import GPT2

CFG = ModelConfig(vocab_size=64, n_positions=2048, n_layer=2, n_head=2, n_embd=128, attn_pdrop=0.0)


def set_block(monkeypatch, size):
    monkeypatch.setattr(blockwise, "QUERY_BLOCK", size)
    jax.clear_caches()


@pytest.mark.slow
@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize(
    ("length", "heads", "size"), [(1, 1, 4), (7, 3, 4), (16, 2, 8), (33, 2, 12), (48, 4, 16), (50, 1, 8)]
)
def test_xla_equals_float64(monkeypatch, length, heads, size, documents):
    set_block(monkeypatch, 16)
    *arrays, segments = draw(2, length, heads, size)
    segments = segments if documents else None
    ours = with_gradients("xla", *arrays, segments)
    expected = reference(*arrays, segments)
    if length == 1:  # the gradient of the only score is zero
        for d_x in ours[1:3]:
            np.testing.assert_allclose(d_x, 0, atol=1e-6)
        ours, expected = (ours[0], ours[0], ours[0], ours[3]), (expected[0],) * 3 + expected[3:]
    assert_close(ours, expected, 2e-6)  # of float32: on a CPU without AVX-512, rounding reaches 1.6e-6


@pytest.mark.slow
@pytest.mark.parametrize("documents", [False, True])
def test_xla_in_bfloat16_is_as_exact_as_its_inputs(monkeypatch, documents):
    set_block(monkeypatch, 32)
    *arrays, segments = draw(2, 80, 2, 64, jnp.bfloat16)
    segments = segments if documents else None
    ours = with_gradients("xla", *arrays, segments)
    assert {x.dtype for x in ours} == {jnp.dtype(jnp.bfloat16)}
    assert_close(ours, reference(*arrays, segments), 2**-7)


@pytest.mark.slow
def test_block_size_changes_nothing_but_rounding(monkeypatch):
    *arrays, segments = draw(2, 40, 2, 8)
    results = []
    for size in (8, 13, 64):
        set_block(monkeypatch, size)
        results.append(with_gradients("xla", *arrays, segments))
    assert_close(results[1], results[0], 2e-6)
    assert_close(results[2], results[0], 2e-6)


@pytest.mark.slow
def test_large_scores_stay_finite():
    q, k, v, d_out, segments = draw(1, 20, 1, 8)
    for array in with_gradients("xla", q * 1e3, k * 1e3, v, d_out, segments):
        assert np.isfinite(array).all()


@pytest.mark.slow
def test_the_future_and_other_documents_are_not_seen(monkeypatch):
    set_block(monkeypatch, 8)
    q, k, v, _, _ = draw(1, 30, 2, 4)
    segments = np.repeat([[1, 2]], [12, 18], 1)
    d_out = jnp.zeros_like(q).at[:, 19].set(1.0)  # only position 19 is asked about
    _, _, d_k, d_v = with_gradients("xla", q, k, v, d_out, segments)
    for d_x in (d_k, d_v):
        assert d_x[:, 12:20].all()
        assert not d_x[:, :12].any()
        assert not d_x[:, 20:].any()


def test_attention_with_a_mask_equals_float64():
    q, k, v, d_out, segments = draw(3, 9, 2, 4)
    mask = np.tril(np.ones((9, 9), bool)) & (segments[:, :, None] == segments[:, None])
    found = attention(q, jnp.einsum("BSHK->BHKS", k), v.swapaxes(1, 2), mask)
    np.testing.assert_allclose(found, reference(q, k, v, d_out, segments)[0], rtol=1e-5, atol=1e-6)


# Dropout


def kept_BHTT(key, batch, heads, length, block, rate):
    """Which probabilities dropout keeps, read off the result: values are unit vectors, so it is the weights."""
    eye = jnp.broadcast_to(jnp.eye(length)[:, None], (batch, length, heads, length))
    out_BTHK = attend("xla", jnp.zeros_like(eye), jnp.zeros_like(eye), eye, None, rate, key)
    return np.asarray(out_BTHK).transpose(0, 2, 1, 3) > 0


@pytest.mark.slow
def test_dropout_drops_its_share_and_scales_the_rest(monkeypatch):
    set_block(monkeypatch, 16)
    kept = kept_BHTT(jax.random.key(0), 8, 4, 64, 16, 0.25)
    causal = np.tril(np.ones((64, 64), bool))
    assert abs(kept[..., causal].mean() - 0.75) < 0.005  # 66,560 draws: 3 standard deviations
    assert not kept[..., ~causal].any()
    shares_of_blocks = [kept[:, :, i : i + 16, :i].mean() for i in (16, 32, 48)]
    np.testing.assert_allclose(shares_of_blocks, 0.75, atol=0.03)
    # Blocks, heads and rows draw on their own.
    assert (kept[0, 0, 32, :32] != kept[0, 0, 48, :32]).mean() > 0.2
    assert (kept[:, 0, 32:, :32] != kept[:, 1, 32:, :32]).mean() > 0.3
    assert (kept[0, :, 32:, :32] != kept[1, :, 32:, :32]).mean() > 0.3


@pytest.mark.slow
@pytest.mark.parametrize("documents", [False, True])
def test_dropout_going_backward_is_that_of_going_forward(monkeypatch, documents):
    set_block(monkeypatch, 16)
    *arrays, segments = draw(2, 40, 2, 40)
    segments, key = segments if documents else None, jax.random.key(7)
    kept = kept_BHTT(key, 2, 2, 40, 16, 0.4)
    ours = with_gradients("xla", *arrays, segments, 0.4, key)
    assert_close(ours, reference(*arrays, segments, kept, 0.4), 2e-6)


@pytest.mark.slow
def test_dropout_is_decided_by_the_key(monkeypatch):
    set_block(monkeypatch, 16)
    q, k, v, _, _ = draw(1, 40, 2, 8)
    run = jax.jit(lambda key: attend("xla", q, k, v, None, 0.5, key))
    np.testing.assert_array_equal(run(jax.random.key(1)), run(jax.random.key(1)))
    assert not np.allclose(run(jax.random.key(1)), run(jax.random.key(2)))
    plain = attend("xla", q, k, v)
    np.testing.assert_array_equal(plain, attend("xla", q, k, v, None, 0.5, None))
    np.testing.assert_array_equal(plain, attend("xla", q, k, v, None, 0.0, jax.random.key(1)))


@pytest.mark.slow
def test_dropout_keeps_the_mean(monkeypatch):
    set_block(monkeypatch, 8)
    q, k, v, _, _ = draw(1, 20, 1, 4)
    run = jax.jit(jax.vmap(lambda key: attend("xla", q, k, v, None, 0.3, key)))
    outs = run(jax.random.split(jax.random.key(0), 4000))
    errors = np.abs(outs.mean(0) - attend("xla", q, k, v)) / (outs.std(0) / np.sqrt(4000) + 1e-7)
    assert errors.max() < 5  # standard errors


@pytest.fixture
def cudnn(monkeypatch):
    """Let jax lower cuDNN calls without a GPU: it asks the library only for its version."""
    monkeypatch.setattr("jax._src.cudnn.fused_attention_stablehlo.check_cudnn_version", lambda: 91800)


# Memory


@pytest.mark.slow
def test_xla_keeps_no_probabilities_for_the_backward_pass():
    batch, length, heads, size = 1, 1024, 4, 16
    shape = jax.ShapeDtypeStruct((batch, length, heads, size), jnp.float32)

    def bytes_of(layers):
        def loss(x_BTHK):
            for _ in range(layers):
                x_BTHK = attend("xla", x_BTHK, x_BTHK, x_BTHK)
            return (x_BTHK**2).sum()

        return jax.jit(jax.grad(loss)).lower(shape).compile().memory_analysis().temp_size_in_bytes

    # One float32 number for each of the half of the pairs that are seen would be 8 MiB a layer.
    assert (bytes_of(6) - bytes_of(2)) / 4 < 0.6 * (4 * batch * heads * length * length / 2)


@pytest.mark.slow
@pytest.mark.parametrize(("kernel", "run"), [("xla", r"= exp "), ("cudnn", "attention_fwd")])
def test_what_rematerialisation_keeps_is_not_computed_again(cudnn, kernel, run):
    x, segments = jnp.zeros((1, 128, 2, 8), jnp.bfloat16), jnp.zeros((1, 128), jnp.int32)

    def times(policy):
        layer = jax.checkpoint(lambda x: attend(kernel, x, x, x, segments), policy=policy)
        return len(re.findall(run, str(jax.make_jaxpr(jax.grad(lambda x: layer(x).astype(jnp.float32).sum()))(x))))

    assert times(saves_attention) == times(jax.checkpoint_policies.everything_saveable)
    assert times(saves_attention) < times(jax.checkpoint_policies.nothing_saveable)


# Splash attention, interpreted


@pytest.mark.slow
@pytest.mark.parametrize(("length", "documents"), [(128, False), (256, True), (384, True)])
def test_splash_equals_float64(interpreted, length, documents):
    *arrays, segments = draw(2, length, 2, 16)
    segments = segments if documents else None
    assert_close(with_gradients("splash", *arrays, segments), reference(*arrays, segments), 1e-5)


@pytest.mark.slow
def test_splash_in_bfloat16(interpreted):
    *arrays, segments = draw(1, 128, 2, 64, jnp.bfloat16)
    assert_close(with_gradients("splash", *arrays, segments), reference(*arrays, segments), 2**-6)


@pytest.mark.slow
@pytest.mark.parametrize("kernel", ["xla", "splash"])
def test_a_mesh_changes_nothing(interpreted, kernel):
    *arrays, segments = draw(4, 128, 2, 8)
    expected = reference(*arrays, segments)
    with jax.set_mesh(mesh_2x2x2()):
        place = jax.sharding.PartitionSpec(("data", "fsdp"), None, "tensor")
        ours = with_gradients(kernel, *(jax.device_put(x, place) for x in arrays), segments)
    assert_close(ours, expected, 1e-5)


# cuDNN: no GPU here, so only what the compiler is given


def lowered_for_gpu(function, *shapes):
    return jax.jit(function).trace(*shapes).lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.slow
@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("mesh", [False, True])
def test_cudnn_gets_its_own_calls(cudnn, documents, mesh):
    x, segments = jax.ShapeDtypeStruct((8, 128, 4, 64), jnp.bfloat16), jax.ShapeDtypeStruct((8, 128), jnp.int32)

    def loss(q, k, v, segments):
        return attend("cudnn", q, k, v, segments if documents else None).astype(jnp.float32).sum()

    with jax.set_mesh(mesh_2x2x2()) if mesh else contextlib.nullcontext():
        text = lowered_for_gpu(jax.grad(loss, (0, 1, 2)), x, x, x, segments)
    name = "fmhaScaleBiasSoftmax" if documents else "fmhaSoftmax"
    assert re.findall(r"@__cudnn\$(\w+)", text) == [name, f"{name}Backward"]
    assert "CAUSAL" in text
    if mesh:  # what a device runs is its own part, of 2 rows and 2 heads
        operands = re.search(r"@__cudnn\$\w+\(.*?\) .*?: \((.*?)\)", text).group(1)
        assert operands.startswith("tensor<2x128x2x64xbf16>")


@pytest.mark.slow
def test_layers_keep_no_mask_for_cudnn_each(cudnn):
    x, segments = jax.ShapeDtypeStruct((8, 128, 2, 64), jnp.bfloat16), jax.ShapeDtypeStruct((8, 128), jnp.int32)

    def loss(x, segments):
        x, _ = jax.lax.scan(lambda x, _: (attend("cudnn", x, x, x, segments), None), x, length=3)
        return x.astype(jnp.float32).sum()

    with jax.set_mesh(mesh_2x2x2()):
        text = lowered_for_gpu(jax.grad(loss), x, segments)
    assert len(re.findall(r"@__cudnn\$\w+Softmax\(", text)) == 1  # nor is the kernel run again
    assert "tensor<3x8x128x2x64xbf16>" in text
    assert not re.search(r"tensor<3x[0-9x]*128x128x", text)


# In the model


@pytest.mark.slow
def test_a_model_that_attends_across_documents_sees_the_same_with_and_without_segments():
    from flax import nnx

    cfg = CFG.model_copy(update={"n_embd": 16, "dtype": "float32", "attend_across_documents": True})
    model = GPT2(cfg, rngs=nnx.Rngs(0))
    tokens = np.random.default_rng(0).integers(0, 64, (2, 24)).astype(np.int32)
    segments = np.where(np.arange(24) < [[24], [15]], 1, 0).astype(np.int32)
    across, alone = model.hidden(tokens, segments), model.hidden(tokens[1:, :15])
    np.testing.assert_array_equal(across, model.hidden(tokens))
    np.testing.assert_allclose(across[1:, :15], alone, atol=1e-6)  # padding is not seen by what comes before it


@pytest.mark.slow
def test_a_kernel_that_cannot_be_is_refused_where_the_model_runs():
    from flax import nnx

    model = GPT2(CFG.model_copy(update={"n_embd": 16, "attention": "cudnn"}), rngs=nnx.Rngs(0))
    with pytest.raises(UserError, match="attention is cudnn but the device is a cpu"):
        model.hidden(np.zeros((1, 8), np.int32))
