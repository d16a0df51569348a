"""The configs of the package: what their heads say, and the names and forms in which a config may be given."""

import json
import re
import shutil
from pathlib import Path

import pytest
from support.failures import fails

from gpt2_flax import __main__ as cli
from gpt2_flax.config.file import load_config, load_stages
from gpt2_flax.config.named import named_configs
from gpt2_flax.config.parse import parse_config
from gpt2_flax.config.schema import GrowthConfig
from gpt2_flax.errors import ExitCode, UserError

FOLDER = Path(__file__).parents[1] / "configs"
NAMES = [path.stem for path in sorted(FOLDER.glob("*.toml"))]
SIZES = {"base": (12, 12, 768), "medium": (24, 16, 1024), "large": (36, 20, 1280), "xl": (48, 25, 1600)}
PEAK = 8 * 989e12 * 0.4  # FLOP/s of eight H100, by their data sheet, at an MFU of 40%
UNITS = {"million": 1e6, "billion": 1e9, "minutes": 60, "hours": 3600}
HEAD = re.compile(
    r"# .*, ([\d.]+) (million|billion) parameters, ([\d.]+) (million|billion) tokens, "
    r"(?:2 CPU cores: \d+ minutes|8 GPUs: ([\d.]+) (minutes|hours) \(H100, MFU 40%\))\."
)
PRODUCT = re.compile(r"([\d,]+) rows .*?x ([\d,]+) tokens x ([\d,]+) steps = ([\d.]+) (million|billion) tokens")


def flop(layers, width, positions, vocabulary=21128):
    """Operations for a token: six for each weight of a product, and the scores and sums of attention."""
    return 6 * (layers * 12 * width**2 + vocabulary * width) + 12 * layers * width * positions


def seconds(config):
    """The time of a run on eight H100 by the arithmetic of its config."""
    model, data, growth = config.model, config.data, config.growth
    positions, share = data.global_batch_size * data.seq_length * config.training.total_steps, growth.until
    small = flop(growth.n_layer or model.n_layer, model.n_embd, growth.seq_length or data.seq_length)
    return positions * (share * small + (1 - share) * flop(model.n_layer, model.n_embd, data.seq_length)) / PEAK


def number(text):
    return int(text.replace(",", ""))


def test_the_names_are_those_of_the_files():
    assert named_configs() == {path.stem: path for path in sorted(FOLDER.glob("*.toml"))}
    published = ["cluecorpussmall", "cluecorpussmall_fast", "cluecorpussmall_seq1024", "cluecorpussmall_seq128"]
    assert ["base", *published, "large", "medium", "quickstart", "xl"] == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_a_shipped_config_is_valid_and_its_head_is_true(name):
    text, stages = (FOLDER / f"{name}.toml").read_text(encoding="utf-8"), load_stages(Path(name))
    assert f"\n#   gpt2-flax train {name}" in text
    for stage in stages:
        assert parse_config(stage.model_dump(exclude_none=True), "again") == stage
    parameters, unit, tokens, of_tokens, time, of_time = HEAD.match(text).groups()
    vocabulary = 5000 if name == "quickstart" else 21128
    resolved = [stage.with_vocab_size(vocabulary) for stage in stages]
    assert float(parameters) * UNITS[unit] == pytest.approx(resolved[0].model.parameters, rel=0.01)
    products = PRODUCT.findall(text)
    assert len(products) == len(stages)
    for stage, (*sizes, total, of_total) in zip(stages, products, strict=True):
        rows, length, steps = map(number, sizes)
        assert (stage.data.global_batch_size, stage.data.seq_length, stage.training.total_steps) == (
            rows,
            length,
            steps,
        )
        assert float(total) * UNITS[of_total] == pytest.approx(rows * length * steps, rel=0.005)
    positions = sum(number(rows) * number(length) * number(steps) for rows, length, steps, *_ in products)
    assert float(tokens) * UNITS[of_tokens] == pytest.approx(positions, rel=0.005)
    if time:
        assert float(time) * UNITS[of_time] == pytest.approx(sum(map(seconds, stages)), rel=0.06)


@pytest.mark.parametrize("name", SIZES)
def test_a_size_of_gpt2_is_trained_on_20_tokens_for_each_parameter(name):
    config = load_config(Path(name)).with_vocab_size(21128)
    assert (config.model.n_layer, config.model.n_head, config.model.n_embd) == SIZES[name]
    per_step = config.data.global_batch_size * config.data.seq_length
    assert config.training.total_steps * per_step == pytest.approx(20 * config.model.parameters, rel=0.003)
    assert config.optimizer.model_fields_set == set()
    text = (FOLDER / f"{name}.toml").read_text(encoding="utf-8")
    assert f"With {config.training.total_steps * per_step / 4e9:.2g} billion tokens of text" in text
    (long,) = re.findall(r"98\.3 billion positions of the published recipe.*?: training\.total_steps=([\d_]+)", text)
    assert int(long) * per_step == 98_304_000_000
    whole = config.model_copy(update={"growth": GrowthConfig()})
    for saved, amount, unit in re.findall(r"\[growth\] # (\d+)% fewer FLOP; without .* takes ([\d.]+) (\w+)", text):
        assert int(saved) == round(100 * (1 - seconds(config) / seconds(whole)))
        assert float(amount) * UNITS[unit] == pytest.approx(seconds(whole), rel=0.05)


def test_the_fast_recipe_reads_an_eighth_of_the_positions_of_the_published_one():
    fast, (first, second) = load_config(Path("cluecorpussmall_fast")), load_stages(Path("cluecorpussmall"))

    def positions(config):
        return config.data.global_batch_size * config.data.seq_length * config.training.total_steps

    assert 8 * positions(fast) == positions(first) + positions(second)
    (times,) = re.findall(
        r"FLOP, ([\d.]+) times less", named_configs()["cluecorpussmall_fast"].read_text(encoding="utf-8")
    )
    assert (seconds(first) + seconds(second)) / seconds(fast) == pytest.approx(float(times), abs=0.05)
    sizes = ("n_positions", "n_layer", "n_head", "n_embd", "dtype")
    assert [getattr(fast.model, key) for key in sizes] == [getattr(first.model, key) for key in sizes]
    assert fast.data.dataset == first.data.dataset


# What a user may give


@pytest.fixture
def here(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_file_wins_over_a_name_and_a_folder_does_not(here):
    (here / "quickstart/run").mkdir(parents=True)  # as the config itself makes it
    assert load_config(Path("quickstart")).output == "quickstart/run"
    shutil.copy(FOLDER / "quickstart.toml", here / "base")
    assert load_config(Path("base")).output == "quickstart/run"
    with pytest.raises(UserError, match=r"config not found: x/base; .* base, .* or xl") as error:
        load_config(Path("x/base"))
    assert error.value.exit_code == ExitCode.NO_INPUT


def test_json_means_the_same_as_toml(here):
    values = {
        "output": "run",
        "data": {"dataset": {"a": 3, "b": 1.5}},
        "optimizer": {"learning_rate": 1e-3},
        "training": {"total_steps": 10, "prompts": ["很久"]},
    }
    stages = [{"output": "one"}, {"output": "two", "training": {"total_steps": 5}}]
    (here / "c.json").write_text(json.dumps(values | {"stages": stages}), encoding="utf-8-sig")
    first, second = load_stages(Path("c.json"), ["stages.1.model.n_layer=3"])
    assert first == parse_config(values | {"output": "one", "model": {"n_layer": 3}}, "test")
    training = values["training"] | {"total_steps": 5}
    assert second == parse_config(values | {"output": "two", "init_from": "one", "training": training}, "test")


@pytest.mark.parametrize(
    ("content", "why"),
    [
        ("", "Expecting value"),
        ("[]", "it is not an object"),
        ('{"output": 1, "output": 2}', "a key stands there twice"),
        ('{"a": ' * 3000, "nested too deeply"),
        ('{"a": ' * 100 + "1" + "}" * 100, "nested too deeply"),
        ('{"output": NaN}', "bad value of output"),
        ("output = 1", "Expecting value"),
    ],
)
def test_what_is_no_json_is_refused_in_a_sentence(here, content, why):
    (here / "c.json").write_text(content, encoding="utf-8")
    with pytest.raises(UserError, match=f"c.json.*{why}|{why}.*c.json") as error:
        load_config(Path("c.json"))
    assert error.value.exit_code == ExitCode.CONFIG


def test_overrides_alone_are_a_config():
    overrides = ["data.dataset=d", "output=r", "training.total_steps=10", 'training.prompts=["a//b"]']
    training = {"total_steps": 10, "prompts": ["a//b"]}
    expected = parse_config({"output": "r", "data": {"dataset": "d"}, "training": training}, "test")
    assert load_stages(None, overrides) == [expected]
    with pytest.raises(UserError, match="there is no stage 2: command line"):
        load_config(None, overrides, stage=2)


def test_commands_take_names_and_overrides_alone(here, dataset_folder, capsys):
    for command in ("train {}", "plan {} model.vocab_size=5000 --stage 2", "inspect --batch 1 --config {}"):
        code, words = (64, "there is no stage 2") if "--stage" in command else (66, "quickstart/dataset")
        fails(capsys, code, command.format("quickstart").split(), words)
    (here / "output=mine").touch()  # a file wins over an override, too
    fails(capsys, 78, ["plan", "output=mine"], "missing key output: output=mine")
    (here / "output=mine").unlink()
    small = ["model.n_layer=1", "model.n_head=1", "model.n_embd=8"]
    assert cli.exit_code(["plan", f"data.dataset={dataset_folder}", "output=r", "training.total_steps=9", *small]) == 0
    assert "73,728 tokens in 9 steps" in capsys.readouterr().out


def test_configs_and_init_print_what_there_is(capsys):
    assert cli.exit_code(["configs"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == NAMES
    assert all(HEAD.match(f"# {line.split(maxsplit=1)[1]}") for line in lines)
    assert cli.exit_code(["init", "medium"]) == 0
    assert capsys.readouterr().out == (FOLDER / "medium.toml").read_text(encoding="utf-8")
