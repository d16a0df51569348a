"""The commands as a user types them: from text to a model in `transformers`, and one line for whatever goes wrong."""

import fcntl
import json
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import typer
from safetensors.numpy import load_file
from support.failures import fails
from support.folders import contents
from support.terminal import at_terminal, seen

from gpt2_flax import __main__ as cli
from gpt2_flax.checkpoint.step_meta import sealed
from gpt2_flax.cli import DEBUG, app
from gpt2_flax.config.parse import dump_config
from gpt2_flax.data.dataset import TokenDataset

ROOT = Path(__file__).parents[2]
PROMPT = "这是很久之前的事情了"
COMMANDS = [
    "tokenizer",
    "prepare",
    "inspect",
    "import-tokens",
    "plan",
    "train",
    "configs",
    "init",
    "checkpoints",
    "report",
    "keys",
    "evaluate",
    "generate",
    "export",
    "import",
    "serve",
    "push",
    "convert",
    "doctor",
]


def processes_environment(**more: str) -> dict[str, str]:
    """What a user has: the devices there are, and no switch of ours."""
    ours = ("XLA_FLAGS", "GPT2_FLAX_DEBUG")
    kept = {name: value for name, value in os.environ.items() if name not in ours}
    return kept | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"} | more


# The whole way, in real processes.


@pytest.fixture(scope="module")
def way(corpus, tmp_path_factory):
    """A folder in which every command was called once, with what each printed."""
    pytest.importorskip("transformers")
    pytest.importorskip("torch")
    folder = tmp_path_factory.mktemp("way")
    shutil.copy(corpus, folder / "corpus.txt")
    (folder / "run.toml").write_text(
        """
        output = "run"
        model = {n_positions = 32, n_layer = 2, n_head = 2, n_embd = 32, dtype = "float32", embd_pdrop = 0.0}
        data = {dataset = "dataset", seq_length = 16, global_batch_size = 8}
        optimizer = {learning_rate = 1e-2, warmup = 2}
        training = {total_steps = 120, log_every = 1, evaluation_batches = 2}
        """,
        encoding="utf-8",
    )
    environment = processes_environment(
        JAX_COMPILATION_CACHE_DIR=str(folder / "compiled"),
        JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS="0",
    )
    printed = {}

    def call(name, *arguments, expected=0):
        command = [sys.executable, "-m", "gpt2_flax", *arguments]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "encoding": "utf-8"}
        with subprocess.Popen(command, cwd=folder, env=environment, **pipes) as process:
            out, err = process.communicate(timeout=120)
        assert process.returncode == expected, err
        assert len(err.splitlines()) == (expected != 0), err
        printed[name] = out + err

    call("tokenizer", "tokenizer", "corpus.txt", "--output", "tokenizer", "--vocab-size", "100")
    call("prepare", "prepare", "corpus.txt", *["--tokenizer", "tokenizer", "--output", "dataset"])
    train = [sys.executable, "-m", "gpt2_flax", "train", "run.toml"]
    code, printed["stopped"] = at_terminal(train, folder, environment, "next evaluation")
    assert code == 75, printed["stopped"]
    call("resumed", "train", "run.toml")
    call("evaluate", "evaluate", "run")
    call("generate", "generate", "run", "--prompt", PROMPT, "--prompt", "", "--max-new-tokens", "8")
    call("export", "export", "run", "exported", "--prompt", PROMPT)
    call("import", "import", "exported", "imported")
    call("export again", "export", "imported", "again", "--format", "bin")
    call("train on", "train", "run.toml", "output=second", "init_from=imported", "training.total_steps=3", "--quiet")
    return folder, printed


@pytest.mark.multiprocess
def test_every_command_says_what_it_did(way):
    folder, printed = way
    assert "characters a token" in printed["tokenizer"]
    assert "dataset validation: " in printed["prepare"]
    step = re.search(r"stopped at step (\d+), saved: run; ", printed["stopped"])[1]
    assert f"resumed from step {step} of run" in printed["resumed"]
    assert "perplexity" in printed["evaluate"]
    assert printed["generate"].startswith(PROMPT)
    assert len(printed["generate"].splitlines()) == 2
    assert printed["train on"] == ""

    steps = [json.loads(line) for line in (folder / "run/metrics.jsonl").read_text().splitlines()]
    losses = {line["step"]: line["train/loss"] for line in steps if "train/loss" in line}
    assert sorted(losses) == list(range(1, 121))
    assert losses[120] < 0.5 * losses[1]
    second = json.loads((folder / "second/metrics.jsonl").read_text().splitlines()[0])
    assert second["train/loss"] < 0.5 * losses[1]  # it starts where the first has ended


@pytest.mark.multiprocess
def test_a_terminal_shows_the_state_of_a_run_and_in_the_end_only_its_lines(way):
    written = way[1]["stopped"]
    states = ["making the model", "compiling the training step", "tokens/s  ETA", "saving step"]
    assert sorted(states, key=written.index) == states
    without_colors = re.sub(r"\x1b\[[\d;]*m", "", written)
    assert re.search(r"step \d+/120  ━.*  loss \d\.\d+ .*[▁▂▃▄▅▆▇█]", without_colors)
    lines, cursor = seen(written)
    assert cursor
    assert lines[0] == "starting from scratch with seed 0"
    numbers = [int(line.split()[1].split("/")[0]) for line in lines if line.startswith("step ")]
    assert numbers == list(range(1, len(numbers) + 1))
    last = f"stopped at step {numbers[-1]}, saved: run; to go on: gpt2-flax train run.toml"
    assert [line for line in lines if line][-1] == last
    assert not [line for line in lines if re.search("[━█]|error|tokens/s  ETA.*next|saving", line)]


@pytest.mark.multiprocess
def test_a_run_ends_with_a_command_that_works(way):
    folder, printed = way
    lines = printed["resumed"].splitlines()
    step = re.search(r"resumed from step (\d+)", lines[0])[1]
    assert f"steps           120, 15.4k tokens, {step} of them done" in lines
    end = r"estimated end   \d{4}-\d\d-\d\d \d\d:\d\d, in \w+, at the speed before the stop"
    assert any(re.fullmatch(end, line) for line in lines)
    assert [line.split("  ")[0] for line in lines[-4:]] == ["finished", "loss", "best step", "next"]
    assert re.search(rf"120 steps, 15.4k tokens; the last {120 - int(step)} in \w+$", lines[-4])
    command = shlex.split(lines[-1])[1:]
    assert command[:-1] == ["gpt2-flax", "generate", "run", "--prompt"]
    tensors = load_file(folder / "exported/model.safetensors")
    assert f"\nparameters      {sum(array.size for array in tensors.values()):,}, " in printed["resumed"]
    assert command[-1] in (folder / "corpus.txt").read_text(encoding="utf-8")


@pytest.mark.multiprocess
def test_what_was_imported_is_exported_to_the_same_bytes(way):
    folder, _ = way
    for name in ("model.safetensors", "vocab.txt", "tokenizer.json", "generation_config.json"):
        assert (folder / "exported" / name).read_bytes() == (folder / "again" / name).read_bytes()


@pytest.mark.multiprocess
def test_the_published_model_works_as_its_users_call_it(way):
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    folder, printed = way
    assert "logits of 64 tokens equal those of transformers" in printed["export"]

    tokenizer = transformers.BertTokenizer.from_pretrained(folder / "exported")
    model = transformers.GPT2LMHeadModel.from_pretrained(folder / "exported")
    generator = transformers.TextGenerationPipeline(model, tokenizer)
    text = generator(PROMPT, max_length=30, do_sample=True)[0]["generated_text"]
    assert text.replace(" ", "").startswith(PROMPT)

    auto = transformers.AutoTokenizer.from_pretrained(folder / "exported")
    again = transformers.AutoModelForCausalLM.from_pretrained(folder / "exported")
    ids = tokenizer(PROMPT, return_tensors="pt").input_ids
    assert [*auto(PROMPT).input_ids, tokenizer.sep_token_id] == ids[0].tolist()  # BertTokenizer ends every text
    with torch.inference_mode():
        assert torch.equal(again(ids).logits, model(ids).logits)


# Failures, in this process.


@pytest.fixture(scope="module")
def made(corpus, tokenizer_folder, dataset_folder, tmp_path_factory):
    """Good inputs by name: a run with checkpoints 2 and 4 among them."""
    from gpt2_flax.checkpoint.source import load_source
    from gpt2_flax.config.parse import parse_config
    from gpt2_flax.export.transformers_folder import export_folder
    from gpt2_flax.tokenizers.tokenizer import load_tokenizer
    from gpt2_flax.training.loop import train

    folder = tmp_path_factory.mktemp("made")
    values = {
        "output": str(folder / "run"),
        "model": {"n_positions": 32, "n_layer": 2, "n_head": 8, "n_embd": 32, "dtype": "float32"}
        | dict.fromkeys(("embd_pdrop", "attn_pdrop", "resid_pdrop"), 0.0),
        "data": {"dataset": str(dataset_folder), "seq_length": 16, "global_batch_size": 16},
        "optimizer": {"name": "adamw"},
        "training": {"total_steps": 4, "save_every": 2, "evaluation_batches": 1},
    }
    config = parse_config(values, "test")
    train(config)
    (folder / "run.toml").write_text(dump_config(config), encoding="utf-8")
    source = load_source(folder / "run")
    tokenizer = load_tokenizer(tokenizer_folder)
    export_folder(source.weights, source.model, tokenizer, folder / "exported", card="", verify=False)
    return {
        "corpus": corpus,
        "tokenizer": tokenizer_folder,
        "dataset": dataset_folder,
        "run": folder / "run",
        "config": folder / "run.toml",
        "exported": folder / "exported",
    }


@pytest.fixture
def inputs(made, tmp_path):
    """`made`, and bad inputs in `tmp`, a folder of the test's own."""
    vocabulary = (made["tokenizer"] / "vocab.txt").read_text(encoding="utf-8")
    (tmp_path / "empty.txt").touch()
    (tmp_path / "blank.txt").write_text("\n \n", encoding="utf-8")
    (tmp_path / "gbk.txt").write_bytes(b"good\n" + "很久".encode("gbk") + b"\n")
    (tmp_path / "no-special.txt").write_text(vocabulary.replace("[SEP]", "[EOS]"), encoding="utf-8")
    (tmp_path / "duplicate.txt").write_text(vocabulary + "是\n", encoding="utf-8")
    (tmp_path / "broken.toml").write_text("output = \n", encoding="utf-8")
    (tmp_path / "unknown.toml").write_text(
        made["config"].read_text(encoding="utf-8").replace("learning_rate =", "learning_rat ="), encoding="utf-8"
    )
    (tmp_path / "file").write_text("mine", encoding="utf-8")
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos/summer.jpg").write_text("mine", encoding="utf-8")
    for name in ("no-tokenizer", "other-tokenizer"):
        shutil.copytree(made["dataset"], tmp_path / name)
        shutil.rmtree(tmp_path / name / "tokenizer")
    (tmp_path / "other-tokenizer/tokenizer").mkdir()
    (tmp_path / "other-tokenizer/tokenizer/vocab.txt").write_text(vocabulary + "new\n", encoding="utf-8")
    (tmp_path / "no-weights").mkdir()
    shutil.copy(made["exported"] / "config.json", tmp_path / "no-weights")
    (tmp_path / "bert").mkdir()
    (tmp_path / "bert/config.json").write_text('{"model_type": "bert"}', encoding="utf-8")
    return made | {"tmp": tmp_path}


TOKENIZER = "tokenizer {corpus} --output {tmp}/new"
PREPARE = "prepare {corpus} --tokenizer {tokenizer} --output {tmp}/new"
TRAIN = "train {config} output={tmp}/new"

FAILURES = [
    # The command line.
    (64, "trian", "trian"),
    (64, "train", "config"),
    (64, "train {config} --steps 3", "--steps"),
    (64, "keys more", "more"),
    (64, "plan", "nothing to plan", "gpt2-flax configs"),
    (64, "init huge", "'huge'", "take base, "),
    (64, "train {config} base", "not an override", "'base'"),
    (64, "generate {run}", "--prompt"),
    (64, "generate {run} --prompt x --top-k -1", "--top-k"),
    (64, "generate {run} --prompt x --top-p 1.5", "--top-p"),
    (64, "generate {run} --prompt x --temperature nan", "--temperature"),
    (64, "generate {run} --prompt x --temperature warm", "--temperature"),
    (64, "generate {run} --prompt \udcff", "--prompt", "not UTF-8"),
    (64, "generate {exported} --prompt x --step 2", "--step", "exported"),
    (64, "generate {run}/checkpoints/2 --prompt x --step 4", "--step"),
    (64, "evaluate {exported}", "no data", "--data"),
    (64, "export {run} {tmp}/new --format onnx", "--format"),
    (64, "export {run} {tmp}/new --license \udcff", "--license", "not UTF-8"),
    (64, TOKENIZER + " --kind words", "--kind"),
    (64, TOKENIZER + " --kind sentencepiece --character-coverage 0.5", "--character-coverage"),
    (64, PREPARE + " --validation-fraction 2", "--validation-fraction"),
    (64, PREPARE + " --workers 0", "--workers"),
    (64, TRAIN + " total_steps", "'total_steps'", "section.key=value"),
    (64, TRAIN + " init_from=\udcff", "not UTF-8"),
    (64, TRAIN + " --process-id 0", "--coordinator"),
    (64, "train {config} --allow-change optimizer.lr", "optimizer.lr"),
    # Corpora and tokenizers.
    (66, "tokenizer {tmp}/none.txt --output {tmp}/new", "none.txt"),
    (66, "tokenizer {tmp}/photos --output {tmp}/new", "photos"),
    (65, "tokenizer {tmp}/file --output {tmp}/new", "/file"),
    (65, "tokenizer {tmp}/empty.txt --output {tmp}/new", "empty.txt"),
    (65, "tokenizer {tmp}/blank.txt --output {tmp}/new", "blank.txt"),
    (65, "tokenizer {tmp}/gbk.txt --output {tmp}/new", "gbk.txt:2;", "not UTF-8"),
    (65, TOKENIZER + " --kind sentencepiece --vocab-size 100000", "--vocab-size", "at most"),
    (66, "prepare {tmp}/none.txt --tokenizer {tokenizer} --output {tmp}/new", "none.txt"),
    (66, "prepare {tmp}/a\nb\x1b[31m.txt --tokenizer {tokenizer} --output {tmp}/new", "a\\nb\\x1b[31m.txt"),
    (65, "prepare {tmp}/empty.txt --tokenizer {tokenizer} --output {tmp}/new", "empty.txt"),
    (65, "prepare {tmp}/blank.txt --tokenizer {tokenizer} --output {tmp}/new", "blank.txt"),
    (65, "prepare {tmp}/gbk.txt --tokenizer {tokenizer} --output {tmp}/new", "gbk.txt:2;", "0xBA"),
    (64, PREPARE + " --validation-fraction 1", "--validation-fraction", "0 for none"),
    (64, PREPARE + " --validation-fraction nan", "--validation-fraction"),
    (66, "prepare {corpus} --tokenizer {tmp}/none --output {tmp}/new", "/none"),
    (66, "prepare {corpus} --tokenizer {tmp}/photos --output {tmp}/new", "photos"),
    (65, "prepare {corpus} --tokenizer {tmp}/file --output {tmp}/new", "/file"),
    (65, "prepare {corpus} --tokenizer {tmp}/no-special.txt --output {tmp}/new", "no-special.txt", "[SEP]"),
    (65, "prepare {corpus} --tokenizer {tmp}/duplicate.txt --output {tmp}/new", "duplicate.txt:", "twice"),
    # Configs.
    (66, "train {tmp}/none.toml", "none.toml"),
    (66, "train huge", "config not found: huge", "base, ", " or xl"),
    (78, "train output={tmp}/new", "missing key data.dataset: command line"),
    (78, "train output={tmp}/new data.dataset={dataset}", "missing key training.total_steps: command line"),
    (66, "train {tmp}/photos", "photos"),
    (78, "train {tmp}/broken.toml", "broken.toml", "line 1"),
    (78, "train {tmp}/unknown.toml", "optimizer.learning_rat", "did you mean optimizer.learning_rate?"),
    (78, TRAIN + " optimizer.learning_rte=1.0", "did you mean optimizer.learning_rate?"),
    (78, TRAIN + ' optimizer.learning_rate="1e-3"', "optimizer.learning_rate", "'1e-3'"),
    (78, TRAIN + " optimizer.learning_rate=nan", "optimizer.learning_rate"),
    (78, TRAIN + " training.total_steps=1.5", "training.total_steps"),
    (78, TRAIN + " training.total_steps=0", "training.total_steps"),
    (78, TRAIN + " model.dtype=float64", "model.dtype", "'float64'"),
    (78, TRAIN + " model=3", "model", "not 3"),
    (78, TRAIN + " output.name=x", "output"),
    (78, TRAIN + " model.n_head=3", "model.n_head 3", "model.n_embd 32"),
    (78, TRAIN + " data.seq_length=33", "data.seq_length 33", "model.n_positions 32"),
    (78, TRAIN + " training.accumulation_steps=3", "training.accumulation_steps 3"),
    # What only the dataset or the devices can tell.
    (66, TRAIN + " data.dataset={tmp}/none", "none/dataset.json", "gpt2-flax prepare"),
    (66, TRAIN + " data.dataset={tmp}/no-tokenizer", "no-tokenizer/tokenizer", "tokenizer not found"),
    (65, TRAIN + " data.dataset={tmp}/other-tokenizer", "other-tokenizer/tokenizer", "not the one"),
    (74, TRAIN + " training.keep_checkpoints=2147483647", "lower training.keep_checkpoints"),
    (78, TRAIN + " model.vocab_size=50", "model.vocab_size is 50", "dataset"),
    (78, TRAIN + " mesh.data=8 data.global_batch_size=12", "data.global_batch_size 12", "take 8 or 16"),
    (78, TRAIN + " mesh.data=8 data.global_batch_size=4", "data.global_batch_size 4", "take 8"),
    (78, TRAIN + " mesh.data=3", "data 3", "8 devices"),
    (78, TRAIN + " mesh.tensor=3", "tensor 3", "8 devices"),
    (78, TRAIN + " mesh.tensor=8 model.n_head=4", "mesh.tensor", "n_head"),
    (66, TRAIN + " init_from={tmp}/none", "/none", "init_from: no model found"),
    (65, TRAIN + " init_from={tmp}/bert", "bert", "model_type"),
    (78, TRAIN + " init_from={run} model.n_layer=1", "model.n_layer is 1 but 2 in init_from"),
    (78, TRAIN + " init_from={exported} model.n_positions=64", "model.n_positions is 64"),
    # A run that goes on.
    (78, "train {config} optimizer.learning_rate=1.0", "optimizer.learning_rate is 1.0 but the run has 0.0006"),
    (78, "train {config} training.seed=7", "training.seed is 7 but the run has 0", "--allow-change training.seed"),
    (78, "train {config} model.n_layer=1 --allow-change model.n_layer", "checkpoint differs", "saved"),
    # Models.
    (66, "generate {tmp}/none --prompt x", "/none"),
    (66, "generate {dataset} --prompt x", "dataset"),
    (66, "generate {run} --prompt x --step 3", "no checkpoint 3", "2, 4"),
    (66, "generate {run}/checkpoints/3 --prompt x", "no checkpoint 3"),
    (65, "generate {run} --prompt " + 32 * "我", "33 tokens", "32 positions"),
    (66, "evaluate {tmp}/none", "/none"),
    (66, "evaluate {run} --data {tmp}/none", "/none"),
    (65, "evaluate {run} --data {tmp}/file", "/file"),
    (65, "evaluate {run} --data {tmp}/empty.txt", "empty.txt"),
    (78, "evaluate {run} --seq-length 33", "--seq-length 33", "32"),
    (66, "export {tmp}/none {tmp}/new", "/none"),
    (66, "export {run} {tmp}/new --step 3", "no checkpoint 3"),
    (64, "export {run} {tmp}/new --max-shard-size 2XB", "not a size: '2XB'", "such as 2GB"),
    (66, "export {run} {tmp}/new --card-extra {tmp}/none", "cannot be read", "/none"),
    (66, "push {tmp}/none somebody/model", "/none"),
    (65, "push {run} somebody/model", "no SHA256SUMS", "gpt2-flax export"),
    (66, "import {tmp}/none {tmp}/new", "/none"),
    (66, "import {tmp}/no-weights {tmp}/new", "no weights", "no-weights"),
    (65, "import {tmp}/bert {tmp}/new", "model_type 'bert'"),
]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("exit_code", "command", "words"), [(code, command, words) for code, command, *words in FAILURES]
)
def test_what_goes_wrong_is_one_line_and_publishes_nothing(inputs, capsys, exit_code, command, words):
    before = contents(inputs["tmp"])
    fails(capsys, exit_code, [part.format(**inputs) for part in command.split(" ") if part], *words)
    assert contents(inputs["tmp"]) == before


@pytest.mark.parametrize("output", ["photos", "file", "file/below", "ours"])
@pytest.mark.parametrize(
    "command",
    [
        "tokenizer {corpus} --output {output}",
        "prepare {corpus} --tokenizer {tokenizer} --output {output}",
        "train {config} output={output}",
        "export {run} {output}",
        "import {exported} {output}",
    ],
)
def test_an_output_that_is_there_stays_as_it_is(inputs, capsys, command, output):
    shutil.copytree(inputs["tokenizer"], inputs["tmp"] / "ours")  # only --overwrite may replace it
    before = contents(inputs["tmp"])
    inputs = inputs | {"output": inputs["tmp"] / output}
    fails(capsys, 73, command.format(**inputs).split(), str(inputs["output"]))
    if output != "ours" and not command.startswith("train"):
        fails(capsys, 73, [*command.format(**inputs).split(), "--overwrite"], str(inputs["output"]))
    assert contents(inputs["tmp"]) == before


def flip_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def damage_step(run: Path, step: int) -> None:
    """Flips a bit in all files with numbers: orbax keeps what each process wrote, and what it made of that."""
    for path in (run / f"checkpoints/{step}/model").rglob("d/*"):
        flip_bit(path)


def _flip_last_id(dataset: Path) -> None:
    path = dataset / "train/tokens-00000.bin"
    path.write_bytes(path.read_bytes()[:-2] + b"\xff\xff")


DAMAGES = {
    "not json": (lambda dataset: (dataset / "dataset.json").write_text("{"), "dataset.json"),
    "not utf-8": (lambda dataset: (dataset / "dataset.json").write_bytes(b"\xff{}"), "dataset.json"),
    "field missing": (lambda dataset: (dataset / "dataset.json").write_text("{}"), "format"),
    "truncated": (lambda dataset: os.truncate(dataset / "train/tokens-00000.bin", 100), "tokens-00000.bin"),
    "missing": (lambda dataset: (dataset / "validation/offsets-00000.bin").unlink(), "validation/offsets-00000.bin"),
    "id out of range": (_flip_last_id, "token id 65535"),
}


@pytest.mark.slow
@pytest.mark.parametrize(("damage", "word"), DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_dataset_is_named(inputs, capsys, damage, word):
    dataset = inputs["tmp"] / "dataset"
    shutil.copytree(inputs["dataset"], dataset)
    damage(dataset)
    arguments = TRAIN.format(**inputs).split()
    many_rows = ("data.global_batch_size=1024", "training.total_steps=1", "model.n_layer=1")  # the whole split
    fails(capsys, 65, [*arguments, f"data.dataset={dataset}", *many_rows], word)


def test_a_dataset_of_another_tokenizer_is_refused(inputs, capsys, monkeypatch):
    folder = inputs["tmp"]
    lines = (inputs["tokenizer"] / "vocab.txt").read_text(encoding="utf-8").split("\n")
    lines[-2], lines[-3] = lines[-3], lines[-2]
    (folder / "vocab.txt").write_text("\n".join(lines), encoding="utf-8")
    arguments = ["prepare", inputs["corpus"], "--tokenizer", folder / "vocab.txt", "--output", folder / "other"]
    assert cli.exit_code([*map(str, arguments), "--validation-fraction", "0.1"]) == 0
    fails(capsys, 78, ["evaluate", inputs["run"], "--data", folder / "other"], "another tokenizer", "other")
    fails(capsys, 78, ["train", inputs["config"], f"data.dataset={folder / 'other'}"], "another tokenizer", "other")

    # To start from weights with it may be meant: a warning, before the first step.
    monkeypatch.setattr("gpt2_flax.training.loop.run_steps", lambda *arguments: None)
    arguments = [TRAIN.format(**inputs), f"data.dataset={folder / 'other'}", f"init_from={inputs['exported']}"]
    capsys.readouterr()
    assert cli.exit_code(" ".join(arguments).split()) == 0
    assert "warning: " in capsys.readouterr().out


def test_two_processes_do_not_train_in_one_folder(inputs, capsys):
    with open(inputs["run"] / "lock", encoding="utf-8") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        fails(capsys, 73, ["train", inputs["config"]], str(inputs["run"]), f"process {os.getpid()} on ", "since")


def test_a_change_that_was_allowed_is_made(inputs, capsys):
    run = inputs["tmp"] / "run"
    shutil.copytree(inputs["run"], run)
    arguments = ["train", str(inputs["config"]), f"output={run}", "optimizer.learning_rate=1.0"]
    fails(capsys, 78, arguments, "optimizer.learning_rate")
    assert cli.exit_code([*arguments, "--allow-change", "optimizer.learning_rate"]) == 0
    assert "learning_rate = 1.0" in (run / "config.toml").read_text()


@pytest.mark.slow
def test_a_damaged_checkpoint_is_passed_over_with_a_warning(inputs, capsys):
    run = inputs["tmp"] / "run"
    shutil.copytree(inputs["run"], run)
    damage_step(run, 4)
    before = contents(run)
    evaluation = ["evaluate", str(run), "--batch-size", "8", "--batches", "1"]
    assert cli.exit_code(evaluation) == 0
    used, err = capsys.readouterr()
    assert err.startswith("warning: checkpoint 4 is damaged ")
    assert err.endswith("; using 2\n")
    assert err.count("\n") == 1
    assert cli.exit_code([*evaluation, "--step", "2"]) == 0
    assert capsys.readouterr().out == used
    capsys.readouterr()
    assert cli.exit_code([*evaluation, "--step", "4"]) == 74
    assert "error: checkpoint 4 is damaged" in capsys.readouterr().err
    assert contents(run) == before  # to look at a run changes nothing

    assert cli.exit_code(["train", str(inputs["config"]), f"output={run}"]) == 0
    out = capsys.readouterr().out
    assert "warning: checkpoint 4 is damaged" in out
    assert "resumed from step 2" in out
    assert [path.name for path in (run / "damaged").iterdir()] == ["4-0"]


def test_a_run_with_damaged_checkpoints_alone_never_starts_anew(inputs, capsys):
    run = inputs["tmp"] / "run"
    shutil.copytree(inputs["run"], run)
    for step in (2, 4):
        flip_bit(run / f"checkpoints/{step}/meta/metadata")
    files = len([path for path in run.rglob("*") if "ocdbt" in path.parts])
    for _ in range(2):
        fails(capsys, 74, ["train", inputs["config"], f"output={run}"], "no usable checkpoint", str(run))
        assert len([path for path in run.rglob("*") if "ocdbt" in path.parts]) == files


def test_a_run_that_has_lost_its_checkpoints_never_starts_anew(inputs, capsys):
    run = inputs["tmp"] / "run"
    shutil.copytree(inputs["run"], run)
    shutil.rmtree(run / "checkpoints")
    (run / "checkpoints").mkdir()
    before = contents(run)
    lost = "the run has lost its checkpoints, the last was 4"
    fails(capsys, 74, ["train", inputs["config"], f"output={run}"], lost, str(run))
    assert contents(run).keys() == before.keys()
    (run / "metrics.jsonl").unlink()
    (run / "damaged/4-0").mkdir(parents=True)
    fails(capsys, 74, ["train", inputs["config"], f"output={run}"], lost)


ODD = [
    b"\xff\n",
    b"[]\n",
    b"7\n",
    b'{"step": "9"}\n',
    b'{"step": 9.5}\n',
    b'{"time": 1}\n',
    b"[" * 9999,
    b'{"step": true}\n',
    b"\0",
]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["metrics.jsonl", "samples.txt"])
def test_odd_lines_do_not_block_a_restart(inputs, capsys, name):
    run = inputs["tmp"] / "run"
    shutil.copytree(inputs["run"], run)
    (run / name).write_bytes(b"".join(ODD))
    arguments = ["train", str(inputs["config"]), f"output={run}"]
    more = ["training.total_steps=5", "--allow-change", "training.total_steps"]
    assert cli.exit_code([*arguments, *more]) == 0
    assert "resumed from step 4" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("content", [None, b"", b"output = \n", b"\xff\xfe"], ids=["lost", "empty", "no TOML", "bytes"])
def test_a_lost_config_is_that_of_the_checkpoint(inputs, capsys, content):
    run = inputs["tmp"] / "run"
    shutil.copytree(inputs["run"], run)
    config = (run / "config.toml").read_bytes()
    (run / "config.toml").unlink() if content is None else (run / "config.toml").write_bytes(content)
    arguments = ["train", str(inputs["config"]), f"output={run}"]
    fails(capsys, 78, [*arguments, "optimizer.learning_rate=1.0"], "optimizer.learning_rate is 1.0 but the run has")
    evaluation = ["evaluate", str(run), "--batch-size", "8", "--batches", "1"]
    assert cli.exit_code(evaluation) == 0
    assert cli.exit_code(arguments) == 0
    assert (run / "config.toml").read_text() == config.decode().replace(str(inputs["run"]), str(run))


def test_a_damaged_tokenizer_of_a_run_is_found_and_copied_again(inputs, capsys):
    run = inputs["tmp"] / "run"
    shutil.copytree(inputs["run"], run)
    path = run / "tokenizer/vocab.txt"
    before = path.read_bytes()
    lines = before.splitlines()
    lines[-1], lines[-2] = lines[-2], lines[-1]
    path.write_bytes(b"\n".join(lines) + b"\n")
    fails(capsys, 65, ["generate", run, "--prompt", "这"], "tokenizer is damaged", str(run / "tokenizer"))
    assert cli.exit_code(["train", str(inputs["config"]), f"output={run}"]) == 0
    assert f"moved to {run / 'damaged/tokenizer-0'}; copied again" in capsys.readouterr().out
    assert path.read_bytes() == before


@pytest.mark.slow
def test_json_has_the_figures_of_the_text(inputs, capsys):
    def printed(*arguments: str) -> str:
        assert cli.exit_code(list(arguments)) == 0
        return capsys.readouterr().out

    run, dataset = str(inputs["run"]), str(inputs["dataset"])
    figures = json.loads(printed("evaluate", run, "--json"))
    text = printed("evaluate", run)
    bits = f"bits/character {figures['bits_per_character']:.4f}  accuracy {figures['accuracy']:.1%}"
    assert text == (
        f"loss {figures['loss']:.4f}  perplexity {figures['perplexity']:.2f}  {bits}  tokens {figures['tokens']:,}\n"
    )
    seen = json.loads(printed("inspect", dataset, "--json"))
    split = TokenDataset(inputs["dataset"]).train
    assert seen["vocab_size"] == TokenDataset(inputs["dataset"]).info.vocab_size
    assert (seen["splits"]["train"]["documents"], seen["splits"]["train"]["tokens"]) == (
        split.n_documents,
        split.n_tokens,
    )
    assert seen["splits"]["train"]["quantiles"]["100"] == max(len(ids) for ids in split.documents())
    config = str(inputs["run"] / "config.toml")
    (plan,) = json.loads(printed("plan", config, "--json"))
    lines = printed("plan", config).splitlines()
    assert lines[0].startswith(f"parameters              {plan['parameters']:,}: ")
    total = sum(plan["memory"][name] for name in ("parameters", "gradients", "optimizer", "activations", "loss"))
    assert plan["memory"]["total"] == total
    assert math.prod(plan["mesh"].values()) == plan["devices"]["count"]
    assert plan["tokens"] == plan["steps"] * plan["tokens_per_step"]


@pytest.mark.slow
def test_checkpoints_are_listed_and_verified(inputs, capsys):
    run = inputs["tmp"] / "run"
    shutil.copytree(inputs["run"], run)
    before = contents(run)
    assert cli.exit_code(["checkpoints", str(run)]) == 0
    out, err = capsys.readouterr()
    assert not err
    header, *lines = out.splitlines()
    assert header.split() == ["step", "saved", "loss", "validation", "size", "state"]
    assert [(line.split()[0], line.split()[-1]) for line in lines] == [("2", "committed"), ("4", "committed")]
    assert cli.exit_code(["checkpoints", str(run), "--verify", "--json"]) == 0
    two, four = json.loads(capsys.readouterr().out)
    logged = {}
    for line in (run / "metrics.jsonl").read_text().splitlines():
        record = json.loads(line)
        logged.setdefault(record["step"], {}).update(record)
    for found, step in ((two, 2), (four, 4)):
        assert (found["step"], found["state"], found["damage"]) == (step, "verified", None)
        assert found["train_loss"] == logged[step].get("train/loss", found["train_loss"])
        assert found["validation_loss"] == logged[step].get("validation/loss")
        assert abs(found["time"] - logged[step]["time"]) < 600
        assert found["bytes"] == sum(path.stat().st_size for path in Path(found["path"]).rglob("*") if path.is_file())

    damage_step(run, 2)
    (run / "damaged").mkdir()
    (run / "checkpoints/4").rename(run / "damaged/4-0")
    assert cli.exit_code(["checkpoints", str(run), "--verify", "--json"]) == 74
    out, err = capsys.readouterr()
    assert err == f"error: damaged checkpoints: 2: {run}; train passes them over; export or evaluate another step\n"
    two, four = json.loads(out)
    assert (two["state"], bool(two["damage"])) == ("damaged", True)
    assert (four["step"], four["state"], four["damage"]) == (4, "set aside", None)
    assert {path for path in contents(run) if path.suffix == ".json"} == {
        path for path in before if path.suffix == ".json"
    }
    fails(capsys, 66, ["checkpoints", inputs["tmp"] / "photos"], "no checkpoint yet")


@pytest.mark.slow
def test_the_best_checkpoint_is_read_wherever_a_model_is(inputs, capsys):
    run = inputs["tmp"] / "run"
    shutil.copytree(inputs["run"], run)
    for step, loss in ((2, 1.5), (4, 2.5)):
        path = run / f"checkpoints/{step}/meta/metadata"
        content = json.loads(path.read_text())["content"] | {"metrics": {"validation/loss": loss}}
        path.write_text(json.dumps(sealed(content)))
    for command in ("evaluate {} --batch-size 8 --batches 1", "generate {} --prompt 这 --max-new-tokens 3"):
        printed = []
        for options in (["--step", "2"], ["--best"], []):
            assert cli.exit_code([*command.format(run).split(), *options]) == 0
            printed.append(capsys.readouterr().out)
        assert printed[0] == printed[1]
        assert printed[0] != printed[2] or command.startswith("generate")
    for command in ("export {} {}", "convert {} {}"):
        output = inputs["tmp"] / command.split()[0]
        assert cli.exit_code([*command.format(run, output).split(), "--best"]) == 0
        assert "1.5" in (output / "README.md").read_text() or command.startswith("convert")
        assert cli.exit_code([*command.format(run, f"{output}-mean").split(), "--average", "2"]) == 0
        mean = Path(f"{output}-mean/README.md").read_text()
        assert "mean of the checkpoints of steps 2, 4 |" in mean or command.startswith("convert")
        assert load_file(f"{output}-mean/model.safetensors").keys() == load_file(output / "model.safetensors").keys()
    fails(capsys, 64, ["evaluate", run, "--best", "--step", "2"], "--step and --best")
    fails(capsys, 64, ["evaluate", run / "checkpoints/2", "--best"], "--best is for a run folder")
    fails(capsys, 64, ["evaluate", output, "--average", "2"], "--average is for a run")
    path.write_text(json.dumps(sealed(content | {"metrics": {}})))
    shutil.rmtree(run / "checkpoints/2")
    fails(capsys, 66, ["evaluate", run, "--best"], "no checkpoint has a validation loss")


# Help, and what is nobody's fault but ours.


@pytest.mark.parametrize("command", COMMANDS)
def test_help_names_every_option(capsys, command):
    assert set(typer.main.get_command(app).commands) == set(COMMANDS)
    assert cli.exit_code([command, "--help"]) == 0
    out, err = capsys.readouterr()
    assert not err
    parameters = typer.main.get_command(app).commands[command].params
    for parameter in parameters:
        is_argument = parameter.param_type_name == "argument"
        shown = parameter.metavar or parameter.name if is_argument else max(parameter.opts, key=len)
        assert shown.lower() in out.lower()
        assert parameter.help


def test_keys_names_every_key(capsys):
    assert cli.exit_code(["keys"]) == 0
    out = capsys.readouterr().out
    assert "optimizer.learning_rate            0.02       highest learning rate" in out
    assert len(out.splitlines()) == len(set(out.splitlines())) > 35


@pytest.mark.multiprocess
def test_help_needs_nothing_but_typer():
    code = (
        "import sys; from gpt2_flax.__main__ import exit_code; assert exit_code(['train', '--help']) == 0;"
        "print(*sorted({name.partition('.')[0] for name in sys.modules}))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=processes_environment(), capture_output=True, text=True, check=True
    )
    loaded = set(done.stdout.splitlines()[-1].split())
    heavy = "jax jaxlib flax optax orbax numpy torch transformers tokenizers sentencepiece safetensors tensorboardX"
    assert "typer" in loaded
    assert not loaded & set(heavy.split())


def test_a_bug_leaves_its_traceback_in_a_file(inputs, capsys, monkeypatch):
    def broken(*arguments, **options):
        raise ZeroDivisionError("oh no")

    monkeypatch.setattr("gpt2_flax.data.prepare.prepare", broken)
    monkeypatch.setattr(tempfile, "tempdir", str(inputs["tmp"]))
    fails(capsys, 70, PREPARE.format(**inputs).split(), "ZeroDivisionError", "please report")
    (log,) = inputs["tmp"].glob("gpt2-flax-crash-*.log")
    assert "Traceback" in log.read_text()
    assert "oh no" in log.read_text()

    monkeypatch.setenv(DEBUG, "1")
    assert cli.exit_code(PREPARE.format(**inputs).split()) == 70
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.multiprocess
@pytest.mark.parametrize("problem", ["closed pipe", "full disk"])
def test_output_that_cannot_be_written_is_no_success(problem):
    command = [sys.executable, "-m", "gpt2_flax", "keys"]
    if problem == "closed pipe":
        reading, writing = os.pipe()
        os.close(reading)
    else:
        writing = os.open("/dev/full", os.O_WRONLY)
    done = subprocess.run(command, env=processes_environment(), stdout=writing, stderr=subprocess.PIPE, text=True)
    os.close(writing)
    if problem == "closed pipe":
        assert (done.returncode, done.stderr) == (128 + signal.SIGPIPE, "")  # as of any program in a pipe
    else:
        assert done.returncode == 74
        assert done.stderr.startswith("error: disk full: ")


def test_without_a_command_the_help_is_printed(capsys):
    assert cli.exit_code([]) == 0
    printed = capsys.readouterr().out
    assert cli.exit_code(["--help"]) == 0
    assert capsys.readouterr().out == printed
    assert set(COMMANDS) <= {line.split()[0] for line in printed.splitlines() if line.startswith("  ")}


@pytest.mark.parametrize("command", [[], ["train"]])
def test_help_has_a_short_name(capsys, command):
    assert cli.exit_code([*command, "-h"]) == 0
    printed = capsys.readouterr().out
    assert "Usage: gpt2-flax" in printed
    assert "-h, --help" in printed


@pytest.mark.multiprocess
def test_a_shell_completes_commands_and_options():
    for words, expected in (("gpt2-flax tra", ["train"]), ("gpt2-flax train --max", ["--max-hours"])):
        words_of = {"COMP_WORDS": words, "COMP_CWORD": str(words.count(" ")), "_GPT2_FLAX_COMPLETE": "complete_bash"}
        command, environment = [sys.executable, "-m", "gpt2_flax"], processes_environment(**words_of)
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        assert done.stdout.split() == expected
