"""Several stages in one file: how they are read, and how they are trained one after the other."""

import itertools
import json
import signal

import numpy as np
import pytest
import tomli_w
from safetensors.numpy import load_file, save_file
from support.configs import changed
from support.weight_folders import write_folder

from gpt2_flax import __main__ as cli
from gpt2_flax.checkpoint.run_folder import RunFolder
from gpt2_flax.checkpoint.source import load_source
from gpt2_flax.checkpoint.store import CheckpointStore
from gpt2_flax.config.file import load_config, load_stages
from gpt2_flax.errors import ExitCode, UserError
from gpt2_flax.training import loop

FILE = """
init_from = "somewhere"

[model]
n_layer = 2

[data]
dataset = {a = 1, b = 2}
global_batch_size = 8

[training]
total_steps = 4

[[stages]]
output = "one"
data.seq_length = 16

[[stages]]
output = "two"
data = {seq_length = 32, dataset = {c = 3}}
training.total_steps = 5

[[stages]]
output = "three"
init_from = "one/checkpoints/2"
"""


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "stages.toml"
    path.write_text(FILE, encoding="utf-8")
    return path


def refused(exit_code, text, path, *overrides, load=load_stages, **options):
    with pytest.raises(UserError, match=text) as error:
        load(path, overrides, **options)
    assert error.value.exit_code == exit_code


# Reading


def test_a_stage_has_what_is_its_own_and_what_all_share(path):
    one, two, three = load_stages(path)
    assert [stage.model.n_layer for stage in (one, two, three)] == [2, 2, 2]
    assert [stage.data.seq_length for stage in (one, two, three)] == [16, 32, 128]
    assert [stage.data.global_batch_size for stage in (one, two, three)] == [8, 8, 8]
    assert [stage.data.datasets for stage in (one, two, three)] == [{"a": 1, "b": 2}, {"c": 3}, {"a": 1, "b": 2}]
    assert [stage.training.total_steps for stage in (one, two, three)] == [4, 5, 4]


def test_a_stage_starts_from_the_one_before_unless_it_says_otherwise(path):
    assert [stage.init_from for stage in load_stages(path)] == ["somewhere", "one", "one/checkpoints/2"]
    renamed = load_stages(path, ["stages.1.output=other", "stages.3.output=last"])
    assert [stage.init_from for stage in renamed] == ["somewhere", "other", "one/checkpoints/2"]


def test_a_file_without_stages_is_one_and_a_stage_can_be_named(path, tmp_path):
    single = tmp_path / "single.toml"
    single.write_text(tomli_w.dumps(load_stages(path)[1].model_dump(exclude_none=True)), encoding="utf-8")
    assert load_stages(single) == [load_config(single)] == [load_config(path, stage=2)]
    assert load_config(single, ["stages.1.output=x"], stage=1).output == "x"
    refused(ExitCode.USAGE, "config has 3 stages.*--stage, 1 to 3", path, load=load_config)
    refused(ExitCode.USAGE, "no stage 0.*take 1 to 3", path, load=load_config, stage=0)
    refused(ExitCode.USAGE, "no stage 2.*take 1 to 1", single, load=load_config, stage=2)


def test_an_override_holds_for_all_stages_or_for_the_one_it_names(path):
    steps = ["stages.2.training.total_steps=7", "training.total_steps=9", "stages.3.training.total_steps=8"]
    assert [stage.training.total_steps for stage in load_stages(path, steps)] == [9, 9, 8]
    assert [stage.training.seed for stage in load_stages(path, ["stages.1.training.seed=3"])] == [3, 0, 0]


@pytest.mark.parametrize(
    ("override", "exit_code", "text"),
    [
        ("optimizer.lr=1.0", 78, r"unknown key optimizer\.lr: .*stages\.toml, stage 1; did you mean optimizer\.learn"),
        ("stages.2.optimizer.lr=1.0", 78, r"unknown key optimizer\.lr: .*stages\.toml, stage 2"),
        ("stages.2.data.seq_length=2000", 78, r"seq_length 2000 is above .*stage 2"),
        ("stages.2.output=three", 78, "stages 2 and 3 have the same output 'three'"),
        ("stages.2.output=./sub/../three", 78, "stages 2 and 3 have the same output"),
        ("output=x", 64, r"output is each stage's own.*stages\.1\.output=x"),
        ("init_from=x", 64, r"init_from is each stage's own.*stages\.2\.init_from=x"),
        ("stages.0.output=x", 64, "no stage 0.*take 1 to 3"),
        ("stages.4.output=x", 64, "no stage 4.*take 1 to 3"),
        ("stages.1=x", 64, "not an override"),
        ("stages.1.output.x=1", 78, "not a section"),
        ("stages.x=1", 78, "unknown key stages"),
    ],
)
def test_a_wrong_override_is_refused_by_name(path, override, exit_code, text):
    refused(exit_code, text, path, override)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (('output = "two"\n', ""), "missing key output: .*stage 2"),
        (("[[stages]]", "[[stage]]"), "unknown key stage: .*did you mean stages"),
        (("training.total_steps = 5", "training.total_steps = 0"), "bad value of training.total_steps: .*stage 2"),
        (("training.total_steps = 5", "stages = []"), "unknown key stages: .*stage 2"),
        (("total_steps = 4", ""), "missing key training.total_steps: .*stage 1"),
        (("data = {seq", "data = 3 #"), "bad value of data: .*stage 2"),
        ((FILE, "stages = []"), "stages must be tables.*stages"),
        ((FILE, "stages = [1]"), "stages must be tables"),
        ((FILE, "[stages]\noutput = 'x'"), "stages must be tables"),
    ],
)
def test_a_wrong_stage_is_refused_by_name(path, change, text):
    assert change[0] in FILE
    path.write_text(FILE.replace(*change), encoding="utf-8")
    refused(ExitCode.CONFIG, text, path)


# Training


@pytest.fixture
def stages(config, tmp_path):
    """Two stages, the second with rows twice as long."""
    first = changed(config, output=str(tmp_path / "first"), training__total_steps=4)
    second = changed(
        config,
        output=str(tmp_path / "second"),
        init_from=first.output,
        data__seq_length=32,
        data__global_batch_size=8,
        training__total_steps=3,
    )
    return first, second


def losses(config):
    lines = [json.loads(line) for line in RunFolder(config.output).metrics.read_text().splitlines()]
    return {line["step"]: line["train/loss"].hex() for line in lines if "train/loss" in line}


def stop_at(monkeypatch, call):
    """The `call`th time that the loop asks, it has just been told to stop."""
    ask, calls = loop.StopRequest.__call__, itertools.count(1)

    def stopping(self, *ahead):
        if next(calls) == call:
            signal.raise_signal(signal.SIGTERM)
        return ask(self, *ahead)

    monkeypatch.setattr(loop.StopRequest, "__call__", stopping)


@pytest.mark.slow
def test_stages_in_one_call_are_the_same_as_one_call_each(stages, tmp_path):
    loop.train(*stages)
    first, second = (changed(stage, output=f"{stage.output}-alone") for stage in stages)
    loop.train(first)
    loop.train(changed(second, init_from=first.output))
    assert losses(first) == losses(stages[0])
    assert losses(second) == losses(stages[1])
    assert sorted(losses(second)) == [1, 2, 3]
    again = load_config(RunFolder(stages[1].output).config)
    assert (again.init_from, again.data.seq_length) == (stages[0].output, 32)


@pytest.mark.slow
def test_finished_stages_are_passed_over_with_one_line(stages, capsys):
    loop.train(stages[0])
    before = RunFolder(stages[0].output).metrics.read_bytes()
    capsys.readouterr()
    loop.train(*stages)
    lines = capsys.readouterr().out.splitlines()
    origin = f"{stages[0].output} at step 4: 16 parameter arrays, 27,968 parameters; fresh optimizer and schedule"
    assert lines[:2] == [
        f"stage 1 of 2: {stages[0].output} has all its 4 steps",
        f"stage 2 of 2: starting from {origin}",
    ]
    loop.train(*stages)
    assert capsys.readouterr().out.splitlines() == [
        f"stage 1 of 2: {stages[0].output} has all its 4 steps",
        f"stage 2 of 2: {stages[1].output} has all its 3 steps",
    ]
    assert RunFolder(stages[0].output).metrics.read_bytes() == before


# The loop asks after each of the 4 steps of the first stage and the one batch of its evaluation at step 3, between the
# two, and after each of the 3 steps of the second.
@pytest.mark.slow
@pytest.mark.parametrize(
    ("call", "where"),
    [
        (2, "stage 1 of 2: stopped at step 2, saved: .*first"),
        (4, "stage 1 of 2: stopped at step 3, saved: .*first"),
        (5, "stage 1 of 2: stopped at its end, saved: .*first"),
        (6, "stage 1 of 2: stopped at its end, saved: .*first"),
        (7, "stage 2 of 2: stopped at step 1, saved: .*second"),
    ],
)
def test_a_stop_in_any_stage_ends_with_75_and_the_next_call_goes_on(stages, monkeypatch, tmp_path, call, where):
    stop_at(monkeypatch, call)
    with pytest.raises(UserError, match=where) as stopped:
        loop.train(*stages)
    assert stopped.value.exit_code == ExitCode.TRY_AGAIN
    monkeypatch.undo()
    loop.train(*stages)
    whole = [changed(stage, output=f"{stage.output}-whole") for stage in stages]
    loop.train(whole[0], changed(whole[1], init_from=whole[0].output))
    assert [losses(stage) for stage in stages] == [losses(stage) for stage in whole]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("keys", "text"),
    [
        ({"data__global_batch_size": 12, "mesh__data": 8}, "stage 2 of 2: data.global_batch_size 12 cannot be shared"),
        ({"mesh__tensor": 3}, "stage 2 of 2: "),
        ({"data__dataset": "none"}, "stage 2 of 2: .*none"),
        ({"model__vocab_size": 7}, "stage 2 of 2: model.vocab_size is 7"),
        ({"model__n_positions": 64}, "stage 2 of 2: model.n_positions is 64 but 32 in init_from: .*first"),
        ({"model__n_layer": 1}, "stage 2 of 2: model.n_layer is 1 but 2 in init_from"),
        ({"output": __file__}, "stage 2 of 2: "),
    ],
)
def test_what_is_wrong_with_a_later_stage_is_said_before_the_first_begins(stages, keys, text):
    with pytest.raises(UserError, match=text):
        loop.train(stages[0], changed(stages[1], **keys))
    assert not RunFolder(stages[0].output).config.exists()


@pytest.mark.slow
def test_a_later_stage_takes_over_every_weight_and_row_of_positions(stages):
    # The first step of a warm-up has learning rate 0: what is saved after it is what was loaded.
    second = changed(stages[1], training__total_steps=1, optimizer__warmup=1)
    loop.train(stages[0], second)
    before, after = (load_source(RunFolder(stage.output).path).weights for stage in (stages[0], second))
    assert before.keys() == after.keys()
    for name, array in before.items():
        np.testing.assert_array_equal(array, after[name], err_msg=name)
    assert before["wpe/embedding"].shape[0] == 32
    assert len(np.unique(after["wpe/embedding"][16:])) > 16  # those that the first stage never saw


@pytest.mark.slow
def test_the_command_trains_the_stages_of_a_file(stages, tmp_path, capsys):
    first, second = (stage.model_dump(exclude_none=True) for stage in stages)
    common = {name: first.pop(name) for name in ("model", "optimizer")}
    del second["model"], second["optimizer"], second["init_from"]
    path = tmp_path / "stages.toml"
    path.write_text(tomli_w.dumps(common | {"stages": [first, second]}), encoding="utf-8")
    assert cli.exit_code(["train", str(path), "training.total_steps=2", "stages.2.training.total_steps=1"]) == 0
    assert [sorted(losses(stage)) for stage in stages] == [[1, 2], [1]]
    assert load_config(RunFolder(stages[1].output).config).init_from == stages[0].output
    capsys.readouterr()
    assert cli.exit_code(["train", str(path), "model.n_layr=3"]) == ExitCode.CONFIG
    assert "stage 1; did you mean model.n_layer" in capsys.readouterr().err


# What a run starts from

CHANGES = {
    "missing": (lambda arrays: arrays.pop("ln_f/bias"), r"ln_f[/.]bias"),
    "surplus": (lambda arrays: arrays.update({"h/extra": np.zeros(3, np.float32)}), "extra"),
    "another shape": (lambda arrays: arrays.update({"wpe/embedding": arrays["wpe/embedding"][:16]}), r"\(16, 32\)"),
}


@pytest.mark.slow
@pytest.mark.parametrize(("change", "text"), CHANGES.values(), ids=CHANGES)
@pytest.mark.parametrize("kind", ["run", "checkpoint", "folder"])
def test_weights_that_are_not_exactly_the_model_are_refused_by_name(stages, tmp_path, kind, change, text):
    loop.train(stages[0])
    source = load_source(RunFolder(stages[0].output).path)
    made = tmp_path / "made"
    if kind == "folder":
        write_folder(made, source.model)
        arrays = {
            name.removeprefix("transformer."): array for name, array in load_file(made / "model.safetensors").items()
        }
        ours = {"ln_f/bias": "ln_f.bias", "wpe/embedding": "wpe.weight", "h/extra": "h.extra"}
        by_path = {path: arrays.pop(name) for path, name in ours.items() if name in arrays}
        change(by_path)
        save_file(arrays | {ours[path]: array for path, array in by_path.items()}, made / "model.safetensors")
    else:
        padding = source.model.padded_vocab_size - source.model.vocab_size
        arrays = source.weights | {"wte/embedding": np.pad(source.weights["wte/embedding"], ((0, padding), (0, 0)))}
        change(arrays)
        nested = {}
        for path, array in arrays.items():
            *parents, name = path.split("/")
            place = nested
            for parent in parents:
                place = place.setdefault(parent, {})
            place[name] = array
        with CheckpointStore(RunFolder(made).checkpoints, keep=1) as store:
            store.save(0, nested, None, {"model": source.model.model_dump(), "step": 0})
        made = made / "checkpoints/0" if kind == "checkpoint" else made
    with pytest.raises(UserError, match=text) as refused:
        loop.train(changed(stages[1], init_from=str(made)))
    assert refused.value.exit_code in (ExitCode.DATA, ExitCode.CONFIG)
    assert not RunFolder(stages[1].output).config.exists()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["run", "checkpoint", "folder"])
def test_a_run_says_what_it_starts_from(stages, tmp_path, capsys, kind):
    loop.train(changed(stages[0], training__save_every=2))
    run = RunFolder(stages[0].output)
    made = {"run": run.path, "checkpoint": run.checkpoints / "2", "folder": tmp_path / "folder"}[kind]
    if kind == "folder":
        write_folder(made, load_source(run.path).model)
    capsys.readouterr()
    loop.train(changed(stages[1], init_from=str(made)))
    origin = {"run": f"{run.path} at step 4", "checkpoint": f"{run.path} at step 2"}.get(
        kind, f"transformers folder {made}"
    )
    said = f"starting from {origin}: 16 parameter arrays, 27,968 parameters; fresh optimizer and schedule"
    assert said in capsys.readouterr().out.splitlines()
