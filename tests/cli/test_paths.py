"""What a path means wherever one may be given: home folders, addresses, links."""

import errno
import inspect
import json
import os
import shutil
import subprocess
import sys
import typing
from pathlib import Path

import pytest
import typer
from support.configs import changed
from support.weight_folders import CONFIG, write_folder

from gpt2_flax import __main__ as cli
from gpt2_flax.checkpoint import run_folder
from gpt2_flax.cli import app
from gpt2_flax.config.file import load_config
from gpt2_flax.config.parse import dump_config
from gpt2_flax.data.dataset_info import read_info

COMMANDS = typer.main.get_command(app).commands


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
    assert {command for command, _ in PATHS} == COMMANDS.keys() - {"keys", "configs", "init", "doctor"}
    assert ("import-tokens", "validation") in PATHS


@pytest.fixture
def models_everywhere(monkeypatch):
    """A model is looked for before other parameters are read."""
    monkeypatch.setattr(run_folder, "check_model", lambda path: path)


@pytest.mark.usefixtures("models_everywhere")
@pytest.mark.parametrize(("command", "parameter"), PATHS)
def test_an_address_is_no_path(capsys, monkeypatch, tmp_path, command, parameter):
    monkeypatch.chdir(tmp_path)
    for given, why in (("s3://bucket/x", "is an address"), ("~nobody-of-this-name/x", "is in a home folder")):
        assert cli.exit_code(call(command, **{parameter: given})) == 64
        out, err = capsys.readouterr()
        assert not out
        assert f"{given} {why}" in err
        assert len(err.splitlines()) == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("models_everywhere")
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
    options = ["--tokenizer", str(tokenizer_folder), "--validation-fraction", "0.1"]
    assert cli.exit_code(["prepare", "~/corpus.txt", *options, "--output", "~/dataset"]) == 0
    assert (
        cli.exit_code(["prepare", f"file://{tmp_path}/corpus.txt", *options, "--output", f"file://{tmp_path}/r"]) == 0
    )
    here, there = read_info(tmp_path / "dataset"), read_info(tmp_path / "r")
    assert here.shards == there.shards
    assert here.sources == [str(tmp_path / "corpus.txt")]
    assert not (tmp_path / "~").exists()
    assert not (tmp_path / "file:").exists()
    out, _ = capsys.readouterr()
    assert str(tmp_path / "dataset") in out


@pytest.mark.slow
def test_a_run_is_evaluated_exported_and_resumed_from_any_folder(config, dataset_folder, capsys, monkeypatch, tmp_path):
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.chdir(home)
    shutil.copytree(dataset_folder, home / "data")
    relative = {"output": "run", "data__dataset": "data", "training__total_steps": 2, "training__save_every": 2}
    Path("c.toml").write_text(dump_config(changed(config, **relative)), encoding="utf-8")
    assert cli.exit_code(["train", "c.toml"]) == 0
    written = load_config(home / "run/config.toml")
    assert (written.output, written.data.dataset) == (str(home / "run"), str(home / "data"))
    capsys.readouterr()
    assert cli.exit_code(["evaluate", "run"]) == 0
    figures = capsys.readouterr().out
    both = ["train", "c.toml", "output=two", "init_from=run", 'data.dataset={"data" = 1, "../home/./data/." = 2}']
    assert cli.exit_code(both) == 78
    assert "name each folder once" in capsys.readouterr().err
    assert cli.exit_code([*both[:-1], 'data.dataset={"data" = 1}']) == 0

    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    capsys.readouterr()
    assert cli.exit_code(["evaluate", "../home/run"]) == 0
    assert capsys.readouterr().out == figures
    assert cli.exit_code(["export", "../home/two", "exported"]) == 0
    card = Path("exported/README.md").read_text(encoding="utf-8")
    tokens = sum(shard.tokens for shard in read_info(dataset_folder).shards["train"])
    assert f"{tokens:,}" in card
    assert load_config(home / "two/config.toml").init_from == str(home / "run")
    # The config of a run names the run, wherever it is read.
    assert cli.exit_code(["train", "../home/run/config.toml"]) == 0
    assert "has all its 2 steps" in capsys.readouterr().out
    assert [path.name for path in elsewhere.iterdir()] == ["exported"]

    monkeypatch.chdir(home)
    resume = ["train", "c.toml", "training.total_steps=4", "--allow-change", "training.total_steps"]
    assert cli.exit_code(resume) == 0
    assert "resumed from step 2 of run" in capsys.readouterr().out


# Links and mounts.

MAKERS = {
    "tokenizer": "tokenizer {corpus} --vocab-size 100 --output {output}",
    "prepare": "prepare {corpus} --tokenizer {tokenizer} --validation-fraction 0.1 --output {output}",
    "import-tokens": "import-tokens {dataset}/train/tokens-00000.bin --validation "
    "{dataset}/validation/tokens-00000.bin --tokenizer {tokenizer} --output {output}",
    "train": "train {config} output={output}",
    "import": "import {model} {output} --tokenizer {tokenizer}",
    "export": "export {run} {output}",
    "convert": "convert {run} {output} --format uer",
}


@pytest.fixture(scope="module")
def given(corpus, tokenizer_folder, dataset_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("given")
    n_tokens = read_info(dataset_folder).vocab_size
    model = write_folder(folder / "model", CONFIG.model_copy(update={"vocab_size": n_tokens, "n_positions": 32}))
    (folder / "run.toml").write_text(
        f"""
        output = "run"
        model = {{n_positions = 32, n_layer = 1, n_head = 2, n_embd = 16, dtype = "float32"}}
        data = {{dataset = "{dataset_folder}", seq_length = 16, global_batch_size = 8}}
        optimizer = {{name = "adamw"}}
        training = {{total_steps = 1, evaluation_batches = 1}}
        """,
        encoding="utf-8",
    )
    made = {"corpus": corpus, "tokenizer": tokenizer_folder, "dataset": dataset_folder, "model": model}
    made |= {"config": folder / "run.toml", "run": folder / "run"}
    assert cli.exit_code(MAKERS["import"].format(**made, output=made["run"]).split()) == 0
    return made


def make(command, given, output, *more):
    return cli.exit_code([*MAKERS[command].format(**given, output=output).split(), *more])


@pytest.mark.slow
@pytest.mark.parametrize("command", MAKERS)
def test_an_output_that_is_a_link_is_written_through(given, tmp_path, capsys, command):
    if command == "convert":
        pytest.importorskip("torch")
    disk, work = tmp_path / "disk", tmp_path / "work"
    (disk / "target").mkdir(parents=True)
    work.mkdir()
    (work / "parent").symlink_to(disk, target_is_directory=True)
    (work / "link").symlink_to("parent/target")
    (work / "out").symlink_to("link")
    assert make(command, given, work / "out") == 0, capsys.readouterr().err
    assert [path.name for path in disk.iterdir()] == ["target"]
    assert {path.name: str(path.readlink()) for path in work.iterdir()} == {
        "parent": str(disk),
        "link": "parent/target",
        "out": "link",
    }
    names = {path.name for path in (disk / "target").iterdir()}
    assert names
    if command != "train":
        (disk / "target/old").touch()
        assert make(command, given, work / "out") == 73
        assert make(command, given, work / "out", "--overwrite") == 0, capsys.readouterr().err
        assert {path.name for path in (disk / "target").iterdir()} == names
    assert (work / "out").is_symlink()
    assert make(command, given, work / "parent/new") == 0, capsys.readouterr().err
    assert {path.name for path in (disk / "new").iterdir()} == names
    assert sorted(path.name for path in disk.iterdir()) == ["new", "target"]


@pytest.mark.parametrize("command", MAKERS)
def test_a_link_that_leads_nowhere_is_refused_before_the_work(given, tmp_path, capsys, monkeypatch, command):
    for name in ("tokenizers.train.sample_documents", "data.prepare.corpus_units", "checkpoint.source.read_folder"):
        monkeypatch.setattr(f"gpt2_flax.{name}", None)  # a bug, 70, if it is called
    (tmp_path / "file").write_text("mine", encoding="utf-8")
    for name, target, what in (
        ("dangling", "nothing/there", "output is a link that leads nowhere"),
        ("loop", "loop", "output is a link that leads nowhere"),
        ("to-file", "file", "folder cannot be made" if command == "train" else "exists and is not a folder"),
    ):
        (tmp_path / name).symlink_to(target)
        assert make(command, given, tmp_path / name) == 73
        (line,) = capsys.readouterr().err.splitlines()
        assert what in line
        assert str(tmp_path / name) in line
        assert str((tmp_path / name).readlink()) == target
    assert (tmp_path / "file").read_text(encoding="utf-8") == "mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dangling", "file", "loop", "to-file"]


@pytest.mark.slow
def test_a_file_that_is_a_link_is_written_through(given, tmp_path):
    (tmp_path / "lines").symlink_to("elsewhere/lines.jsonl")
    evaluate = [
        "evaluate",
        str(given["run"]),
        "--data",
        str(given["corpus"]),
        "--per-document",
        str(tmp_path / "lines"),
    ]
    assert cli.exit_code(evaluate) == 0
    assert str((tmp_path / "lines").readlink()) == "elsewhere/lines.jsonl"
    assert len((tmp_path / "elsewhere/lines.jsonl").read_text(encoding="utf-8").splitlines()) == 400


@pytest.mark.multiprocess
def test_a_mount_point_is_refused_before_the_work_and_a_folder_inside_is_not(given, tmp_path, capsys, monkeypatch):
    volume = tmp_path / "a volume"
    volume.mkdir()
    if subprocess.run(["mount", "--bind", volume, volume], capture_output=True, check=False).returncode:
        pytest.skip("may not mount")
    try:
        assert not os.path.ismount(volume)  # of the same file system: device numbers do not tell
        with monkeypatch.context() as patch:
            patch.setattr("gpt2_flax.tokenizers.train.sample_documents", None)
            command = ["tokenizer", str(given["corpus"]), "--vocab-size", "100", "--output"]
            assert cli.exit_code([*command, str(volume)]) == 73
            err = capsys.readouterr().err
            assert f"mount point, which cannot be replaced: {volume}; give a folder inside it" in err
        assert cli.exit_code([*command, str(volume / "new")]) == 0
        assert cli.exit_code(["train", str(given["config"]), f"output={volume / 'run'}"]) == 0
    finally:
        subprocess.run(["umount", volume], check=True)


def test_a_place_without_permission_is_refused_before_the_work(given, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("gpt2_flax.tokenizers.train.sample_documents", None)
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path)  # root may write everywhere
    assert make("tokenizer", given, tmp_path / "deep/new") == 73
    assert f"output folder cannot be made: {tmp_path}/deep/new; check who owns {tmp_path}" in capsys.readouterr().err


def test_a_file_system_without_locks_is_named(given, tmp_path, capsys, monkeypatch):
    numbers = []

    def flock(file, operation):
        raise OSError(numbers[-1], os.strerror(numbers[-1]))

    monkeypatch.setattr("fcntl.flock", flock)
    for command, place in (("train", tmp_path / "run"), ("prepare", tmp_path / ".data.partial")):
        for number in (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS):
            numbers.append(number)
            assert make(command, given, tmp_path / ("run" if command == "train" else "data")) == 73
            (line,) = capsys.readouterr().err.splitlines()
            assert line.startswith(f"error: file system without file locks: {place}; choose an output on another disk")
            assert not (tmp_path / "data").exists()


# Users without a home folder, and locales of other encodings.


def real(*arguments, prefix=(), **environment):
    """Runs a command in a process of its own."""
    ours = {"XLA_FLAGS", "JAX_COMPILATION_CACHE_DIR", "PYTHONUTF8", *(k for k, v in environment.items() if v is None)}
    kept = {name: value for name, value in os.environ.items() if name not in ours}
    added = {name: value for name, value in environment.items() if value is not None}
    command = [*prefix, sys.executable, "-m", "gpt2_flax", *map(str, arguments)]
    everything = kept | {"PYTHONPATH": str(Path(__file__).parents[2])} | added
    return subprocess.run(command, env=everything, capture_output=True, check=False)


@pytest.mark.multiprocess
def test_a_user_without_a_home_folder_can_use_the_commands(given, tmp_path):
    prefix = ("unshare", "--user", "--map-user=12345", "--map-group=12345")
    if subprocess.run([*prefix, "true"], capture_output=True, check=False).returncode:
        pytest.skip("may not make a user")
    nobody = {"prefix": prefix, "HOME": None, "XDG_CACHE_HOME": None}
    for command in ("prepare", "train", "export"):
        done = real(*MAKERS[command].format(**given, output=tmp_path / command).split(), **nobody)
        assert done.returncode == 0, done.stderr.decode()
        assert done.stderr == b""
    refused = real("evaluate", "~/run", **nobody)
    assert refused.returncode == 64
    assert b"~/run is in a home folder that is not known" in refused.stderr


@pytest.mark.multiprocess
def test_chinese_paths_and_prompts_work_in_any_locale(given, tmp_path):
    ascii_locale = {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
    data, run = tmp_path / "数据", tmp_path / "模型"
    shutil.copy(given["corpus"], tmp_path / "语料.txt")
    chinese = given | {"corpus": tmp_path / "语料.txt"}
    for command in (
        MAKERS["prepare"].format(**chinese, output=data),
        f"train {given['config']} output={run} data.dataset={data} training.prompts=['是']",
        f"generate {run} --prompt 是的 --max-new-tokens 2 --allow-unknown",
        f"export {run} {tmp_path}/出口 --language zh",
    ):
        done = real(*command.split(), **ascii_locale)
        assert done.returncode == 0, done.stderr.decode()
        if command.startswith("generate"):
            assert done.stdout.decode().startswith("是的")
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(["数据", "模型", "语料.txt", "出口"])
    assert load_config(run / "config.toml").training.prompts == ["是"]


@pytest.mark.slow
def test_names_that_are_not_utf8_are_read_and_never_made(given, tmp_path, capsys):
    odd = tmp_path / os.fsdecode("语料.txt".encode("gb18030"))
    shutil.copy(given["corpus"], odd)
    assert make("prepare", given | {"corpus": odd}, tmp_path / "data") == 0
    lines = tmp_path / "lines.jsonl"
    assert cli.exit_code(["evaluate", str(given["run"]), "--data", str(odd), "--per-document", str(lines)]) == 0
    name = json.loads(lines.read_text(encoding="utf-8").splitlines()[0])["data"]
    assert [name] == read_info(tmp_path / "data").sources == [f"{tmp_path}/\\xd3\\xef\\xc1\\xcf.txt"]
    capsys.readouterr()
    for command in ("prepare", "tokenizer", "import", "export"):
        assert make(command, given, odd.with_name(f"2{odd.name}")) == 64
        (line,) = capsys.readouterr().err.splitlines()
        assert "is not a name in UTF-8" in line
