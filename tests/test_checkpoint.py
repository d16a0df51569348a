import jax
import numpy as np
import pytest
from flax import nnx

from gpt2_flax.checkpoint.source import load_source, save_as_run
from gpt2_flax.checkpoint.store import CheckpointStore
from gpt2_flax.checkpoint.weights import abstract_model, model_from_weights, weights_of
from gpt2_flax.config import ModelConfig
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
            store.save(step, model, None, {"step": step, "model": CFG.model_dump()})
    return tmp_path / "checkpoints"


def equal(one, other):
    return jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), one, other))


def flip_a_bit(folder, step):
    path = max(
        (path for path in (folder / str(step) / "model").rglob("*") if path.is_file()), key=lambda p: p.stat().st_size
    )
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)
    return path.name


def test_the_newest_are_kept_sealed_and_restored_exactly(folder, models):
    with CheckpointStore(folder) as store:
        assert store.steps() == [2, 3, 4]
        assert sorted(path.name for path in (folder.parent / "sha256").iterdir()) == ["2.json", "3.json", "4.json"]
        assert store.newest_whole(print) == 4
        assert store.meta(3)["step"] == 3
        for step in store.steps():
            assert equal(store.restore(step, model=layout(CFG))["model"], models[step])


def test_a_flipped_bit_is_found_and_the_step_before_is_used(folder):
    name, told = flip_a_bit(folder, 4), []
    with CheckpointStore(folder, keep=3) as store:
        assert store.newest_whole(told.append) == 3
        assert store.steps() == [2, 3]
    assert len(told) == 1
    assert "checkpoint 4 is damaged" in told[0]
    assert name in told[0]
    assert len(list((folder.parent / "damaged").iterdir())) == 1


def test_processes_compare_what_they_have_found_before_anything_is_moved(folder):
    name, compared = flip_a_bit(folder, 4), []

    class Differ(Exception):
        pass

    def agree(facts):
        compared.append(facts)
        raise Differ

    with CheckpointStore(folder, keep=3) as store, pytest.raises(Differ):
        store.newest_whole(print, agree)
    (facts,) = compared
    ((what, found),) = facts.items()
    assert what == f"the newest whole checkpoint in {folder}"
    assert found.startswith("3 (4: file ")
    assert name in found
    assert sorted(path.name for path in folder.iterdir()) == ["2", "3", "4"]


@pytest.mark.parametrize("damage", ["missing", "truncated", "empty"])
def test_missing_and_truncated_files_are_found(folder, damage):
    path = next(path for path in sorted((folder / "4").rglob("*")) if path.is_file() and path.stat().st_size > 10)
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:5] if damage == "truncated" else b"")
    with CheckpointStore(folder) as store:
        assert path.name in store.damage(4)
        assert store.damage(3) is None


def test_when_all_are_damaged_nothing_is_started_anew_and_nothing_is_deleted(folder):
    for step in (2, 3, 4):
        flip_a_bit(folder, step)
    with CheckpointStore(folder, keep=3) as store, pytest.raises(UserError, match="no usable checkpoint") as error:
        store.newest_whole(lambda line: None)
    assert error.value.exit_code == ExitCode.IO
    assert sorted(path.name for path in folder.iterdir()) == ["2", "3", "4"]


def test_an_empty_step_folder_is_not_taken_for_a_checkpoint(folder):
    (folder / "9").mkdir()
    with CheckpointStore(folder, keep=3) as store:
        assert store.newest_whole(lambda line: None) == 4


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


def test_a_model_is_not_bound_to_the_kernel_it_was_trained_with(tmp_path, tokenizer_folder, models):
    trained = CFG.model_copy(update={"attention": "cudnn"})  # refused where there is no GPU
    (tmp_path / "tokenizer").symlink_to(tokenizer_folder)
    with CheckpointStore(tmp_path / "checkpoints", keep=1) as store:
        store.save(1, models[4], None, {"model": trained.model_dump()})
    assert load_source(tmp_path).model == CFG


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
