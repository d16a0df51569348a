import errno
import json
import os
import re
import shutil

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import nnx

from gpt2_flax.checkpoint.source import load_source, save_as_run
from gpt2_flax.checkpoint.step_meta import DamagedCheckpoint
from gpt2_flax.checkpoint.store import CheckpointStore
from gpt2_flax.checkpoint.weights import abstract_model, model_from_weights, weights_of
from gpt2_flax.config.model import ModelConfig
from gpt2_flax.errors import ExitCode, UserError
from gpt2_flax.model.gpt2 import GPT2

CFG = ModelConfig(vocab_size=50, n_positions=8, n_layer=1, n_head=2, n_embd=8, dtype="float32")
ON_ONE = jax.sharding.SingleDeviceSharding(jax.devices()[0])


def layout(config):
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=ON_ONE), abstract_model(config)
    )


@pytest.fixture(scope="module")
def models():
    return {step: GPT2(CFG, rngs=nnx.Rngs(step)) for step in (1, 2, 3, 4)}


@pytest.fixture
def folder(tmp_path, models):
    """Checkpoints 1 to 4, of which the newest three are kept."""
    with CheckpointStore(tmp_path / "checkpoints", keep=3) as store:
        for step, model in models.items():
            store.save(step, model, None, {"model": CFG.model_dump()})
            assert store.seal() == step
    return tmp_path / "checkpoints"


def equal(one, other):
    return jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), one, other))


def data_files(folder, step):
    """Files that hold numbers: orbax keeps what each process wrote, and what it made of that, and reads not all."""
    return [path for path in (folder / str(step) / "model").rglob("d/*") if path.is_file()]


def flip_a_bit(folder, step):
    for path in data_files(folder, step):
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 4
        path.write_bytes(content)


def newest(store, config=CFG):
    found = store.newest(lambda step: store.restore(step, model=layout(config))["model"])
    return found and found[0]


@pytest.mark.slow
def test_the_newest_are_kept_and_restored_exactly(folder, models):
    with CheckpointStore(folder) as store:
        assert store.steps() == [2, 3, 4]
        assert newest(store) == 4
        assert store.meta(3)["step"] == 3
        for step in store.steps():
            assert equal(store.restore(step, model=layout(CFG))["model"], models[step])


def test_a_flipped_bit_is_found_and_the_step_before_is_used(folder):
    told = []
    flip_a_bit(folder, 4)
    with CheckpointStore(folder, keep=3, tell=told.append) as store:
        assert newest(store) == 3
        assert store.steps() == [2, 3]
    moved = folder.parent / "damaged" / "4-0"
    assert len(told) == 1
    assert re.fullmatch(rf"warning: checkpoint 4 is damaged \(.+\), moved to {moved}; using 3", told[0])
    assert moved.is_dir()


def test_a_reader_leaves_a_damaged_step_where_it_is(folder):
    flip_a_bit(folder, 4)
    with CheckpointStore(folder, tell=lambda line: None) as store:
        assert newest(store) == 3
        assert store.steps() == [2, 3, 4]


def test_a_number_that_files_do_not_betray_is_found_by_its_checksum(folder, models):
    """Another model of the same shape in place of the one that was saved: every file of it is whole."""
    shutil.rmtree(folder / "4" / "model")
    shutil.copytree(folder / "3" / "model", folder / "4" / "model")
    with CheckpointStore(folder) as store, pytest.raises(DamagedCheckpoint, match=r"the checksum of model/.* differs"):
        store.restore(4, model=layout(CFG))


def test_a_step_under_the_name_of_another_is_found(folder):
    shutil.rmtree(folder / "4")
    (folder / "3").rename(folder / "4")
    with CheckpointStore(folder) as store, pytest.raises(DamagedCheckpoint, match="it is step 3"):
        store.meta(4)


@pytest.mark.parametrize("damage", ["missing", "truncated", "empty"])
def test_missing_and_truncated_files_are_found(folder, damage):
    for path in data_files(folder, 4):
        if damage == "missing":
            path.unlink()
        else:
            path.write_bytes(path.read_bytes()[:5] if damage == "truncated" else b"")
    with CheckpointStore(folder, tell=lambda line: None) as store:
        assert newest(store) == 3


METADATA = {
    "no JSON": lambda text: text[:-3],
    "another number": lambda text: text.replace('"n_embd": 8', '"n_embd": 9'),
    "another field": lambda text: text.replace('"sha256"', '"sha257"'),
    "another checksum": lambda text: re.sub(
        r'("sum": ")(.)', lambda found: found[1] + "01"[found[2] == "0"], text, count=1
    ),
    "an old checkpoint's": lambda text: json.dumps(json.loads(text)["content"]),
    "a list": lambda text: "[]",
    "nested": lambda text: "[" * 100_000,
}


@pytest.mark.parametrize("change", METADATA.values(), ids=METADATA)
def test_metadata_is_what_was_written(folder, change):
    path = folder / "4" / "meta" / "metadata"
    before = path.read_text()
    path.write_text(change(before))
    assert path.read_text() != before
    with CheckpointStore(folder, tell=lambda line: None) as store:
        assert newest(store) == 3


def test_metadata_that_is_no_file_is_not_waited_for(folder):
    path = folder / "4" / "meta" / "metadata"
    path.unlink()
    os.mkfifo(path)
    with CheckpointStore(folder, tell=lambda line: None) as store:
        assert newest(store) == 3


@pytest.mark.slow
def test_a_checkpoint_of_a_version_without_checksums_is_read(folder, models):
    (folder / "4" / "meta" / "metadata").write_text(json.dumps({"step": 4, "model": CFG.model_dump()}))
    with CheckpointStore(folder) as store:
        assert newest(store) == 4
        assert equal(store.restore(4, model=layout(CFG))["model"], models[4])
        with pytest.raises(UserError, match="differs from the configured model"):
            store.restore(4, model=layout(CFG.model_copy(update={"n_layer": 2})))


def test_when_all_are_damaged_nothing_is_started_anew_and_nothing_is_deleted(folder):
    for step in (2, 3, 4):
        flip_a_bit(folder, step)
    with CheckpointStore(folder, keep=3) as store, pytest.raises(UserError, match="no usable checkpoint") as error:
        newest(store)
    assert error.value.exit_code == ExitCode.IO
    assert sorted(path.name for path in folder.iterdir()) == ["2", "3", "4"]


@pytest.mark.parametrize(
    "error", [MemoryError(), PermissionError(errno.EACCES, "Permission denied"), OSError(24, "files")]
)
def test_what_is_wrong_with_the_machine_is_no_damage(folder, monkeypatch, error):
    def fails(*arguments, **keywords):
        raise error

    with CheckpointStore(folder, keep=3) as store:
        monkeypatch.setattr(ocp.StandardCheckpointHandler, "restore", fails)
        with pytest.raises(type(error)):
            newest(store)
        assert store.steps() == [2, 3, 4]


LOSSES = {1: 3.0, 2: 1.0, 3: 2.0, 4: 2.5, 5: None, 6: 2.5, 7: 9.0}


@pytest.mark.parametrize(
    ("keep", "expected"),
    [
        ((1, 0, 0), [7]),
        ((2, 1, 0), [2, 6, 7]),
        ((1, 3, 0), [2, 3, 4, 7]),  # of equals the older
        ((1, 0, 3), [3, 6, 7]),
        ((2, 1, 5), [2, 5, 6, 7]),
        ((9, 1, 0), [1, 2, 3, 4, 5, 6, 7]),
    ],
)
def test_the_newest_the_best_and_every_nth_are_kept(tmp_path, models, keep, expected):
    with CheckpointStore(tmp_path, *keep) as store:
        for step, loss in LOSSES.items():
            metrics = {} if loss is None else {"validation/loss": loss}
            store.save(step, models[1], None, {"model": CFG.model_dump(), "metrics": metrics})
            store.seal()
    assert store.steps() == expected
    assert sorted(int(path.name) for path in tmp_path.iterdir()) == expected


def test_no_step_is_deleted_for_one_that_cannot_be_read(folder, models):
    with CheckpointStore(folder, keep=1) as store:
        store.save(5, models[1], None, {"model": CFG.model_dump()})
        store._writer.wait_until_finished()
        (folder / "5" / "meta" / "metadata").write_text("{}")
        store.seal()
        assert store.steps() == [2, 3, 4, 5]


def test_what_a_kill_has_left_is_removed_by_the_next_run_only(folder):
    for name in ("5.orbax-checkpoint-tmp", "1.deleted"):
        (folder / name / "model").mkdir(parents=True)
    with CheckpointStore(folder) as store:
        assert store.steps() == [2, 3, 4]
    assert len(list(folder.iterdir())) == 5
    with CheckpointStore(folder, keep=3):
        assert sorted(path.name for path in folder.iterdir()) == ["2", "3", "4"]


def test_an_empty_step_folder_is_not_taken_for_a_checkpoint(folder):
    (folder / "9").mkdir()
    with CheckpointStore(folder, keep=3, tell=lambda line: None) as store:
        assert newest(store) == 4


def test_another_shape_is_refused_by_name_with_both_shapes(folder):
    wider = CFG.model_copy(update={"n_embd": 16})
    with CheckpointStore(folder) as store, pytest.raises(UserError) as error:
        store.restore(4, model=layout(wider))
    assert error.value.exit_code == ExitCode.CONFIG
    assert "h/attn/c_attn/bias (1, 3, 2, 4) float32 saved, (1, 3, 2, 8) float32 expected" in str(error.value)
    deeper = CFG.model_copy(update={"n_layer": 2})
    with CheckpointStore(folder) as store, pytest.raises(UserError, match="differs from the configured model"):
        store.restore(4, model=layout(deeper))


def test_a_missing_optimizer_state_is_named(folder):
    with CheckpointStore(folder) as store, pytest.raises(UserError, match="holds no opt_state"):
        store.restore(4, opt_state=layout(CFG))


@pytest.mark.slow
def test_a_model_saved_as_a_run_is_loaded_exactly(tmp_path, tokenizer_folder, folder, models):
    (folder.parent / "tokenizer").symlink_to(tokenizer_folder)
    source = load_source(folder.parent)
    assert source.step == 4
    save_as_run(source, tmp_path / "copy")
    for path in (tmp_path / "copy", tmp_path / "copy" / "checkpoints" / "0"):
        again = load_source(path)
        assert again.model == CFG
        for name, array in weights_of(models[4]).items():
            np.testing.assert_array_equal(again.weights[name], array)
    assert load_source(folder.parent, step=3).step == 3
    with pytest.raises(UserError, match=r"no checkpoint 1.*there are 2, 3, 4") as error:
        load_source(folder.parent, step=1)
    assert error.value.exit_code == ExitCode.NO_INPUT


@pytest.mark.slow
def test_an_average_is_the_mean_of_the_last_checkpoints(folder, models):
    run = folder.parent
    for place, steps, options in (
        (run, (2, 3, 4), {"average": 3}),
        (run, (2, 3), {"step": 3, "average": 2}),
        (folder / "4", (3, 4), {"average": 2}),
    ):
        source = load_source(place, **options)
        assert (source.averaged, source.step, source.metrics) == ([*steps], steps[-1], {})
        assert source.origin == f"{run} at step {steps[-1]}, the mean of {len(steps)} checkpoints"
        for name, array in source.weights.items():
            expected = np.mean([weights_of(models[step])[name].astype(np.float64) for step in steps], axis=0)
            np.testing.assert_allclose(array, expected, rtol=1e-6, atol=1e-7)
    assert load_source(run, average=1).averaged == ()
    with pytest.raises(UserError, match=r"only 3 of 4 checkpoints: 2, 3, 4: .*; give --average 3, or") as error:
        load_source(run, average=4)
    assert error.value.exit_code == ExitCode.NO_INPUT
    with pytest.raises(UserError, match=r"only 1 of 2 checkpoints: 2: .*; leave --average out, or"):
        load_source(run, step=2, average=2)
    shutil.rmtree(folder / "3" / "model")
    with pytest.raises(UserError, match=r"checkpoint 3 is damaged") as error:
        load_source(run, average=2)
    assert error.value.exit_code == ExitCode.IO


@pytest.mark.slow
def test_a_model_is_not_bound_to_the_kernel_it_was_trained_with(tmp_path, tokenizer_folder, models):
    trained = CFG.model_copy(update={"attention": "cudnn"})  # refused where there is no GPU
    (tmp_path / "tokenizer").symlink_to(tokenizer_folder)
    with CheckpointStore(tmp_path / "checkpoints", keep=1) as store:
        store.save(1, models[4], None, {"model": trained.model_dump()})
    assert load_source(tmp_path).model == CFG


def test_devices_save_slices_of_a_large_array_but_not_of_a_small_one(tmp_path, caplog):
    replicated = jax.NamedSharding(jax.make_mesh((8,), ("data",)), jax.P())
    large, small = (jax.device_put(np.arange(n, dtype=np.float32), replicated) for n in (2**21, 2**21 - 8))
    with CheckpointStore(tmp_path, keep=9) as store:
        for step, (array, n_slices) in enumerate([(large, 8), (small, 0)]):
            caplog.clear()
            with jax.log_compiles():
                store.save(step, {"x": array}, None, {})
            assert store.seal() == step
            assert sum("Compiling jit(slice)" in message for message in caplog.messages) == n_slices
            restored = store.restore(step, model={"x": jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=ON_ONE)})
            assert equal(restored["model"]["x"], array.addressable_data(0))


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_weights_that_are_not_finite_are_refused_by_name(tmp_path, models, value):
    weights = {name: array.copy() for name, array in weights_of(models[4]).items()}
    weights["h/mlp/c_fc/bias"][0, 3] = value
    with CheckpointStore(tmp_path / "checkpoints", keep=1) as store:
        store.save(7, model_from_weights(CFG, weights), None, {"model": CFG.model_dump()})
    with pytest.raises(UserError, match=r"1 of the 32 numbers of h/mlp/c_fc/bias are NaN or infinite") as error:
        load_source(tmp_path)
    assert (error.value.exit_code, error.value.where) == (ExitCode.DATA, str(tmp_path / "checkpoints" / "7"))


@pytest.mark.parametrize(("field", "value"), [("remat", False), ("n_layer", 0), ("surplus", 1)])
def test_a_model_of_another_version_is_refused_by_field(tmp_path, models, field, value):
    with CheckpointStore(tmp_path / "checkpoints", keep=1) as store:
        store.save(1, models[4], None, {"model": CFG.model_dump() | {field: value}})
    with pytest.raises(UserError, match=rf"bad value of {field}: .*, not {value}: .*another version") as error:
        load_source(tmp_path)
    assert error.value.exit_code == ExitCode.DATA
