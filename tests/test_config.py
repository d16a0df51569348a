import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpt2_flax.config.file import load_config, load_stages
from gpt2_flax.config.parse import config_keys, dump_config, parse_config
from gpt2_flax.config.schema import Config
from gpt2_flax.errors import ExitCode, UserError

LEAST = {"output": "run", "data": {"dataset": "d"}, "training": {"total_steps": 10}}
KEYS = [
    "output",
    "init_from",
    "model.vocab_size",
    "model.n_positions",
    "model.n_layer",
    "model.n_head",
    "model.n_embd",
    "model.embd_pdrop",
    "model.attn_pdrop",
    "model.resid_pdrop",
    "model.layer_norm_epsilon",
    "model.initializer_range",
    "model.initializer",
    "model.tie_word_embeddings",
    "model.dtype",
    "model.attend_across_documents",
    "model.attention",
    "model.layers",
    "model.remat",
    "data.dataset",
    "data.seq_length",
    "data.packing",
    "data.prompt_separator",
    "data.global_batch_size",
    "data.verify",
    "optimizer.preset",
    "optimizer.name",
    "optimizer.learning_rate",
    "optimizer.schedule",
    "optimizer.warmup",
    "optimizer.decay",
    "optimizer.min_learning_rate_ratio",
    "optimizer.b1",
    "optimizer.b2",
    "optimizer.eps",
    "optimizer.weight_decay",
    "optimizer.decay_embeddings",
    "optimizer.max_grad_norm",
    "growth.until",
    "growth.n_layer",
    "growth.seq_length",
    "training.total_steps",
    "training.accumulation_steps",
    "training.seed",
    "training.deterministic",
    "training.log_every",
    "training.logging",
    "training.evaluate_every",
    "training.evaluation_batches",
    "training.save_every",
    "training.keep_checkpoints",
    "training.keep_best",
    "training.keep_every",
    "training.patience",
    "training.max_skipped_steps",
    "training.prompts",
    "training.sample_tokens",
    "mesh.data",
    "mesh.fsdp",
    "mesh.tensor",
]


def refused(values, text):
    with pytest.raises(UserError, match=text) as error:
        parse_config(values, "file.toml")
    assert error.value.exit_code == ExitCode.CONFIG
    assert "file.toml" in str(error.value)


def with_section(section, **values):
    return LEAST | {section: LEAST.get(section, {}) | values}


def test_the_list_of_keys_is_frozen_and_every_key_has_a_line_of_help():
    assert list(config_keys()) == KEYS
    assert all(len(field.description) > 15 for field in config_keys().values())


def test_the_published_stages_are_as_published():
    first, second = load_stages(Path("cluecorpussmall"))
    assert second.init_from == first.output
    assert (first.training.total_steps, second.training.total_steps) == (1_000_000, 250_000)
    assert (first.data.seq_length, second.data.seq_length) == (128, 1024)
    assert (first.data.global_batch_size, second.data.global_batch_size) == (64 * 8, 16 * 8)
    assert (first.optimizer.learning_rate, second.optimizer.learning_rate) == (1e-4, 5e-5)
    assert (first.warmup_steps, second.warmup_steps) == (100_000, 25_000)
    assert first.model == second.model
    assert (first.model.initializer, first.model.attn_pdrop) == ("uer", 0.1)
    for optimizer in (first.optimizer, second.optimizer):
        assert (optimizer.name, optimizer.schedule, optimizer.max_grad_norm) == ("adamw_uer", "linear", 0.0)


def test_muon_is_the_default_and_adamw_has_defaults_of_its_own():
    def optimizer(**keys):
        return parse_config(LEAST | {"optimizer": keys}, "test").optimizer

    muon, adamw = optimizer(), optimizer(name="adamw")
    assert (muon.learning_rate, muon.schedule, muon.warmup, muon.weight_decay) == (0.02, "linear", 0.05, 0.03)
    assert (adamw.learning_rate, adamw.schedule, adamw.warmup, adamw.weight_decay) == (6e-4, "cosine", 0.1, 0.1)
    assert optimizer(name="adamw", learning_rate=0.01, weight_decay=0.0) == adamw.model_copy(
        update={"learning_rate": 0.01, "weight_decay": 0.0}
    )
    for found in (muon, adamw):
        assert parse_config(LEAST | {"optimizer": found.model_dump()}, "again").optimizer == found


@pytest.mark.parametrize(
    ("values", "text"),
    [
        (with_section("optimizer", lerning_rate=1e-4), "unknown key optimizer.lerning_rate.*optimizer.learning_rate"),
        (with_section("optimizer", lr=1e-4), "unknown key optimizer.lr: .*did you mean optimizer.learning_rate"),
        (with_section("training", learning_rate=1.0), "did you mean optimizer.learning_rate"),
        (LEAST | {"modle": {}}, "unknown key modle: .*did you mean model"),
        ({"output": "run", "date": {}, "training": {"total_steps": 1}}, "unknown key date: .*did you mean data"),
        (with_section("model", quux=1), "unknown key model.quux.*gpt2-flax keys"),
        (with_section("training", seed=2**32), "training.seed.*less than"),
        (with_section("model", n_layer="12"), "bad value of model.n_layer.*integer, not '12'"),
        (with_section("model", n_layer=12.0), "bad value of model.n_layer"),
        (with_section("model", remat=1), "bad value of model.remat"),
        (with_section("model", dtype="float16"), "bad value of model.dtype.*'float32' or 'bfloat16'"),
        (with_section("optimizer", learning_rate="1e-4"), "bad value of optimizer.learning_rate"),
        (with_section("optimizer", learning_rate=float("nan")), "bad value of optimizer.learning_rate"),
        (with_section("optimizer", warmup=1.5), "optimizer.warmup 1.5 is neither"),
        (with_section("optimizer", decay=1.5), "optimizer.decay 1.5 is neither"),
        (with_section("optimizer", decay=0), "bad value of optimizer.decay"),
        (with_section("optimizer", preset="bert"), "bad value of optimizer.preset.*'default' or 'uer', not 'bert'"),
        (with_section("optimizer", preset=["uer"]), "bad value of optimizer.preset"),
        (with_section("optimizer", preset="uer", nam="muon"), "unknown key optimizer.nam: .*optimizer.name"),
        (with_section("optimizer", schedule="constant", min_learning_rate_ratio=0.1), "no meaning with.*constant"),
        (with_section("optimizer", schedule="inverse_sqrt", min_learning_rate_ratio=0.1), "0.1 has no meaning with"),
        (with_section("optimizer", schedule="inverse_sqrt", warmup=0), "inverse_sqrt needs an optimizer.warmup"),
        (with_section("optimizer", schedule="inverse_sqrt", warmup=0.01), "inverse_sqrt needs an optimizer.warmup"),
        (with_section("optimizer", schedule="wsd", warmup=5, decay=6), "are 5 and 6 steps, together more than.* 10"),
        (with_section("model", n_head=5), "model.n_embd 768 is not a multiple of model.n_head 5"),
        (with_section("data", dataset="d", seq_length=2000), "seq_length 2000 is above model.n_positions 1024"),
        (with_section("training", accumulation_steps=7), "not a multiple of training.accumulation_steps 7"),
        (with_section("mesh", data=0), "mesh.data must be"),
        *(
            (with_section("data", dataset=wrong), "bad value of data.dataset: file.toml; give a folder, or folders and")
            for wrong in (7, ["a"], {}, {"a": 0}, {"a": -1.5}, {"a": True}, {"a": "1"}, {"a": {"b": 1}}, {"a": 10**400})
        ),
        (with_section("data", dataset={"a": 1, "b": float("nan")}), "data.dataset.*weights above 0.*'b': nan"),
        (with_section("data", dataset={"a": float("inf")}), "data.dataset.*weights above 0"),
        (with_section("data", dataset={"a": 1e308, "b": 1e308, "c": 1.0}), "data.dataset.*less than a millionth"),
        (with_section("data", dataset={"a": 1, "b": 1_000_000}), "data.dataset.*less than a millionth"),
        ({"output": "run", "training": {"total_steps": 1}}, "missing key data"),
    ],
)
def test_a_wrong_config_is_refused_by_name(values, text):
    refused(values, text)


def test_overrides_are_applied_left_to_right_and_bare_words_are_strings(tmp_path):
    path = tmp_path / "c.toml"
    path.write_text('output = "a"\n[data]\ndataset = "d"\n[training]\ntotal_steps = 5\n')
    overrides = ["output=runs/two", "model.n_layer=3", "model.n_layer=4", "optimizer.learning_rate=5e-5", "mesh.fsdp=2"]
    config = load_config(path, overrides)
    assert (config.output, config.model.n_layer, config.mesh.fsdp) == ("runs/two", 4, 2)
    assert config.optimizer.learning_rate == 5e-5
    for wrong in ("n_layer", "=3", "model n_layer=3"):
        with pytest.raises(UserError, match="not an override") as error:
            load_config(path, [wrong])
        assert error.value.exit_code == ExitCode.USAGE
    with pytest.raises(UserError, match="not a section"):
        load_config(path, ["output.x=1"])


def test_datasets_are_a_folder_or_folders_and_weights(tmp_path):
    path = tmp_path / "c.toml"
    least = 'output = "a"\n[training]\ntotal_steps = 5\n[data]\n'
    path.write_text(least + 'dataset = "d"\n')
    assert load_config(path).data.datasets == {"d": 1.0}
    path.write_text(least + 'dataset = {"data/zh" = 3, "data/en" = 1.5}\n')
    assert load_config(path).data.datasets == {"data/zh": 3.0, "data/en": 1.5}
    config = load_config(path, ['data.dataset={"b" = 999_999, "a" = 1}'])
    assert list(config.data.datasets.items()) == [("b", 999_999.0), ("a", 1.0)]
    path.write_text(dump_config(config))
    assert list(load_config(path).data.datasets) == ["b", "a"]
    assert load_config(path, ["data.dataset=data/en"]).data.datasets == {"data/en": 1.0}
    with pytest.raises(UserError, match=r"not a TOML table.*data\.dataset=.data/zh=1") as error:
        load_config(path, ["data.dataset={data/zh=1}"])
    assert error.value.exit_code == ExitCode.USAGE


@pytest.fixture
def least(tmp_path):
    path = tmp_path / "c.toml"
    path.write_text('output = "r"\ndata.dataset = "d"\ntraining.total_steps = 10\n', encoding="utf-8")
    return path


@pytest.fixture
def home(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    return str(tmp_path)


def test_a_config_may_begin_with_a_byte_order_mark(least):
    before = load_config(least)
    least.write_bytes(b"\xef\xbb\xbf" + least.read_bytes())
    assert load_config(least) == before
    assert before.output == "r"


@pytest.mark.parametrize(("encoding", "line"), [("utf-16", 1), ("utf-16-be", 2), ("gb18030", 2)])
def test_a_config_in_another_encoding_is_one_clear_sentence(least, encoding, line):
    text = "\n# 模型\n" + least.read_text(encoding="utf-8")
    least.write_bytes(text.encode(encoding))
    with pytest.raises(UserError, match=rf"config is not UTF-8: .*c\.toml:{line}; save the file as UTF-8") as error:
        load_config(least)
    assert error.value.exit_code == ExitCode.CONFIG


@pytest.mark.parametrize("key", ["output", "init_from", "data.dataset"])
def test_paths_are_expanded_and_addresses_refused(least, home, key):
    for text, meant in (("~/x", f"{home}/x"), ("~", home), ("x/~", "x/~"), ("../x", "../x")):
        config = load_config(least, [f"{key}={text}"])
        assert (config.data.dataset if key == "data.dataset" else getattr(config, key)) == meant
    refused = [f"{scheme}://bucket/x" for scheme in ("s3", "gs", "hdfs", "file", "https")]
    for text in [*refused, "~nobody-of-this-name/x"]:
        with pytest.raises(UserError, match=rf"bad value of {key}: .*; {text} is (an address|in a home)") as error:
            load_config(least, [f"{key}={text}"])
        assert error.value.exit_code == ExitCode.CONFIG


def test_datasets_of_a_mixture_are_paths_too(least, home):
    both = load_config(least, ['data.dataset={"~/a" = 3, "b" = 1}'])
    assert both.data.datasets == {f"{home}/a": 3, "b": 1}
    assert list(both.data.datasets) == [f"{home}/a", "b"]
    for weights, what in (
        ('{"a" = 1, "s3://bucket/b" = 2}', "s3://bucket/b is an address"),
        ('{"a" = 1, "./a" = 2}', "name each folder once"),
        (f'{{"~/a" = 1, "{home}/a" = 2}}', "name each folder once"),
    ):
        with pytest.raises(UserError, match=f"bad value of data.dataset: .*{what}") as error:
            load_config(least, [f"data.dataset={weights}"])
        assert error.value.exit_code == ExitCode.CONFIG


def test_warmup_counts_steps_or_a_share_of_them():
    assert parse_config(with_section("optimizer", warmup=3), "").warmup_steps == 3
    assert parse_config(with_section("optimizer", warmup=0.2), "").warmup_steps == 2
    assert parse_config(with_section("optimizer", warmup=1), "").warmup_steps == 1
    assert parse_config(with_section("optimizer", warmup=1.0), "").warmup_steps == 10


def paths(**sizes):
    """Texts that are paths as they stand."""
    return st.text(**sizes).filter(lambda text: not text.startswith("~") and "://" not in text and "\0" not in text)


@pytest.mark.slow
@given(
    st.builds(
        dict,
        output=paths(min_size=1),
        model=st.fixed_dictionaries(
            {},
            optional={
                "vocab_size": st.integers(1, 10**6),
                "n_layer": st.integers(1, 99),
                "remat": st.sampled_from(["none", "selected", "full"]),
            },
        ),
        data=st.fixed_dictionaries(
            {
                "dataset": st.one_of(
                    paths(),
                    st.dictionaries(paths(), st.floats(1e-3, 100), min_size=1, max_size=9).filter(
                        lambda weights: len(set(map(os.path.abspath, weights))) == len(weights)
                    ),
                ),
                "seq_length": st.integers(1, 1024),
            }
        ),
        optimizer=st.fixed_dictionaries(
            {},
            optional={
                "preset": st.sampled_from(["default", "uer"]),
                "learning_rate": st.floats(1e-30, 1e30),
                "warmup": st.one_of(st.integers(0, 10**9), st.floats(0, 1)),
                "b1": st.floats(0, 0.999),
            },
        ),
        training=st.fixed_dictionaries({"total_steps": st.integers(1, 2**31 - 1), "seed": st.integers(0, 2**32 - 1)}),
    )
)
def test_a_dumped_config_is_read_back_equal(tmp_path_factory, values):
    config = Config.model_validate(values)
    path = tmp_path_factory.mktemp("config") / "config.toml"
    path.write_text(dump_config(config), encoding="utf-8")
    assert load_config(path) == config
