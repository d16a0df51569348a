"""The mesh for a config that leaves it open: as little communication as memory allows."""

from types import SimpleNamespace

import jax
import pytest
from support.configs import changed

from gpt2_flax.config.parse import parse_config
from gpt2_flax.parallel.auto_mesh import choose_mesh
from gpt2_flax.parallel.devices import memory_bytes
from gpt2_flax.parallel.mesh import MeshSizes, platform

BASE = {"vocab_size": 50257, "n_layer": 12, "n_head": 12, "n_embd": 768}
XLARGE = {"vocab_size": 50257, "n_layer": 48, "n_head": 25, "n_embd": 1600}


def devices(count, kind="NVIDIA H200", stats=None):
    return [SimpleNamespace(device_kind=kind, memory_stats=lambda: stats)] * count


def config_of(model, rows=64, **mesh):
    values = {"output": "run", "model": model, "data": {"dataset": "d", "global_batch_size": rows}}
    config = parse_config(values | {"training": {"total_steps": 1}, "mesh": mesh}, "test")
    return config.with_vocab_size(model["vocab_size"])


@pytest.mark.parametrize(
    ("model", "rows", "kind", "count", "mesh", "expected"),
    [
        (BASE, 64, "NVIDIA H200", 8, {}, (8, 1, 1)),  # 2 GB of 141: replicas
        (BASE, 64, "cpu", 8, {}, (8, 1, 1)),  # memory not known: replicas
        (XLARGE, 64, "NVIDIA H200", 8, {}, (8, 1, 1)),  # 25 GB of 141
        (XLARGE, 64, "NVIDIA A100-SXM4-40GB", 8, {}, (4, 2, 1)),  # 25 GB of 40: sharded over two
        (XLARGE, 512, "TPU v5 lite", 256, {}, (64, 4, 1)),  # 6.2 GB of 16
        (XLARGE, 16, "TPU v5 lite", 16, {}, (4, 4, 1)),
        (BASE, 4, "NVIDIA H200", 8, {}, (4, 1, 2)),  # more devices than rows
        (XLARGE, 64, "NVIDIA H200", 8, {"fsdp": 8}, (1, 8, 1)),  # sizes of the config stay
        (XLARGE, 64, "NVIDIA A100-SXM4-40GB", 8, {"data": 2}, (2, 4, 1)),
        (BASE, 64, "NVIDIA H200", 8, {"tensor": 4}, (2, 1, 4)),
        (BASE, 64, "NVIDIA H200", 1, {}, (1, 1, 1)),
    ],
)
def test_parameters_are_sharded_only_as_far_as_needed(model, rows, kind, count, mesh, expected):
    chosen, why = choose_mesh(config_of(model, rows, **mesh), devices(count, kind))
    assert (chosen.data, chosen.fsdp, chosen.tensor) == expected
    state = 16 * config_of(model).model.parameters / expected[1] / expected[2]
    assert f"take {state / 1e9:.2f} GB of each device" in why
    assert ("not known" in why) == (kind == "cpu")


def test_a_model_that_fits_nowhere_is_sharded_over_all_devices():
    huge = XLARGE | {"n_layer": 480, "n_embd": 12800, "n_head": 100}
    assert choose_mesh(config_of(huge), devices(8, "TPU v5 lite"))[0].fsdp == 8


def test_sizes_that_no_mesh_fits_are_left_for_make_mesh_to_reject():
    chosen, _ = choose_mesh(config_of(BASE, rows=7), devices(8))
    assert chosen == MeshSizes(data=-1, fsdp=1, tensor=1)


@pytest.mark.slow
def test_every_mesh_that_is_chosen_can_be_trained_on(config):
    from gpt2_flax.training.loop import train

    for rows in (16, 4, 2):
        train(changed(config, data__global_batch_size=rows, training__total_steps=1, output=f"{config.output}{rows}"))


@pytest.mark.parametrize("size", [0, -2])
def test_sizes_below_one_are_refused(config, size):
    from gpt2_flax.errors import UserError

    with pytest.raises(UserError, match=r"mesh.fsdp must be \"auto\", or from 1 to 1048576"):
        changed(config, mesh__fsdp=size)


def test_memory_is_what_the_device_says_or_the_table_has():
    assert memory_bytes(devices(1, "NVIDIA H200", {"bytes_limit": 5})[0]) == 5
    assert memory_bytes(devices(1, "NVIDIA H200")[0]) == 141e9
    assert memory_bytes(devices(1, "TPU v5 lite")[0]) == 16e9
    assert memory_bytes(devices(1, "a toaster")[0]) is None
    assert memory_bytes(jax.devices()[0]) is None


def test_the_platform_is_that_of_the_mesh_in_force(monkeypatch):
    assert platform() == "cpu"
    with jax.set_mesh(jax.make_mesh((8,), ("data",))):
        assert platform() == "cpu"
    monkeypatch.setattr(jax, "default_backend", lambda: "cuda")
    assert platform() == "gpu"


def test_parameters_are_counted_as_flax_makes_them():
    from flax import nnx

    from gpt2_flax.config.model import ModelConfig
    from gpt2_flax.model.gpt2 import GPT2

    cfg = ModelConfig(vocab_size=256, n_positions=10, n_layer=3, n_head=2, n_embd=8)
    model = jax.eval_shape(lambda: GPT2(cfg, rngs=nnx.Rngs(0)))
    assert cfg.parameters == sum(leaf.size for leaf in jax.tree.leaves(model))
    published = ModelConfig(vocab_size=21128)
    assert published.parameters == 102_068_736
