"""The plan of a run: counts against known counts, and the real step compiled for absent devices."""

import contextlib
import dataclasses
import importlib.util
import math
import re
import subprocess
import sys
import types
from pathlib import Path

import jax
import pytest
import tomli_w
from support.configs import changed

from gpt2_flax import __main__ as cli
from gpt2_flax.config.file import load_config
from gpt2_flax.config.parse import parse_config
from gpt2_flax.data.mixture import Mixture
from gpt2_flax.errors import ExitCode, UserError
from gpt2_flax.model import loss
from gpt2_flax.parallel.devices import memory_bytes, peak_flops
from gpt2_flax.parallel.mesh import MeshSizes, make_mesh
from gpt2_flax.plan import ahead_of_time, topology
from gpt2_flax.plan.ahead_of_time import compile_step, memory_fraction, smallest_change
from gpt2_flax.plan.estimate import checkpoint_bytes, figures, memory, read_datasets
from gpt2_flax.plan.report import plan_lines
from gpt2_flax.plan.topology import devices_for
from gpt2_flax.plan.values import plan_values
from gpt2_flax.training.step import initial_state, state_layout

ROOT = Path(__file__).parents[2]
PUBLISHED = ROOT / "configs/cluecorpussmall.toml"
ONE = MeshSizes(data=1, fsdp=1, tensor=1)


def published(stage, *overrides):
    config = load_config(PUBLISHED, ["model.vocab_size=21128", *overrides], stage)
    assert config.model.vocab_size
    return config.with_vocab_size(config.model.vocab_size)


def no_note(doing):
    return contextlib.nullcontext()


def refused(exit_code, text, function, *arguments):
    with pytest.raises(UserError, match=text) as error:
        function(*arguments)
    assert error.value.exit_code == exit_code


# Counts


@pytest.mark.parametrize(
    ("layers", "heads", "width", "vocabulary", "parameters"),
    [
        (12, 12, 768, 50257, 124_439_808),  # the four models of Radford et al., as transformers counts them
        (24, 16, 1024, 50257, 354_823_168),
        (36, 20, 1280, 50257, 774_030_080),
        (48, 25, 1600, 50257, 1_557_611_200),
        (12, 12, 768, 21128, 102_068_736),  # uer/gpt2-chinese-cluecorpussmall
    ],
)
def test_parameters_are_those_of_the_published_models(layers, heads, width, vocabulary, parameters):
    sizes = {"n_layer": layers, "n_head": heads, "n_embd": width, "vocab_size": vocabulary}
    counts = figures(published(1, *(f"model.{key}={value}" for key, value in sizes.items())), None)
    assert counts.parameters == parameters
    assert counts.in_embeddings == (vocabulary + 1024) * width
    per_block = 4 * width + 3 * width * width + 3 * width + width * width + width + 8 * width * width + 5 * width
    assert counts.in_blocks == layers * per_block == parameters - counts.in_embeddings - 2 * width
    more = vocabulary * width
    sizes["tie_word_embeddings"] = "false"
    untied = figures(published(1, *(f"model.{key}={value}" for key, value in sizes.items())), None)
    assert (untied.parameters, untied.in_embeddings) == (counts.parameters + more, counts.in_embeddings + more)
    assert (untied.in_blocks, untied.flops_per_token) == (counts.in_blocks, counts.flops_per_token)


def test_tokens_and_arithmetic_of_the_published_schedule():
    first, second = (figures(published(stage), None) for stage in (1, 2))
    assert (first.tokens, second.tokens) == (65_536_000_000, 32_768_000_000)  # as the config file says
    assert second.flops == 32_768_000_000 * (6 * (12 * 12 * 768**2 + 21128 * 768) + 12 * 12 * 768 * 1024)
    assert first.flops_per_token < second.flops_per_token
    assert second.days(8 * 989e12, 0.4) == pytest.approx(second.flops / (8 * 989e12 * 0.4 * 24 * 3600))


@pytest.mark.slow
def test_a_checkpoint_is_as_large_as_the_state_it_holds(config):
    config, _ = read_datasets(config)
    mesh = make_mesh(ONE, jax.devices()[:1])
    state = initial_state(config, state_layout(config, mesh))
    assert checkpoint_bytes(config) == sum(leaf.nbytes for leaf in jax.tree.leaves((state.model, state.opt_state)))
    assert checkpoint_bytes(published(1)) == pytest.approx(12 * 102_068_736, rel=0.01)  # 120 rows pad the vocabulary


def test_epochs_are_rows_read_over_rows_of_the_dataset(config):
    config, mixture = read_datasets(config)
    (dataset,) = mixture.datasets.values()
    rows = math.ceil((dataset.train.n_tokens - 1) / config.data.seq_length)
    assert figures(config, mixture).epochs == {config.data.dataset: 6 * 16 / rows}


def test_epochs_of_a_mixture_count_by_weight(config, dataset_folder, tmp_path):
    other = tmp_path / "other"
    other.symlink_to(dataset_folder)
    mixed = changed(config, data__dataset={str(dataset_folder): 3, str(other): 1})
    mixed, mixture = read_datasets(mixed)
    first, second = figures(mixed, mixture).epochs.values()
    assert first == pytest.approx(3 * second)


# Memory


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [(8, 1, 1), (1, 8, 1), (2, 2, 2)])
def test_estimated_state_is_the_real_state_of_a_device(config, sizes):
    config, _ = read_datasets(config)
    sizes = MeshSizes(data=sizes[0], fsdp=sizes[1], tensor=sizes[2])
    mesh = make_mesh(sizes, jax.devices())
    state = initial_state(config, state_layout(config, mesh))

    def on_first(tree):
        return sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(tree))

    estimate = memory(config, sizes)
    assert estimate.parameters == estimate.gradients == on_first(state.model)
    assert estimate.optimizer == on_first(state.opt_state)


@pytest.mark.slow
def test_activations_shrink_with_remat_and_with_microbatches():
    kept = {remat: memory(published(2, f"model.remat={remat}"), ONE) for remat in ("none", "selected", "full")}
    assert kept["none"].activations > 2 * kept["selected"].activations > 4 * kept["full"].activations
    # The inputs of all blocks, rows x tokens x width x layers in bfloat16, and the arrays around the blocks.
    assert 1 < kept["full"].activations / (128 * 1024 * 768 * 12 * 2) < 2
    halved = memory(published(2, "training.accumulation_steps=2"), ONE)
    assert halved.activations == pytest.approx(kept["none"].activations / 2, rel=0.05)


@pytest.mark.slow
@pytest.mark.parametrize(("platform", "bytes_of_a_chunk"), [("cpu", 1024 * 4), ("gpu", 4096 * 2)])
def test_logits_are_counted_in_the_chunks_and_the_dtype_of_the_platform(platform, bytes_of_a_chunk, monkeypatch):
    monkeypatch.setattr(loss, "platform", lambda: platform)
    assert memory(published(2), ONE).loss == 2 * 21248 * bytes_of_a_chunk


def test_tensor_parallel_devices_keep_fewer_activations_each():
    whole, shared = (memory(published(2), MeshSizes(data=1, fsdp=1, tensor=tensor)) for tensor in (1, 2))
    assert whole.activations / 2 < shared.activations < whole.activations


def test_a_mesh_that_does_not_split_the_rows_evenly_is_refused():
    refused(ExitCode.CONFIG, "cannot be shared by 3", memory, published(1), MeshSizes(data=3, fsdp=1, tensor=1))


# Missing datasets


def test_a_missing_dataset_needs_the_size_of_the_vocabulary(config, tmp_path):
    missing = changed(config, data__dataset=str(tmp_path / "none"))
    refused(
        ExitCode.CONFIG, r"vocab_size is not known.*dataset not found.*model\.vocab_size=21128", read_datasets, missing
    )
    given, mixture = read_datasets(changed(missing, model__vocab_size=300))
    assert mixture is None
    assert figures(given, mixture).epochs is None


def test_the_vocabulary_of_a_dataset_comes_first(config):
    refused(ExitCode.CONFIG, "model.vocab_size is 300", read_datasets, changed(config, model__vocab_size=300))
    known, mixture = read_datasets(config)
    assert known.model.vocab_size == mixture.vocab_size == Mixture(config.data.datasets).vocab_size


def test_a_damaged_dataset_does_not_count_as_missing(config, tmp_path):
    (tmp_path / "dataset.json").write_text("{", encoding="utf-8")
    damaged = changed(config, data__dataset=str(tmp_path), model__vocab_size=300)
    refused(ExitCode.DATA, "damaged dataset", read_datasets, damaged)


# Topologies


@pytest.mark.parametrize(
    "name", ["", "v5e", "v5e:", "v5e:2", "v5e:2x", "v5e:0x4", "v5p:2x2", "v7:2x2", "h200:1x2x3", "cpu:2x2", "v5e:2x4\n"]
)
def test_an_unknown_topology_is_refused_with_those_that_are_known(name):
    refused(ExitCode.USAGE, "unknown topology.*v5e:2x4.*h200:8", devices_for, name)


@pytest.mark.parametrize("name", ["v5e:200x200", "h200:99999x8", "cpu:1000"])
def test_a_topology_larger_than_any_is_refused(name):
    refused(ExitCode.USAGE, "take at most", devices_for, name)


@pytest.mark.parametrize(("name", "extra"), [("v5e:2x4", "tpu"), ("h200:8", "cuda")])
def test_a_missing_compiler_is_named_with_what_installs_it(monkeypatch, name, extra):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    refused(ExitCode.USAGE, rf"not installed.*pip install 'gpt2_flax\[{extra}\]'", devices_for, name)


@pytest.mark.parametrize(
    ("installed", "cuda", "cudnn"),
    [((12,), "12.9.0", "9.10.0"), ((13,), "13.0.0", "9.12.0"), ((12, 13), "13.0.0", "9.12.0")],
)
def test_gpus_are_described_with_the_cuda_that_is_installed(monkeypatch, installed, cuda, cudnn):
    there = [f"jax_plugins.xla_cuda{number}" for number in installed]
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name if name in there else None)
    described = []
    monkeypatch.setattr(
        topology.topologies,
        "get_topology_desc",
        lambda **words: described.append(words["target_config"]) or types.SimpleNamespace(devices=[]),
    )
    devices_for("h200:8")
    assert re.findall(r'(?:runtime|toolkit|driver)_version: "(.*)"', described[0]) == [cuda] * 3
    assert re.findall(r'dnn_version: "(.*)"', described[0]) == [cudnn]
    assert "memory_bandwidth: 4800000000000\n" in described[0]


def test_without_a_topology_the_devices_are_of_this_machine():
    assert devices_for(None) == jax.devices()


# Compiled for CPU devices


@pytest.fixture(scope="module")
def small():
    """A run whose activations are much larger than its state."""
    values = {
        "output": "run",
        "model": {"vocab_size": 100, "n_positions": 64, "n_layer": 3, "n_head": 2, "n_embd": 32, "layers": "scanned"},
        "data": {"dataset": "none", "seq_length": 64, "global_batch_size": 128},
        "training": {"total_steps": 10},
    }
    return parse_config(values, "test").with_vocab_size(values["model"]["vocab_size"])


@pytest.fixture(scope="module")
def compiled(small):
    return compile_step(small, devices_for("cpu:2"))


@pytest.mark.slow
def test_the_compiled_step_has_the_state_and_the_batch(small, compiled):
    layout = state_layout(small, make_mesh(MeshSizes(data=2, fsdp=1, tensor=1), devices_for("cpu:2")))
    state = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(layout))
    assert compiled.arguments == state + 4 * 64 * 64 * 4  # tokens, targets, segments, positions of 64 rows
    assert compiled.temporaries > 0
    assert compiled.mesh == MeshSizes(data=2, fsdp=1, tensor=1)
    parameters = sum(leaf.size for leaf in jax.tree.leaves(layout.model))
    # On a ring of two, each device sends as many bytes as it has; a few gradients are bfloat16.
    assert 1 <= compiled.collectives["all-reduce"].bytes_sent / parameters <= 6


def with_memory(monkeypatch, size):
    monkeypatch.setattr(ahead_of_time, "memory_bytes", lambda device: size)


@pytest.mark.slow
def test_remat_is_tried_first(monkeypatch, small, compiled):
    with_memory(monkeypatch, compiled.total - 1)
    assert not dataclasses.replace(compiled, available=compiled.total - 1).fits
    tried = []

    def note(doing):
        tried.append(doing)
        return contextlib.nullcontext()

    change = smallest_change(small, devices_for("cpu:2"), False, note)
    assert change.keys == ("model.remat=selected",)
    assert tried == ["trying model.remat=selected"]
    assert change.compiled.total < compiled.total


@pytest.mark.slow
def test_microbatches_are_tried_when_remat_is_not_enough(monkeypatch, small, compiled):
    full = changed(small, model__remat="full")
    needed = compile_step(full, devices_for("cpu:2"))
    with_memory(monkeypatch, needed.total - 1)
    change = smallest_change(full, devices_for("cpu:2"), False, no_note)
    assert re.fullmatch(r"training\.accumulation_steps=\d+", *change.keys)
    assert change.compiled.fits


@pytest.mark.slow
def test_a_state_that_is_too_large_is_sharded_at_once(monkeypatch, small):
    large = changed(small, data__global_batch_size=2, data__seq_length=8, model__n_embd=128, mesh__fsdp=1)
    devices = devices_for("cpu:2")
    whole = ahead_of_time.state_and_gradients(large, devices)
    with_memory(monkeypatch, whole - 1)
    tried = []

    def note(doing):
        tried.append(doing)
        return contextlib.nullcontext()

    change = smallest_change(large, devices, False, note)
    assert tried == ["trying mesh.fsdp=2"]
    assert change.keys == ("mesh.fsdp=2",)
    assert change.compiled.mesh == MeshSizes(data=1, fsdp=2, tensor=1)


@pytest.mark.slow
def test_nothing_fits_into_nothing(monkeypatch, small):
    with_memory(monkeypatch, 1)
    assert smallest_change(small, devices_for("cpu:2"), False, no_note) is None


def test_the_compilers_out_of_memory_message_is_parsed():
    hbm = "RESOURCE_EXHAUSTED: the total memory required for HLO temporaries (30.63G) exceeds available HBM (15.75G)."
    assert ahead_of_time.bytes_refused(hbm, 10**9) == round(30.63 * 2**30)
    used = "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 17.50G of 15.75G hbm."
    assert ahead_of_time.bytes_refused(used, 2**30) == round(16.5 * 2**30)
    with pytest.raises(RuntimeError, match="INTERNAL"):
        ahead_of_time.bytes_refused("INTERNAL: no", 1)


# Compiled for absent devices


@pytest.mark.slow
def test_the_step_compiles_for_a_tpu(small):
    pytest.importorskip("libtpu")
    devices = devices_for("v5e:2x4")
    assert (len(devices), memory_bytes(devices[0])) == (8, 16e9)
    compiled = compile_step(small, devices)
    assert compiled.fits
    assert compiled.collectives["all-reduce"].bytes_sent > 0


@pytest.mark.multiprocess
def test_several_programs_can_compile_for_tpus_at_once(monkeypatch):
    pytest.importorskip("libtpu")
    devices_for("v5e:2x4")  # this process has loaded libtpu now
    code = "from gpt2_flax.plan.topology import devices_for; print(len(devices_for('v5e:2x4')))"
    monkeypatch.delenv("ALLOW_MULTIPLE_LIBTPU_LOAD", raising=False)
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert (other.stdout, other.stderr) == ("8\n", "")


@pytest.mark.parametrize("name", ["v4:2x2x2", "v5e:1x1", "v5p:2x2x1", "v6e:16x16"])
def test_tpus_are_known_by_name(name):
    pytest.importorskip("libtpu")
    devices = devices_for(name)
    assert len(devices) == math.prod(map(int, name.partition(":")[2].split("x")))
    assert memory_bytes(devices[0])
    assert peak_flops(devices[0].device_kind, "bfloat16")


def has_plugin(cuda):
    with contextlib.suppress(ModuleNotFoundError):
        return importlib.util.find_spec(f"jax_plugins.xla_cuda{cuda}") is not None
    return False


compiles_for_gpus = pytest.mark.skipif(not has_plugin(12) and not has_plugin(13), reason="no JAX for GPUs, of any CUDA")


@compiles_for_gpus
@pytest.mark.parametrize("name", ["a100-40gb:8", "a100:8", "h100:8", "h200:32x8"])
def test_descriptions_of_gpus_are_accepted(name):
    devices = devices_for(name)
    assert len(devices) == math.prod(map(int, name.partition(":")[2].split("x")))
    assert memory_bytes(devices[0])
    assert peak_flops(devices[0].device_kind, "bfloat16")


@pytest.mark.slow
@compiles_for_gpus
def test_the_step_compiles_for_a_gpu(small):
    devices = devices_for("h200:8")
    compiled = compile_step(small, devices)
    assert compiled.fits
    assert memory_fraction(devices, compiled) is None


@pytest.mark.slow
def test_a_missing_cudnn_is_named_with_what_installs_it(small):
    pytest.importorskip("jax_plugins.xla_cuda12")
    if importlib.util.find_spec("nvidia") and importlib.util.find_spec("nvidia.cudnn"):
        pytest.skip("cuDNN is installed")
    calls_it = changed(small, model__attention="cudnn", model__attn_pdrop=0.0, model__dtype="bfloat16")
    text = r"cuDNN, which is not installed.*pip install 'gpt2_flax\[cuda\]'"
    refused(ExitCode.USAGE, text, compile_step, calls_it, devices_for("h200:1"))


@pytest.mark.parametrize("gpu", topology.GPUS.values())
def test_every_gpu_is_in_the_table_of_devices(gpu):
    assert peak_flops(gpu.kind, "bfloat16")


# The command


@pytest.fixture
def run(capsys):
    def run(*arguments):
        with pytest.raises(SystemExit) as ended:
            cli.main(["plan", *map(str, arguments)])
        return (ended.value.code, *capsys.readouterr())

    return run


@pytest.mark.slow
def test_the_command_plans_each_stage(run):
    code, out, _ = run(PUBLISHED, "model.vocab_size=21128", "mesh.data=1", "mesh.fsdp=8")
    assert code == ExitCode.OK
    assert re.findall(r"^stage (\d) of 2: (\S+)$", out, re.M) == [
        ("1", "runs/cluecorpussmall_seq128"),
        ("2", "runs/cluecorpussmall_seq1024"),
    ]
    assert out.count("102,068,736") == 2
    assert "65,536,000,000 tokens in 1,000,000 steps" in out
    code, out, _ = run(PUBLISHED, "model.vocab_size=21128", "--stage", 2)
    assert code == ExitCode.OK
    assert "stage" not in out
    assert "65,536,000,000" not in out


@pytest.mark.slow
def test_the_command_compiles_and_reports_what_fits(run, config, tmp_path, monkeypatch):
    path = tmp_path / "config.toml"
    path.write_text(tomli_w.dumps(config.model_dump(exclude_none=True)), encoding="utf-8")
    code, out, _ = run(path, "--topology", "cpu:8")
    assert code == ExitCode.OK
    assert re.search(r"^memory a device +[\d.]+ [kM]B: [\d.]+ [kM]B state and batch", out, re.M)
    assert re.search(r"^attention +xla: ", out, re.M)
    assert re.search(r"^sent a step +all-reduce", out, re.M)
    assert "epochs" in out
    with_memory(monkeypatch, 1)
    code, out, _ = run(path, "--topology", "cpu:1")
    assert code == ExitCode.OK  # a plan that does not fit is no error
    assert re.search(r"^verdict +does not fit; nothing tried", out, re.M)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("keys", "mesh", "devices"),
    [
        (
            {"mesh__data": 1, "mesh__fsdp": 4, "mesh__tensor": 1},
            "data 1 x fsdp 4 x tensor 1",
            "4 x cpu, as the config's",
        ),
        ({"mesh__fsdp": 16}, "data 1 x fsdp 16 x tensor 1", "16 x cpu, as the config's"),
        ({"mesh__fsdp": 2}, "data 4 x fsdp 2 x tensor 1", "8 x cpu, those of this machine"),
    ],
)
def test_a_mesh_for_another_number_of_devices_is_planned_for_that(config, keys, mesh, devices):
    lines = "\n".join(plan_lines(changed(config, **keys), jax.devices(), 0.4))
    assert mesh in lines
    assert devices in lines


@pytest.mark.slow
def test_rows_that_no_mesh_splits_evenly_are_refused(config):
    odd = changed(config, data__global_batch_size=15, mesh__fsdp=8, mesh__tensor=1)
    refused(ExitCode.CONFIG, "cannot be shared by 8", lambda: list(plan_lines(odd, jax.devices(), 0.4)))


@pytest.mark.slow
def test_the_command_reports_the_time_if_the_peak_is_known():
    class Device:
        device_kind, platform = "NVIDIA H200", "gpu"

        def memory_stats(self):
            return None

    lines = list(plan_lines(published(2), [Device()] * 8, 0.4))
    assert lines[-1].split(None, 1) == ["time", "2h04m at 40% of 8 x 989T FLOP/s; the MFU is assumed, see --mfu"]
    values = plan_values(published(2), [Device()] * 8, 0.4)
    assert values["devices"] == {"kind": "NVIDIA H200", "count": 8, "peak_flops": 989e12}
    assert values["days"] == values["flops"] / (8 * 989e12 * 0.4) / 86400
    lines = list(plan_lines(published(2), [Device()], 0.2))
    assert lines[-1].startswith("time                    1.4 days at 20% of 1 x")


def test_the_command_refuses_what_it_does_not_know(run):
    code, _, error = run(PUBLISHED, "model.vocab_size=21128", "--topology", "abacus:5")
    assert (code, error.count("\n")) == (ExitCode.USAGE, 1)
    assert "abacus" in error
    assert run(PUBLISHED, "--stage", 1)[0] == ExitCode.CONFIG
    assert run(PUBLISHED, "--stage", 3)[0] == ExitCode.USAGE
    assert run(PUBLISHED, "--mfu", 2)[0] == ExitCode.USAGE
