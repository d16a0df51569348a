"""Bytes that a training step sends between devices: parsed from compiled programs, and no more than needed.

Bytes are those that each device sends when every collective goes around a ring.
"""

import functools
import math
import re

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

from gpt2_flax.config.parse import parse_config
from gpt2_flax.data.packing import Batch
from gpt2_flax.parallel.mesh import MeshSizes, make_mesh
from gpt2_flax.parallel.rules import batch_sharding, path_of
from gpt2_flax.plan.collectives import Collective, collectives
from gpt2_flax.plan.topology import devices_for
from gpt2_flax.training.step import make_train_step, state_layout


def mesh_of(shape):
    sizes = dict(zip(("data", "fsdp", "tensor"), shape, strict=True))
    return make_mesh(MeshSizes(**sizes), jax.devices()[: math.prod(shape)])


def sent_by(function, in_specs, out_specs, *shapes, mesh=(2, 4, 1)):
    """Return the collectives of a function of local float32 arrays, given the global shapes."""
    on_devices = jax.shard_map(function, mesh=mesh_of(mesh), in_specs=in_specs, out_specs=out_specs, check_vma=False)
    arrays = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    return collectives(jax.jit(on_devices).lower(*arrays).compile().as_text())


LOCAL = 4 * 16 * 64  # bytes of a local (16, 64)


@pytest.mark.parametrize(
    ("axes", "n"), [("data", 2), ("fsdp", 4), (("data", "fsdp"), 8), (("fsdp", "tensor"), 4)], ids=str
)
def test_all_reduce_sends_all_but_one_slice_twice(axes, n):
    found = sent_by(lambda x: jax.lax.psum(x, axes), P(("data", "fsdp")), P(), (128, 64))
    assert found == {"all-reduce": Collective(1, 2 * (n - 1) * LOCAL // n)}


def test_all_gather_sends_all_but_one_slice():
    found = sent_by(functools.partial(jax.lax.all_gather, axis_name="fsdp", tiled=True), P("fsdp"), P(), (64, 64))
    assert found == {"all-gather": Collective(1, 3 * LOCAL)}


def test_reduce_scatter_sends_all_but_one_slice():
    found = sent_by(functools.partial(jax.lax.psum_scatter, axis_name="fsdp", tiled=True), P(), P("fsdp"), (64, 64))
    assert found == {"reduce-scatter": Collective(1, 3 * LOCAL)}


def test_all_to_all_sends_all_but_its_own_slice():
    swap = functools.partial(jax.lax.all_to_all, axis_name="fsdp", split_axis=1, concat_axis=0, tiled=True)
    found = sent_by(swap, P("fsdp"), P(None, "fsdp"), (64, 64))
    assert found == {"all-to-all": Collective(1, 3 * LOCAL // 4)}


def test_permute_sends_the_whole():
    shift = functools.partial(jax.lax.ppermute, axis_name="data", perm=[(0, 1), (1, 0)])
    assert sent_by(shift, P("data"), P("data"), (32, 64)) == {"collective-permute": Collective(1, LOCAL)}


def test_a_device_with_itself_sends_nothing():
    assert (
        sent_by(lambda x: jax.lax.psum(x, "tensor") + jax.lax.all_gather(x, "tensor", tiled=True), P(), P(), (16, 64))
        == {}
    )


def test_loops_count_as_often_as_they_run():
    def inner(x, _):
        return jax.lax.psum(x, "fsdp") / 4, None

    def outer(x, _):
        x, _ = jax.lax.scan(inner, x, length=5)
        return jax.lax.psum(x, "data") / 2, None

    found = sent_by(lambda x: jax.lax.scan(outer, x, length=3)[0], P(), P(), (16, 64))
    assert found == {"all-reduce": Collective(18, 15 * 2 * 3 * LOCAL // 4 + 3 * LOCAL)}


def test_collectives_in_a_branch_and_in_several_types_count():
    def some(x):
        small = jax.lax.psum((x.astype(jnp.int8), x + 1), "data")
        return jax.lax.cond(x[0, 0] > 0, lambda x: jax.lax.psum(x, "fsdp"), lambda x: x, x), small

    found = sent_by(some, P(), P(), (16, 64))
    assert found["all-reduce"].bytes_sent == 2 * 3 * LOCAL // 4 + LOCAL // 4 + LOCAL


@pytest.mark.parametrize(
    ("groups", "n"),
    [
        ("{{0,1,2},{3,4,5}}", 3),
        ("{}", 8),
        ("[2,4]<=[8]", 4),
        ("[4,2]<=[2,4]T(1,0)", 2),
        ("mesh['a'=2,'b'=4] {'b'}", 4),
        ("mesh['a'=2,'b'=4] {'a','b'}", 8),
        ("mesh['a'=2,'b'=4] {'a','b':(1)2}", 4),
        ("mesh['a'=4,'b'=2]([2,4]T(1,0)) {'a'}", 4),
    ],
)
def test_groups_are_read_in_every_way_they_are_written(groups, n):
    hlo = f"""HloModule step, num_partitions=8

ENTRY %main (x: f32[16]) -> f32[16] {{
  %x = f32[16]{{0}} parameter(0)
  ROOT %sum = f32[16]{{0}} all-reduce(%x), channel_id=1, replica_groups={groups}, to_apply=%add
}}
"""
    assert collectives(hlo) == {"all-reduce": Collective(1, 2 * (n - 1) * 64 // n)}


@pytest.mark.parametrize(
    ("start", "kind", "sent"),
    [
        ("(f32[4]{0}, f32[16]{0}) all-gather-start", "all-gather", 48),
        ("((f32[4]{0}, f32[8]{0}), (f32[16]{0}, f32[32]{0})) all-gather-start", "all-gather", 144),
        ("(f32[16]{0}, bf16[16]{0:T(256)(2,1)}) all-reduce-start", "all-reduce", 144),
        ("((f32[16]{0}), f32[4]{0}) reduce-scatter-start", "reduce-scatter", 48),
        ("((bf16[16]{0}), bf16[16]{0}, u32[]) all-to-all-start", "all-to-all", 24),
    ],
)
def test_the_result_of_a_collective_in_the_background_is_what_counts(start, kind, sent):
    done = f"{kind}-done"
    hlo = f"""HloModule step, num_partitions=4

ENTRY %main (x: f32[16]) -> f32[16] {{
  %start = {start}(%x), replica_groups=[1,4]<=[4]
  ROOT %done = f32[16]{{0}} {done}(%start)
}}
"""
    assert collectives(hlo) == {kind: Collective(1, sent)}


def test_loops_of_a_tpu_say_it_in_their_condition():
    hlo = """HloModule step, num_partitions=2

%condition (state: (f32[16], u32[])) -> pred[] {
  %end = u32[]{:T(128)} constant(8)
  %state = (f32[16]{0:T(1024)}, u32[]{:T(128)}) parameter(0)
  %counter = u32[]{:T(128)} get-tuple-element(%state), index=1
  ROOT %more = pred[]{:T(512)} compare(%counter, %end), direction=LT
}

%body (state.1: (f32[16], u32[])) -> (f32[16], u32[]) {
  %state.1 = (f32[16]{0:T(1024)}, u32[]{:T(128)}) parameter(0)
  %two = u32[]{:T(128)} constant(2)
  %counter.1 = u32[]{:T(128)} get-tuple-element(%state.1), index=1
  %x = f32[16]{0:T(1024)} get-tuple-element(%state.1), index=0
  %next = u32[]{:T(128)} add(%counter.1, %two)
  %there = f32[16]{0:T(1024)} collective-permute(%x), source_target_pairs={{0,1},{1,0}}
  ROOT %tuple = (f32[16]{0:T(1024)}, u32[]{:T(128)}) tuple(%there, /*index=1*/%next)
}

ENTRY %main (start: (f32[16], u32[])) -> (f32[16], u32[]) {
  %start = (f32[16]{0:T(1024)}, u32[]{:T(128)}) parameter(0)
  ROOT %loop = (f32[16]{0:T(1024)}, u32[]{:T(128)}) while(%start), condition=%condition, body=%body
}
"""
    assert collectives(hlo) == {"collective-permute": Collective(4, 4 * 64)}


# The training step of the base model.

ROWS, LENGTH, LAYERS, WIDTH = 16, 128, 12, 768
SPLIT = ("wte/embedding", "kernel", "c_attn/bias", "c_fc/bias")


@pytest.fixture(scope="module")
def step():
    """Compile the step for a mesh as a run does, once; return the program, and the bytes of parameters by path."""
    compiled = {}

    def compile_for(shape, rows=ROWS):
        if (shape, rows) not in compiled:
            compiled[shape, rows] = _compile(mesh_of(shape), rows)
        return compiled[shape, rows]

    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", False)
    yield compile_for
    jax.config.update("jax_disable_most_optimizations", before)


def _compile(mesh, rows, optimizer="adamw", **model):
    values = {
        "output": "run",
        "model": {"vocab_size": 21128, "dtype": "float32", "layers": "scanned"}
        | dict.fromkeys(("embd_pdrop", "attn_pdrop", "resid_pdrop"), 0.0)
        | model,
        "data": {"dataset": "dataset", "seq_length": LENGTH, "global_batch_size": rows},
        "optimizer": {"name": optimizer},
        "training": {"total_steps": 100},
    }
    config = parse_config(values, "test").with_vocab_size(values["model"]["vocab_size"])
    with jax.set_mesh(mesh):
        layout = state_layout(config, mesh)
        batch = jax.ShapeDtypeStruct((rows, LENGTH), jnp.int32, sharding=batch_sharding(mesh))
        program = make_train_step(config, layout, mesh).lower(layout, Batch(*[batch] * len(Batch._fields))).compile()
    sizes = {path_of(path): 4 * leaf.size for path, leaf in jax.tree_util.tree_leaves_with_path(layout.model)}
    return program, sizes


def sent(program):
    return {kind: found.bytes_sent for kind, found in collectives(program.as_text()).items()}


@pytest.mark.slow
def test_data_parallel_sums_every_gradient_once(step):
    program, sizes = step((8, 1, 1))
    # Every device has all gradients of its rows: one all-reduce of each; the token embedding has one for both uses.
    least = 2 * 7 / 8 * sum(sizes.values())
    found = sent(program)
    assert found.keys() == {"all-reduce"}
    assert found["all-reduce"] <= 1.1 * least


@pytest.mark.slow
def test_fsdp_gathers_every_parameter_for_each_use_and_sums_every_gradient_once(step):
    program, sizes = step((1, 8, 1))
    embedding = sizes["wte/embedding"]
    kernels = sum(size for path, size in sizes.items() if path.endswith("kernel"))
    whole = sum(sizes.values()) - embedding - kernels
    found = sent(program)
    # Kernels are gathered in the forward and again in the backward pass, for else each device kept all of them; the
    # embedding once, as it is needed from the beginning to the end of the forward pass.
    assert found["all-gather"] <= 1.1 * 7 / 8 * (2 * kernels + embedding)
    # The gradient of the embedding is scattered as it is summed. Those of kernels are, where the compiler makes one of
    # an all-reduce and a slice, as those for GPU and TPU do; that for CPU does not, and each stays an all-reduce.
    assert found["reduce-scatter"] <= 1.1 * 7 / 8 * embedding
    assert found["all-reduce"] <= 1.1 * 2 * 7 / 8 * (kernels + whole)
    assert found.keys() == {"all-gather", "reduce-scatter", "all-reduce"}  # no all-to-all: no activation moves


@pytest.mark.slow
def test_tensor_parallel_sums_activations_twice_a_layer_each_way(step):
    program, _ = step((1, 1, 4))
    activations = 4 * ROWS * LENGTH * WIDTH
    # A layer sums the results of two pairs of products going forward and what goes back out of them going backward;
    # the look-up has each row on one device, and every device has the gradient of the hidden states by its part of the
    # vocabulary.
    least = 2 * 3 / 4 * (4 * LAYERS + 2) * activations
    found = sent(program)
    assert found.keys() == {"all-reduce"}
    assert found["all-reduce"] <= 1.1 * least


@pytest.mark.slow
def test_all_three_together_send_no_more_than_their_parts(step):
    program, sizes = step((2, 2, 2))
    embedding = sizes["wte/embedding"]
    kernels = sum(size for path, size in sizes.items() if path.endswith("kernel"))
    whole = sum(sizes.values()) - embedding - kernels
    activations = 4 * ROWS // 4 * LENGTH * WIDTH
    found = sent(program)
    assert found["all-gather"] <= 1.1 * 1 / 2 * (2 * kernels + embedding) / 2
    assert found["reduce-scatter"] <= 1.1 * 1 / 2 * embedding / 2
    # The embedding's is scattered first, so that a quarter of it is left to sum over `data`.
    gradients = 2 * 3 / 4 * (kernels / 2 + whole) + 2 * 1 / 2 * embedding / 4
    assert found["all-reduce"] <= 1.1 * (gradients + 2 * 1 / 2 * (4 * LAYERS + 2) * activations)
    assert found.keys() == {"all-gather", "reduce-scatter", "all-reduce"}


@pytest.mark.slow
def test_work_of_a_device_does_not_grow_with_devices(step):
    alone, eight = (step(shape, rows)[0].cost_analysis()["flops"] for shape, rows in (((1, 1, 1), 2), ((8, 1, 1), 16)))
    assert eight == pytest.approx(alone, rel=0.05)


@functools.cache
def compiled_for_gpus(optimizer="adamw", **sizes):
    """Return the collectives of a bfloat16 step on eight GPUs, the text of the program, and the parameter sizes."""
    pytest.importorskip("jax_plugins.xla_cuda12")
    mesh = make_mesh(MeshSizes(**sizes), devices_for("h200:8"))
    program, sizes = _compile(mesh, ROWS, optimizer, dtype="bfloat16", attention="xla")
    return sent(program), program.as_text(), sizes


@pytest.mark.slow
def test_gpus_sum_gradients_in_float32_once():
    found, program, sizes = compiled_for_gpus(data=8)
    assert found.keys() == {"all-reduce"}
    assert found["all-reduce"] == pytest.approx(2 * 7 / 8 * sum(sizes.values()), rel=0.01)
    assert not re.search(r"bf16\S* all-reduce", program)


@pytest.mark.slow
def test_gpus_gather_kernels_in_bfloat16_and_scatter_sums_of_gradients_in_float32():
    found, _, sizes = compiled_for_gpus(fsdp=8)
    embedding = sizes["wte/embedding"]
    kernels = sum(size for path, size in sizes.items() if path.endswith("kernel"))
    whole = sum(sizes.values()) - embedding - kernels
    assert found["all-gather"] == pytest.approx(7 / 8 * (2 * kernels / 2 + embedding), rel=0.01)
    assert found["reduce-scatter"] == pytest.approx(7 / 8 * (kernels + embedding), rel=0.01)
    assert found["all-reduce"] == pytest.approx(2 * 7 / 8 * whole, rel=0.01)
    assert found.keys() == {"all-gather", "reduce-scatter", "all-reduce"}


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [{"data": 8}, {"fsdp": 8}], ids=str)
def test_gpus_exchange_momenta_and_updates_of_muon_once(sizes):
    adamw, _, parameters = compiled_for_gpus(**sizes)
    muon, _, _ = compiled_for_gpus("muon", **sizes)
    padded = 16 / LAYERS * sum(size for path, size in parameters.items() if path.endswith("kernel"))
    # Momenta are sent in float32, and updates in bfloat16. Copies of a kernel share the work, then gather the updates.
    data, fsdp = sizes.get("data", 1), sizes.get("fsdp", 1)
    exchanged = (1 + 1 / 2) * (fsdp - 1) / fsdp * padded / 8
    gathered = 1 / 2 * (data - 1) / data * padded / fsdp
    assert muon.get("all-to-all", 0) == pytest.approx(exchanged, rel=0.01)
    assert muon.get("all-gather", 0) - adamw.get("all-gather", 0) == pytest.approx(gathered, rel=0.01)
    for kind in ("all-reduce", "reduce-scatter"):
        assert muon.get(kind, 0) == pytest.approx(adamw.get(kind, 0), rel=0.01)
    assert muon.keys() - {"all-to-all", "all-gather"} == adamw.keys() - {"all-gather"}


@pytest.mark.slow
def test_eight_devices_share_the_work_of_muon(step):
    program, sizes = _compile(mesh_of((8, 1, 1)), ROWS, "muon")
    found = program.cost_analysis()["flops"] - step((8, 1, 1))[0].cost_analysis()["flops"]
    matrices = [(3, WIDTH), (1, WIDTH), (1, 4 * WIDTH), (1, 4 * WIDTH)]
    of_layer = sum(n * (4 * WIDTH**2 * longer + 2 * WIDTH**3) for n, longer in matrices)
    # Of 12 layers, each device has at most 2, and there are three polynomials.
    assert found == pytest.approx(2 * 3 * of_layer, rel=0.02)
    # A run on eight GPUs has at least 131,072 tokens a step. A token costs 6 FLOPs for each parameter.
    assert 5 * 2 * of_layer < 0.03 * 6 * sum(sizes.values()) / 4 * 131_072 / 8
