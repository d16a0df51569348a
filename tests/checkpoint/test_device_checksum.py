"""Checksums computed on devices: those of the definition, the same on any mesh, and nothing that changes is missed."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from gpt2_flax.checkpoint.device_checksum import checksums

SEEDS = (0x9E3779B1, 0x85EBCA77)


def finalized(x):
    """MurmurHash3's finalizer of a Python int, with the lowest bit set."""
    x &= 2**32 - 1
    x = (x ^ x >> 16) * 0x85EBCA6B % 2**32
    x = (x ^ x >> 13) * 0xC2B2AE35 % 2**32
    return (x ^ x >> 16) | 1


def reference(array):
    """Both sums in Python's integers, one element after the other."""
    bits = array.view({1: np.uint8, 2: np.uint16, 4: np.uint32}[array.dtype.itemsize])
    sums = [0, 0]
    for place in np.ndindex(array.shape):
        word = int(bits[place])
        for k, (part, seed) in enumerate(zip((word, word << 16 | word >> 16), SEEDS, strict=True)):
            for axis, index in enumerate(place):
                part *= finalized(index + seed * (2 * axis + 3))
            sums[k] += part
    return "".join(f"{total % 2**32:08x}" for total in sums)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "int32", "uint8", "bool"])
@pytest.mark.parametrize("shape", [(), (1,), (7,), (3, 5), (2, 3, 4, 5), (0, 3)])
def test_the_sums_are_those_of_the_definition(dtype, shape):
    values = np.random.default_rng(0).normal(size=shape) * 3
    array = np.asarray(jnp.asarray(values).astype(dtype))
    assert checksums({"x": array}) == {"x": reference(array)}


LAYOUTS = [
    ((8, 1), P("a")),
    ((4, 2), P(None, "a", "b")),
    ((2, 4), P(("a", "b"))),
    ((2, 4), P(None, None, "b")),
    ((1, 8), P()),
]


@pytest.mark.parametrize(("shape", "spec"), LAYOUTS)
def test_the_sums_are_the_same_on_any_mesh(shape, spec):
    mesh = jax.make_mesh(shape, ("a", "b"), axis_types=(AxisType.Auto,) * 2)
    host = np.random.default_rng(1).normal(size=(8, 16, 4)).astype(np.float32)
    placed = jax.device_put(host, NamedSharding(mesh, spec))
    assert checksums({"x": {"value": placed}}) == checksums({"x": host})


def test_no_flipped_bit_and_no_exchange_is_missed():
    rng, host = np.random.default_rng(2), np.random.default_rng(3).normal(size=(16, 12)).astype(np.float32)
    good = checksums({"x": host})["x"]
    for bit in range(32):
        bad = host.copy()
        bad.view(np.uint32)[tuple(rng.integers((16, 12)))] ^= np.uint32(1 << bit)
        changed = checksums({"x": bad})["x"]
        assert changed[:8] != good[:8]
        assert changed[8:] != good[8:]
    for _ in range(100):
        bad = host.copy().reshape(-1)
        i, j = rng.choice(bad.size, 2, replace=False)
        bad[i], bad[j] = bad[j], bad[i]
        assert checksums({"x": bad.reshape(host.shape)})["x"] != good
    assert checksums({"x": host[::-1]})["x"] != good
    assert checksums({"x": host[:, ::-1]})["x"] != good


def test_two_numbers_of_opposite_sign_do_not_change_places_unnoticed():
    """They differ in the top bit alone, which all odd weights shift out alike."""
    one, other = np.float32([1.0, -1.0, 3.0]), np.float32([-1.0, 1.0, 3.0])
    assert checksums({"x": one})["x"][:8] == checksums({"x": other})["x"][:8]
    assert checksums({"x": one}) != checksums({"x": other})
