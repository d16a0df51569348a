"""Bad inputs of every kind, as real commands in this process: one sentence, the right exit code, nothing left behind.

Each test ends within seconds; a command that waits for a pipe is ended by an alarm, and fails.
"""

import contextlib
import io
import json
import os
import shutil
import signal
import socket
import tempfile
import threading
import typing
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pytest
from support.configs import changed
from support.failures import fails
from support.folders import contents
from support.weight_folders import CONFIG, random_weights, write_folder

from gpt2_flax import __main__ as cli
from gpt2_flax.checkpoint.huggingface import read_folder, to_hf_config, to_state_dict
from gpt2_flax.checkpoint.run_folder import RunFolder
from gpt2_flax.config.file import load_config
from gpt2_flax.config.parse import config_keys, dump_config, parse_config
from gpt2_flax.errors import ExitCode, UserError, quote
from gpt2_flax.input_files import read_whole


@pytest.fixture(autouse=True)
def no_waiting():
    def ring(number, frame):
        raise TimeoutError("the command waits")

    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.fixture
def good(config, corpus, tokenizer_folder, dataset_folder, tmp_path):
    """Good inputs by name, and `tmp`, a folder of the test's own."""
    (tmp_path / "good.toml").write_text(dump_config(config), encoding="utf-8")
    names = {"corpus": corpus, "tokenizer": tokenizer_folder, "dataset": dataset_folder, "tmp": tmp_path}
    return names | {"config": tmp_path / "good.toml", "new": tmp_path / "new"}


def refused(capsys, good, code: int, command: str, *words: str) -> None:
    """Asserts the exit code, one line that holds `words`, and that the command changed no file."""
    before = contents(good["tmp"])
    fails(capsys, code, [part.format(**good) for part in command.split(" ")], *words)
    assert contents(good["tmp"]) == before


# Numbers.

INTEGERS = [key for key, field in config_keys().items() if "int" in str(field.annotation)]


def with_value(values: dict, key: str, value: object) -> dict:
    *sections, last = key.split(".")
    values = json.loads(json.dumps(values))
    place = values
    for section in sections:
        place = place.setdefault(section, {})
    place[last] = value
    return values


@pytest.mark.parametrize("key", INTEGERS)
def test_every_integer_of_a_config_has_an_upper_bound(config, key):
    assert len(INTEGERS) >= 22
    values = changed(config, growth__until=1, growth__n_layer=1).model_dump(exclude_none=True)
    for number in (2**32, 2**62, 2**63, 2**64, 10**30, 16**5000):
        with pytest.raises(UserError, match=key.rpartition(".")[2]) as error:
            parse_config(with_value(values, key, number), "a.toml")
        assert error.value.exit_code == 78
        assert len(str(error.value)) < 300


@pytest.mark.parametrize(
    ("key", "most"),
    [
        ("training.total_steps", 2**31 - 1),
        ("optimizer.warmup", 2**31 - 1),
        ("data.global_batch_size", 2**20),
        ("model.n_positions", 2**20),
        ("model.n_layer", 512),
        ("model.vocab_size", 2**24),
    ],
)
def test_the_bounds_are_where_they_are_said_to_be(config, key, most):
    values = config.model_dump(exclude_none=True)
    parse_config(with_value(values, key, most), "a.toml")
    with pytest.raises(UserError, match=f"less than or equal to {most}, not {most + 1}"):
        parse_config(with_value(values, key, most + 1), "a.toml")


OPTIONS = [
    (
        "generate {dataset} --prompt x",
        ("--samples", "--max-new-tokens", "--top-k", "--no-repeat-ngram", "--step", "--average"),
    ),
    ("generate {dataset} --prompt x", ("--temperature", "--repetition-penalty", "--top-p", "--min-p", "--seed")),
    ("serve {dataset}", ("--port", "--max-tokens", "--max-concurrent", "--step", "--average")),
    ("evaluate {dataset}", ("--seq-length", "--batch-size", "--batches", "--step", "--average")),
    ("export {dataset} {new}", ("--step", "--average")),
    ("convert {dataset} {new}", ("--step", "--average")),
    ("tokenizer {corpus} --output {new}", ("--vocab-size", "--character-coverage")),
    ("prepare {corpus} --tokenizer {tokenizer} --output {new}", ("--workers", "--validation-fraction")),
    ("import-tokens {corpus} --tokenizer {tokenizer} --output {new}", ("--validation-fraction",)),
    ("inspect {dataset}", ("--samples", "--batch", "--stage")),
    ("train {config}", ("--profile", "--max-hours", "--num-processes", "--process-id")),
    ("plan {config}", ("--stage", "--mfu")),
    ("plan --budget 1e18", ("--vocab-size", "--seq-length")),
    ("doctor", ("--seconds",)),
]


@pytest.mark.parametrize(("command", "option"), [(command, one) for command, options in OPTIONS for one in options])
def test_every_number_on_the_command_line_has_an_upper_bound(good, capsys, monkeypatch, command, option):
    monkeypatch.setattr("gpt2_flax.checkpoint.run_folder.check_model", lambda path: path)  # the option is wrong, not it
    for number in (2**32, 2**63, "9" * 5000, "1e999", "nan"):
        refused(capsys, good, 64, f"{command} {option} {number}", option)


def test_the_list_of_options_is_of_all_that_take_numbers():
    from gpt2_flax.cli import app

    numbers = {
        (command.name or command.callback.__name__.replace("_", "-"), f"--{name.replace('_', '-')}")
        for command in app.registered_commands
        for name, hint in typing.get_type_hints(command.callback).items()
        if not {int, float}.isdisjoint((hint, *typing.get_args(hint)))
    }
    listed = {(command.split(" ")[0], option) for command, options in OPTIONS for option in options}
    assert numbers == listed


@pytest.mark.parametrize("size", ["9" * 400 + "GB", "1e999GB", "0GB", "99999999999GB"])
def test_a_size_of_shards_that_is_none_is_refused(good, capsys, monkeypatch, size):
    monkeypatch.setattr("gpt2_flax.checkpoint.run_folder.check_model", lambda path: path)
    refused(capsys, good, 64, f"export {{dataset}} {{new}} --max-shard-size {size}", "not a size")


# TOML.

DEEP = 3000
TOMLS = {
    "lists": "output = " + "[" * DEEP + "]" * DEEP,
    "tables": "a = " + "{a = " * DEEP + "1" + "}" * DEEP,
    "lists that tomllib can read": "output = " + "[" * 100 + "]" * 100,
    "a key of many parts": ".".join(["a"] * 100_000) + " = 1",
    "a key of many quoted parts": " . ".join(['"a b"', "'c'"] * 50_000) + " = 1",
    "a header of many parts": "[" + ".".join(["a"] * 100_000) + "]",
    "a key in a deep table": "[" + ".".join(["a"] * 30) + "]\n" + ".".join(["b"] * 30) + " = 1",
    "a number of 5,000 digits": "output = " + "9" * 5000,
    "a hexadecimal number": "[training]\ntotal_steps = 0x" + "f" * 5000,
    "a file of 2 MiB": "#" * 2**21,
    "zeros": "\0" * 5000,
    "a key of 50,000 characters": "a" * 50_000 + " = 1",
}


@pytest.mark.parametrize("content", TOMLS.values(), ids=TOMLS)
def test_a_config_without_measure_is_refused(good, capsys, content):
    (good["tmp"] / "bad.toml").write_text(content, encoding="utf-8")
    for command in ("train", "plan"):
        refused(capsys, good, 78, f"{command} {{tmp}}/bad.toml", "bad.toml")


@pytest.mark.parametrize(
    ("override", "code"),
    [
        ("training.total_steps=" + "9" * 5000, 78),  # not a number, so a word
        ("training.total_steps=0x" + "f" * 5000, 78),
        ("training.prompts=" + "[" * DEEP + "]" * DEEP, 78),
        ("data.dataset={" + ".".join("a" * 30_000) + "=1}", 64),
        (".".join("a" * 30_000) + "=1", 78),
        ("stages." + "9" * 5000 + ".output=x", 64),
    ],
)
def test_an_override_without_measure_is_refused(good, capsys, override, code):
    before = contents(good["tmp"])
    fails(capsys, code, ["train", good["config"], override])
    assert contents(good["tmp"]) == before


def test_what_looks_deep_inside_a_string_is_read(good):
    path = good["tmp"] / "dots.toml"
    prompt = "One. Two. " * 100 + "..." * 500 + "[[[[{{{{" * 400
    path.write_text(good["config"].read_text().replace("prompts = []", f"prompts = ['{prompt}']"))
    assert load_config(path).training.prompts == [prompt]


def test_quoting_never_fails():
    deep: list = []
    for _ in range(100_000):
        deep = [deep]
    assert quote(deep) == "<list>"
    assert quote(16**5000) == "<int>"


# Things that are no files.


def make(kind: str, path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "link to itself":
        path.symlink_to(path.name)
    else:
        here = Path.cwd()
        os.chdir(path.parent)  # the name of a socket has at most 107 bytes
        try:
            with socket.socket(socket.AF_UNIX) as bound:
                bound.bind(path.name)
        finally:
            os.chdir(here)


PLACES = [
    ("train {odd}", "a.toml"),
    ("plan {odd}", "a.toml"),
    ("inspect --batch 1 --config {odd}", "a.toml"),
    *(
        ("prepare {corpus} --output {new} --tokenizer {odd}", name)
        for name in ("vocab.txt", "a.model", "tokenizer.json", "vocab.json")
    ),
    ("prepare {corpus} --output {new} --tokenizer {tmp}/t", "t/tokenizer_config.json"),
    ("prepare {corpus} --output {new} --tokenizer {tmp}/t", "t/special_tokens_map.json"),
    ("prepare {odd} --output {new} --tokenizer {tokenizer}", "a.parquet"),
    ("import-tokens {odd} --output {new} --tokenizer {tokenizer}", "a.bin"),
    ("generate {tmp}/hf --prompt-file {odd}", "prompts"),
    ("export {tmp}/hf {new} --card-extra {odd}", "card.md"),
    ("inspect {tmp}/d", "d/dataset.json"),
    ("inspect {tmp}/d", "d/train/tokens-00000.bin"),
    ("train {config} data.dataset={tmp}/d output={new}", "d/dataset.json"),
    ("train {config} data.dataset={tmp}/d output={new}", "d/tokenizer/vocab.txt"),
    ("import {odd} {new} --tokenizer {tokenizer}", "a.bin"),
    ("import {tmp}/hf {new}", "hf/config.json"),
    ("import {tmp}/hf {new}", "hf/model.safetensors"),
    ("import {tmp}/hf {new}", "hf/tokenizer.json"),
    ("convert {tmp}/hf {new} --tokenizer {tokenizer} --uer-config {odd}", "uer.json"),
]


@pytest.mark.parametrize("kind", ["fifo", "socket", "device", "folder", "link to itself"])
@pytest.mark.parametrize(
    ("command", "place"), PLACES, ids=[f"{place} {command.split(' ')[0]}" for command, place in PLACES]
)
def test_what_is_no_file_is_refused_and_not_waited_for(good, capsys, kind, command, place):
    if "/t" in command:
        shutil.copytree(good["tokenizer"], good["tmp"] / "t")
    if "/d" in command:
        shutil.copytree(good["dataset"], good["tmp"] / "d")
    if "/hf" in command:
        shutil.copytree(good["tokenizer"], write_folder(good["tmp"] / "hf"), dirs_exist_ok=True)
        (good["tmp"] / "hf/vocab.txt").unlink()
    good = good | {"odd": good["tmp"] / place}
    make(kind, good["odd"])
    names = sorted(good["tmp"].rglob("*"))
    capsys.readouterr()
    code = cli.exit_code([part.format(**good) for part in command.split(" ")])
    err = capsys.readouterr().err
    assert code in (64, 65, 66, 74), err
    assert err.startswith("error: "), err
    assert err.count("\n") == 1, err
    assert sorted(good["tmp"].rglob("*")) == names


def test_the_pipe_that_a_shell_makes_is_read_to_its_end(tmp_path):
    reading, writing = os.pipe()
    writer = threading.Thread(target=lambda: (os.write(writing, b"output = 'a'\n"), os.close(writing)))
    writer.start()
    assert read_whole(Path(f"/dev/fd/{reading}"), 100) == b"output = 'a'\n"
    writer.join()
    os.close(reading)


# Tokenizers.


@pytest.fixture(scope="module")
def byte_level(corpus):
    """The content of a tokenizer.json, of 300 tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<|endoftext|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train([str(corpus)], trainer)
    return tokenizer.to_str()


def with_id(number: object):
    def change(spec):
        vocabulary = spec["model"]["vocab"]
        vocabulary[max(vocabulary, key=vocabulary.get)] = number

    return change


def with_added(content: str, number: int):
    new = {"id": number, "content": content, "single_word": False, "lstrip": False, "rstrip": False}
    return lambda spec: spec["added_tokens"].append(new | {"normalized": False, "special": True})


BAD_IDS = {
    "doubled": (with_id(7), "have the same id 7"),
    "mostly missing": (with_id(601), "the largest id is 601, but there are 300 tokens"),
    "2**24": (with_id(2**24), "the largest id is 16777216"),
    "2**31": (with_id(2**31), "the largest id is 2147483648"),
    "2**32 - 1": (with_id(2**32 - 1), "the largest id is 4294967295"),
    "2**63": (with_id(2**63), "tokenizer.json"),
    "below 0": (with_id(-1), "tokenizer.json"),
    "no integer": (with_id(1.5), "tokenizer.json"),
    "added in the place of another": (with_added("<new>", 5), "'<new>' cannot have the id 5, but 300"),
    "added after a hole": (with_added("<new>", 900), "'<new>' cannot have the id 900, but 300"),
    "added again with another id": (with_added("<|endoftext|>", 9), "cannot have the id 9, but 0"),
    "added 2**32 - 1": (with_added("<new>", 2**32 - 1), "cannot have the id 4294967295, but 300"),
    "no vocabulary": (lambda spec: spec["model"].pop("vocab"), "tokenizer.json"),
    "added is null": (lambda spec: spec.update(added_tokens=None), "tokenizer.json"),
}


@pytest.mark.parametrize(("change", "said"), BAD_IDS.values(), ids=BAD_IDS)
def test_a_tokenizer_with_impossible_ids_is_refused(good, capsys, byte_level, change, said):
    spec = json.loads(byte_level)
    change(spec)
    (good["tmp"] / "tokenizer.json").write_text(json.dumps(spec))
    refused(capsys, good, 65, "prepare {corpus} --tokenizer {tmp}/tokenizer.json --output {new}", said)


def test_a_few_missing_ids_are_none_of_our_business(good, byte_level):
    from gpt2_flax.tokenizers.tokenizer import load_tokenizer

    spec = json.loads(byte_level)
    with_id(400)(spec)
    (good["tmp"] / "tokenizer.json").write_text(json.dumps(spec))
    assert load_tokenizer(good["tmp"] / "tokenizer.json").vocab_size == 401


JSONS = {
    "empty": b"",
    "deep": b"[" * 100_000,
    "deep and whole": b'{"a":' * 500 + b"1" + b"}" * 500,
    "digits": b'{"a": ' + b"9" * 5000 + b"}",
    "twice": b'{"a": 1, "a": 1}',
    "a list": b"[]",
    "null": b"null",
    "zeros": bytes(2000),
    "not UTF-8": b'{"a": "\xff"}',
}


@pytest.mark.parametrize("content", JSONS.values(), ids=JSONS)
@pytest.mark.parametrize(
    "place", ["t/tokenizer.json", "t/tokenizer_config.json", "hf/config.json", "uer.json", "d/dataset.json"]
)
def test_json_without_measure_is_refused_wherever_it_is_read(good, capsys, place, content):
    path = good["tmp"] / place
    path.parent.mkdir(exist_ok=True)
    if place == "t/tokenizer_config.json":
        shutil.copy(good["tokenizer"] / "vocab.txt", path.parent)
    path.write_bytes(content)
    model = good["tmp"] / "model.bin"
    model.write_bytes(b"not read")
    command = {
        "t": "prepare {corpus} --tokenizer {tmp}/t --output {new}",
        "hf": "import {tmp}/hf {new}",
        "d": "inspect {tmp}/d",
    }.get(path.parent.name)
    if command:
        refused(capsys, good, 65, command, path.name)
    else:
        from gpt2_flax.formats.uer import read_uer

        with pytest.raises(UserError, match=r"uer\.json") as error:
            read_uer(model, path)
        assert error.value.exit_code == 65


def sentencepiece(change):
    from sentencepiece import sentencepiece_model_pb2 as protobuf

    from gpt2_flax.tokenizers.train import train_sentencepiece

    with tempfile.TemporaryDirectory() as folder:
        train_sentencepiece(["天地玄黄宇宙洪荒"] * 9, 300, "char", 1.0).save(Path(folder))
        proto = protobuf.ModelProto.FromString((Path(folder) / "spiece.model").read_bytes())
    change(proto)
    return proto.SerializeToString()


PIECES = {
    "empty file": (lambda: b"", "it has no pieces"),
    "no pieces": (lambda: sentencepiece(lambda proto: proto.ClearField("pieces")), "it has no pieces"),
    "nan": (
        lambda: sentencepiece(lambda proto: setattr(proto.pieces[-1], "score", float("nan"))),
        "not a finite number",
    ),
    "twice": (lambda: sentencepiece(lambda p: setattr(p.pieces[-1], "piece", p.pieces[-2].piece)), "already defined"),
    "text": (lambda: "天\n".encode(), "a.model"),
}


@pytest.mark.parametrize(("content", "said"), PIECES.values(), ids=PIECES)
def test_a_sentencepiece_model_without_sense_is_refused(good, capsys, content, said):
    (good["tmp"] / "a.model").write_bytes(content())
    refused(capsys, good, 65, "prepare {corpus} --tokenizer {tmp}/a.model --output {new}", "not a SentencePiece", said)


# Datasets.


@pytest.mark.slow
@pytest.mark.parametrize("split", ["train", "validation"])
def test_offsets_that_make_no_sense_are_named_by_every_reader(good, config, capsys, split):
    dataset = good["tmp"] / "d"
    shutil.copytree(good["dataset"], dataset)
    offsets = dataset / split / "offsets-00000.bin"
    offsets.write_bytes(b"\xff" * offsets.stat().st_size)
    packed = changed(config, data__dataset=str(dataset), data__packing="best_fit", training__total_steps=1)
    good["config"].write_text(dump_config(packed))
    commands = ["inspect {tmp}/d", "inspect {tmp}/d --verify"]
    for command in commands + ["train {config}"] * (split == "train"):
        capsys.readouterr()
        assert cli.exit_code([part.format(**good) for part in command.split(" ")]) == 65
        err = capsys.readouterr().err
        assert err.startswith("error: ")
        assert err.count("\n") == 1
        assert "offsets-00000.bin" in err


# Weights.


def state_dict() -> dict[str, np.ndarray]:
    return to_state_dict(random_weights(CONFIG))


def bin_folder(folder: Path, content: dict) -> Path:
    torch = pytest.importorskip("torch")
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(to_hf_config(CONFIG, 1, 2, 0)))
    torch.save({name: torch.from_numpy(array) for name, array in content.items()}, folder / "pytorch_model.bin")
    return folder


def compressed(path: Path, replaced: dict[str, bytes] | None = None) -> None:
    """Writes the zip file anew with deflate, as no torch.save does, with other content of some members."""
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    members |= {name: new for name in members for end, new in (replaced or {}).items() if name.endswith(end)}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)


def test_a_pytorch_file_that_grows_when_it_is_read_is_refused_unread(tmp_path, monkeypatch):
    torch = pytest.importorskip("torch")
    folder = bin_folder(tmp_path / "hf", state_dict())
    path, good = folder / "pytorch_model.bin", (folder / "pytorch_model.bin").read_bytes()
    monkeypatch.setattr(torch, "load", lambda *arguments, **options: pytest.fail("it was read"))
    compressed(path, {"data.pkl": bytes(2**26)})
    assert path.stat().st_size < 2**20
    with pytest.raises(UserError, match="it is compressed"):
        read_folder(folder)

    # Members that lie over one another: each is stored, all together are larger than the file.
    path.write_bytes(good)
    with zipfile.ZipFile(path) as archive:
        largest = max(archive.infolist(), key=lambda member: member.file_size)
    with zipfile.ZipFile(io.BytesIO(good)) as archive, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        copies = io.BytesIO()
        with zipfile.ZipFile(copies, "w") as out:
            out.writestr(largest.filename, archive.read(largest))
            out.filelist *= 9
    path.write_bytes(copies.getvalue())
    with pytest.raises(UserError, match="its members are larger than the file"):
        read_folder(folder)

    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a/data.pkl", bytes(2**24 + 1))
    with pytest.raises(UserError, match=r"data\.pkl has 16777217 bytes"):
        read_folder(folder)


def test_a_pytorch_file_taken_for_want_of_another_is_named(tmp_path, capsys):
    folder = bin_folder(tmp_path / "hf", state_dict())
    weights = read_folder(folder)[1]
    assert all(np.array_equal(weights[path], array) for path, array in random_weights(CONFIG).items())
    assert capsys.readouterr().err == (
        f"note: {folder} has no model.safetensors; pytorch_model.bin was read, and no code in it was run\n"
    )
    write_folder(folder)
    read_folder(folder)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("kind", ["sparse", "meta"])
def test_a_tensor_without_its_numbers_is_refused(tmp_path, kind):
    torch = pytest.importorskip("torch")
    folder = bin_folder(tmp_path / "hf", state_dict())
    tensors = {name: torch.from_numpy(array) for name, array in state_dict().items()}
    bias = tensors["transformer.ln_f.bias"]
    tensors["transformer.ln_f.bias"] = bias.to_sparse() if kind == "sparse" else bias.to("meta")
    torch.save(tensors, folder / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"(tensor without its numbers: 'transformer.ln_f.bias'|pytorch_model\.bin)"):
        read_folder(folder)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_numbers_that_are_not_finite_are_named_whichever_tensor_holds_one(tmp_path, kind, value):
    from safetensors.numpy import save_file

    names = list(state_dict())
    for number, name in enumerate(names):
        content = state_dict()
        content[name].flat[-1] = value
        folder = tmp_path / str(number)
        if kind == "bin":
            bin_folder(folder, content)
        else:
            save_file(content, write_folder(folder) / "model.safetensors")
        with pytest.raises(UserError, match=rf"not finite: 1 of the {content[name].size} numbers of .*") as error:
            read_folder(folder)
        assert name.removeprefix("transformer.") in str(error.value)


# What a refused run leaves.


def begin_and_fail(run: RunFolder, *made: tuple[str, str]) -> None:
    with run.removed_if_refused():
        run.path.mkdir(parents=True, exist_ok=True)
        for name, content in made:
            (run.path / name).parent.mkdir(exist_ok=True)
            (run.path / name).write_text(content)
        raise UserError(ExitCode.CONFIG, "no", "here", "do not")


def refuse(run: RunFolder, *made: tuple[str, str]) -> None:
    with pytest.raises(UserError, match="no: here"):
        begin_and_fail(run, *made)


def test_a_refused_run_removes_what_it_made_and_nothing_else(tmp_path):
    worthless = (("lock", "process 1"), ("metrics.jsonl", ""), ("tensorboard/events", ""))
    refuse(RunFolder(tmp_path / "deep/er/run"), *worthless)
    assert not (tmp_path / "deep").exists()
    (tmp_path / "empty").mkdir()
    refuse(RunFolder(tmp_path / "empty"), *worthless)
    assert [*tmp_path.rglob("*")] == [tmp_path / "empty"]
    refuse(RunFolder(tmp_path / "begun"), *worthless, ("config.toml", "output = 'x'"))
    assert (tmp_path / "begun/metrics.jsonl").exists()
    (tmp_path / "there").mkdir()
    (tmp_path / "there/lock").touch()
    refuse(RunFolder(tmp_path / "there"), *worthless)
    assert (tmp_path / "there/metrics.jsonl").exists()


def test_a_refused_run_leaves_what_another_process_has_begun(tmp_path):
    run = RunFolder(tmp_path / "run")

    def begin_beside_another():
        with run.removed_if_refused():
            run.create()
            stack.enter_context(run.lock())  # of the other, which goes on
            run.metrics.touch()
            with run.lock():
                pytest.fail("two hold the lock")

    with contextlib.ExitStack() as stack:
        with pytest.raises(UserError, match="another process trains"):
            begin_beside_another()
        assert sorted(path.name for path in run.path.iterdir()) == ["lock", "metrics.jsonl"]
