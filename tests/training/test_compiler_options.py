"""The options that XLA compiles the step with: on GPUs gradients are sent while the backward pass computes."""

import jax
import pytest

from gpt2_flax.config.parse import parse_config
from gpt2_flax.parallel.auto_mesh import choose_mesh
from gpt2_flax.parallel.mesh import make_mesh
from gpt2_flax.plan.ahead_of_time import compile_step, lower_step
from gpt2_flax.plan.collectives import collectives
from gpt2_flax.plan.topology import devices_for
from gpt2_flax.training import step as train_step
from gpt2_flax.training.choices import choices
from gpt2_flax.training.compiler_options import compiler_options

SCHEDULER = "xla_gpu_enable_latency_hiding_scheduler"
PRODUCTS = {"xla_gpu_enable_triton_gemm": False}
SUMS = "xla_gpu_all_reduce_combine_threshold_bytes"


def config_of(**sections):
    """Four layers, three million parameters, plain attention: compiled for GPUs in seconds, and without cuDNN."""
    model = {"vocab_size": 512, "n_positions": 256, "n_layer": 4, "n_head": 4, "n_embd": 256, "attention": "xla"}
    values = {
        "output": "run",
        "model": model | {"layers": "unrolled"} | dict.fromkeys(("embd_pdrop", "attn_pdrop", "resid_pdrop"), 0.0),
        "data": {"dataset": "none", "seq_length": 256, "global_batch_size": 32},
        "optimizer": {"name": "adamw"},  # compiles in half of Muon's time
        "training": {"total_steps": 10},
        "mesh": {},
    }
    for section, keys in sections.items():
        values[section] |= keys
    return parse_config(values, "test").with_vocab_size(values["model"]["vocab_size"])


def mesh_of(config, devices):
    return make_mesh(choose_mesh(config, devices)[0], devices)


@pytest.fixture(scope="module")
def h200s():
    pytest.importorskip("jax_plugins.xla_cuda12")
    cached = jax.config.jax_enable_compilation_cache
    yield devices_for("h200:8")
    jax.config.update("jax_enable_compilation_cache", cached)


@pytest.fixture(autouse=True)
def no_flags(monkeypatch):
    jax.devices()  # simulated by a flag, and made once for all tests
    monkeypatch.setenv("XLA_FLAGS", "")


def sent(config, devices):
    """Returns the bytes that a device sends in a step, and what share of them during a matrix product."""
    mesh = mesh_of(config, devices)
    hlo = lower_step(config, mesh).compile().as_text()
    both = [sum(found.bytes_sent for found in collectives(hlo, only).values()) for only in (False, True)]
    return both[0], both[1] / both[0]


@pytest.mark.slow
def test_gradients_of_eight_gpus_are_sent_while_products_run(h200s, monkeypatch):
    config = config_of(optimizer={"name": "muon"})
    size, hidden = sent(config, h200s)
    monkeypatch.setattr(train_step, "compiler_options", lambda config, mesh: {})
    same_size, exposed = sent(config, h200s)
    assert size == same_size
    assert hidden > 0.6
    assert exposed < 0.2


@pytest.mark.slow
def test_parameters_shared_by_eight_gpus_are_gathered_while_products_run(h200s):
    config = config_of(mesh={"fsdp": 8}, model={"n_layer": 3}, optimizer={"name": "muon"})
    mesh = mesh_of(config, h200s)
    found = collectives(lower_step(config, mesh).compile().as_text(), overlapped=True)
    assert found["all-gather"].count >= 2
    assert found["reduce-scatter"].count >= 1


def test_thresholds_are_the_bytes_of_a_layer(h200s):
    config = config_of(mesh={"fsdp": 4})
    options = compiler_options(config, mesh_of(config, h200s))
    layer = 2 * (12 * 256**2 + 13 * 256)  # bytes in bfloat16
    assert layer <= options[SUMS] == options["xla_gpu_all_gather_combine_threshold_bytes"] < 1.01 * layer
    assert layer // 4 <= options["xla_gpu_reduce_scatter_combine_threshold_bytes"] < 1.01 * layer / 4
    assert options[SCHEDULER] is True
    assert compiler_options(config_of(), mesh_of(config_of(), h200s[:1])) == PRODUCTS


def test_cpus_get_no_options():
    config = config_of(training={"deterministic": True})
    assert compiler_options(config, mesh_of(config, jax.devices())) == {}
    assert list(choices(config, mesh_of(config, jax.devices()))) == ["attention", "layers"]


@pytest.mark.parametrize("in_file", [False, True])
def test_what_the_user_set_wins(h200s, monkeypatch, tmp_path, in_file):
    flags = f"--{SCHEDULER}=false --xla_dump_to=/tmp/x"
    if in_file:
        path = tmp_path / "flags"
        path.write_text(flags, encoding="utf-8")
    monkeypatch.setenv("XLA_FLAGS", str(path) if in_file else flags)
    options = compiler_options(config_of(), mesh_of(config_of(), h200s))
    assert SCHEDULER not in options
    assert SUMS in options


def test_options_that_the_compiler_dropped_are_left_out(h200s, monkeypatch):
    from gpt2_flax.training import compiler_options as module

    mesh = mesh_of(config_of(), h200s)
    assert module.is_known(SUMS, 1000, mesh)
    assert not module.is_known("xla_gpu_dropped_long_ago", True, mesh)
    monkeypatch.setattr(module, "is_known", lambda name, value, mesh: name != SCHEDULER)
    assert SCHEDULER not in compiler_options(config_of(), mesh)


@pytest.mark.slow
def test_determinism_is_asked_of_the_compiler_and_shown(h200s):
    config = config_of(training={"deterministic": True})
    mesh = mesh_of(config, h200s[:1])
    assert compiler_options(config, mesh) == PRODUCTS | {"xla_gpu_exclude_nondeterministic_ops": True}
    assert choices(config, mesh)["XLA options"].endswith("xla_gpu_exclude_nondeterministic_ops=true")
    assert "attention" in compile_step(config_of(model={"n_layer": 1}), h200s[:1]).choices


@pytest.mark.slow
@pytest.mark.parametrize(("remat", "times"), [("none", 1), ("selected", 1), ("full", 2)])
def test_flash_attention_is_run_again_only_where_nothing_is_saved(h200s, remat, times):
    model = {"n_layer": 2, "attention": "auto", "attn_pdrop": 0.1, "remat": remat}
    config = config_of(model=model, data={"global_batch_size": 2, "seq_length": 192})
    hlo = lower_step(config, mesh_of(config, h200s[:1])).compile().as_text()
    kernels = [line for line in hlo.splitlines() if "custom-call(" in line and "xla.gpu.triton" in line]
    count = {name: sum(f"/{name}/" in line for line in kernels) for name in ("flash_forward", "flash_d_query")}
    assert count == {"flash_forward": 2 * times, "flash_d_query": 2}
    assert "192,192]" not in hlo  # nothing has a number for each pair of tokens
