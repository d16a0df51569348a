"""Attention in float64, and what tests of the kernels share."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType

from gpt2_flax.model.attention import causal_attention


def reference(q_BTHK, k_BTHK, v_BTHK, d_out_BTHK, segments_BT=None, keep_BHTT=None, rate=0.0):
    """Attention and its gradients in float64, a head of a row at a time: (out, d_q, d_k, d_v)."""
    q_BTHK, k_BTHK, v_BTHK, d_out_BTHK = (np.asarray(x, np.float64) for x in (q_BTHK, k_BTHK, v_BTHK, d_out_BTHK))
    results = tuple(np.zeros_like(q_BTHK) for _ in range(4))
    length, scale = q_BTHK.shape[1], 1 / np.sqrt(q_BTHK.shape[-1])
    for b, h in np.ndindex(q_BTHK.shape[0], q_BTHK.shape[2]):
        q, k, v, d_out = (x[b, :, h] for x in (q_BTHK, k_BTHK, v_BTHK, d_out_BTHK))
        seen = np.tril(np.ones((length, length), bool))
        if segments_BT is not None:
            seen &= np.equal.outer(segments_BT[b], segments_BT[b])
        weights = np.where(seen, np.exp(q @ k.T * scale), 0.0)
        weights /= weights.sum(1, keepdims=True)
        keep = 1.0 if keep_BHTT is None else np.asarray(keep_BHTT[b, h], np.float64) / (1 - rate)
        d_weights = d_out @ v.T * keep
        d_scores = weights * (d_weights - (weights * d_weights).sum(1, keepdims=True)) * scale
        ours = (weights * keep) @ v, d_scores @ k, d_scores.T @ q, (weights * keep).T @ d_out
        for result, value in zip(results, ours, strict=True):
            result[b, :, h] = value
    return results


def draw(batch, length, heads, size, dtype=jnp.float32, seed=0):
    """Queries, keys, values, a gradient of the result, and segments of several lengths, padding (0) last."""
    random = np.random.default_rng(seed)
    arrays = [jnp.asarray(random.normal(size=(batch, length, heads, size)), dtype) for _ in range(4)]
    starts_BT = random.random((batch, length)) < 4 / length
    segments_BT = (np.cumsum(starts_BT, 1) + 1).astype(np.int32)
    segments_BT[-1, length - length // 5 :] = 0
    return (*arrays, segments_BT)


def attend(kernel, q_BTHK, k_BTHK, v_BTHK, *arguments):
    return causal_attention(kernel, jnp.stack([q_BTHK, k_BTHK, v_BTHK], 2), *arguments)


def with_gradients(kernel, q, k, v, d_out, segments=None, rate=0.0, key=None):
    @jax.jit
    def run(q, k, v, d_out):
        out, backward = jax.vjp(lambda q, k, v: attend(kernel, q, k, v, segments, rate, key), q, k, v)
        return out, *backward(d_out)

    return run(q, k, v, d_out)


def assert_close(ours, expected, relative):
    """Each array differs by at most `relative` of the largest number in it."""
    for name, array, other in zip(("out", "d_q", "d_k", "d_v"), ours, expected, strict=True):
        off = np.abs(np.asarray(array, np.float64) - other).max() / np.abs(other).max()
        assert off < relative, f"{name} is off by {off:.1e}"


def mesh_2x2x2():
    return jax.make_mesh((2, 2, 2), ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)
