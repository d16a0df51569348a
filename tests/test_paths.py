"""What a path means wherever one may be given: home folders, addresses, links."""

import inspect
import shutil
import typing
from pathlib import Path

import pytest
import typer
from conftest import changed

from gpt2_flax import __main__ as cli
from gpt2_flax.config import dump_config
from gpt2_flax.config_file import load_config
from gpt2_flax.data.dataset_info import read_info

COMMANDS = typer.main.get_command(cli.app).commands


def within(hint):
    """A type and all that it is made of."""
    yield hint
    for part in typing.get_args(hint):
        yield from within(part)


PATHS = [
    (name, parameter.name)
    for name, command in COMMANDS.items()
    for parameter in command.params
    if Path in within(typing.get_type_hints(inspect.unwrap(command.callback))[parameter.name])
]


def call(command, **given):
    """The command line of a command with values for some of its parameters and all that are required."""
    words = [command]
    for parameter in COMMANDS[command].params:
        if parameter.name in given or parameter.required:
            option = [] if parameter.param_type_name == "argument" else [max(parameter.opts, key=len)]
            words += [*option, given.get(parameter.name, "x")]
    return words


def test_the_list_is_of_all_commands_that_take_paths():
    assert {command for command, _ in PATHS} == COMMANDS.keys() - {"keys"}
    assert ("import-tokens", "validation") in PATHS


@pytest.mark.parametrize(("command", "parameter"), PATHS)
def test_an_address_is_no_path(capsys, monkeypatch, tmp_path, command, parameter):
    monkeypatch.chdir(tmp_path)
    for given, why in (("s3://bucket/x", "is an address"), ("~nobody-of-this-name/x", "is in a home folder")):
        assert cli._exit_code(call(command, **{parameter: given})) == 64
        out, err = capsys.readouterr()
        assert not out
        assert f"{given} {why}" in err
        assert len(err.splitlines()) == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("command", "parameter"), PATHS)
def test_home_folders_are_expanded(capsys, monkeypatch, tmp_path, command, parameter):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    seen = {}
    monkeypatch.setattr(COMMANDS[command], "callback", lambda **given: seen.update(given))
    assert COMMANDS[command].main(call(command, **{parameter: "~/x"})[1:], standalone_mode=False) in (0, None)
    assert seen[parameter] in (tmp_path / "home/x", [tmp_path / "home/x"])


def test_the_places_that_take_addresses_expand_home_folders_too(
    corpus, tokenizer_folder, capsys, monkeypatch, tmp_path
):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    shutil.copy(corpus, tmp_path / "corpus.txt")
    prepare = ["prepare", "~/corpus.txt", "--tokenizer", str(tokenizer_folder), "--validation-fraction", "0.1"]
    assert cli._exit_code([*prepare, "--output", "~/dataset"]) == 0
    assert (
        cli._exit_code(
            [*prepare[:1], "file://" + prepare[1].replace("~", str(tmp_path)), *prepare[2:]]
            + ["--output", f"file://{tmp_path}/remote"]
        )
        == 0
    )
    here, there = read_info(tmp_path / "dataset"), read_info(tmp_path / "remote")
    assert here.shards == there.shards
    assert here.sources == [str(tmp_path / "corpus.txt")]
    assert not (tmp_path / "~").exists()
    assert not (tmp_path / "file:").exists()
    out, _ = capsys.readouterr()
    assert str(tmp_path / "dataset") in out


def test_a_run_is_evaluated_exported_and_resumed_from_any_folder(config, dataset_folder, capsys, monkeypatch, tmp_path):
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.chdir(home)
    shutil.copytree(dataset_folder, home / "data")
    relative = {"output": "run", "data__dataset": "data", "training__total_steps": 2, "training__save_every": 2}
    Path("c.toml").write_text(dump_config(changed(config, **relative)), encoding="utf-8")
    assert cli._exit_code(["train", "c.toml"]) == 0
    written = load_config(home / "run/config.toml")
    assert (written.output, written.data.dataset) == (str(home / "run"), str(home / "data"))
    capsys.readouterr()
    assert cli._exit_code(["evaluate", "run"]) == 0
    figures = capsys.readouterr().out
    both = ["train", "c.toml", "output=two", "init_from=run", 'data.dataset={"data" = 1, "../home/./data/." = 2}']
    assert cli._exit_code(both) == 78
    assert "name each folder once" in capsys.readouterr().err
    assert cli._exit_code([*both[:-1], 'data.dataset={"data" = 1}']) == 0

    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    capsys.readouterr()
    assert cli._exit_code(["evaluate", "../home/run"]) == 0
    assert capsys.readouterr().out == figures
    assert cli._exit_code(["export", "../home/two", "exported"]) == 0
    card = Path("exported/README.md").read_text(encoding="utf-8")
    tokens = sum(shard.tokens for shard in read_info(dataset_folder).shards["train"])
    assert f"{tokens:,}" in card
    assert load_config(home / "two/config.toml").init_from == str(home / "run")
    # The config of a run names the run, wherever it is read.
    assert cli._exit_code(["train", "../home/run/config.toml"]) == 0
    assert "has all its 2 steps" in capsys.readouterr().out
    assert [path.name for path in elsewhere.iterdir()] == ["exported"]

    monkeypatch.chdir(home)
    resume = ["train", "c.toml", "training.total_steps=4", "--allow-change", "training.total_steps"]
    assert cli._exit_code(resume) == 0
    assert "resumed from step 2 of run" in capsys.readouterr().out
