"""The layer norm and its gradients against torch in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gpt2_flax.model.layers import layer_norm

torch = pytest.importorskip("torch")


def draw(dtype, mean):
    random = np.random.default_rng(0)
    x_ND, d_out_ND = (random.normal(size=(64, 48)) for _ in range(2))
    arrays = x_ND * 3 + mean, random.normal(size=48), random.normal(size=48), d_out_ND
    return [jnp.asarray(array, of) for array, of in zip(arrays, (dtype, None, None, dtype), strict=True)]


def expected(x_ND, scale_D, bias_D, d_out_ND):
    x, scale, bias, d_out = (torch.tensor(np.asarray(array, np.float64)) for array in (x_ND, scale_D, bias_D, d_out_ND))
    inputs = [array.requires_grad_() for array in (x, scale, bias)]
    out = torch.nn.functional.layer_norm(x, (48,), scale, bias, 1e-5)
    return out.detach().numpy(), *(gradient.numpy() for gradient in torch.autograd.grad(out, inputs, d_out))


@pytest.mark.parametrize(
    ("dtype", "mean", "relative"), [(jnp.float32, 0, 2e-6), (jnp.float32, 100, 1e-4), (jnp.bfloat16, 0, 2**-8)]
)
def test_equals_torch(dtype, mean, relative):
    x_ND, scale_D, bias_D, d_out_ND = draw(dtype, mean)
    out, backward = jax.vjp(lambda *arrays: layer_norm(*arrays, 1e-5), x_ND, scale_D, bias_D)
    assert out.dtype == dtype
    for array, right in zip((out, *backward(d_out_ND)), expected(x_ND, scale_D, bias_D, d_out_ND), strict=True):
        assert np.abs(np.asarray(array, np.float64) - right).max() < relative * np.abs(right).max()


def test_the_gradients_of_scale_and_bias_are_float32():
    x_ND, scale_D, bias_D, d_out_ND = draw(jnp.bfloat16, 0)
    _, backward = jax.vjp(lambda *arrays: layer_norm(*arrays, 1e-5), x_ND, scale_D, bias_D)
    _, d_scale_D, d_bias_D = backward(d_out_ND)
    _, _, right_scale, right_bias = expected(x_ND, scale_D, bias_D, d_out_ND)
    np.testing.assert_allclose(d_scale_D, right_scale, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(d_bias_D, right_bias, rtol=1e-5, atol=1e-5)
