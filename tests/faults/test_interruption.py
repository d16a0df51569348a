"""Signals such as Ctrl-C and SIGTERM, sent to real processes: one line, an exit code, and no files left behind."""

import os
import re
import shlex
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from support.configs import changed

from gpt2_flax.config.parse import dump_config
from gpt2_flax.folders import new_folder
from gpt2_flax.interruption import FirstSignal

ROOT = Path(__file__).parents[2]
MOMENTS = 5
HEAD = "import hashlib, os, signal, sys, threading, time; from pathlib import Path; "
CODES = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGHUP: 129, signal.SIGUSR1: 138, signal.SIGUSR2: 140}
COMPUTE = "hashlib.pbkdf2_hmac('sha256', b'', b'', 10**9)"  # an hour in C code that does not handle signals


def start(folder, *arguments, code=None, **options):
    """Start the program, or `code`, in a process; return once it handles SIGTERM, which it does first."""
    environment = {name: value for name, value in os.environ.items() if name not in ("XLA_FLAGS", "GPT2_FLAX_DEBUG")}
    environment |= {"PYTHONPATH": str(ROOT)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "encoding": "utf-8"}
    program = ["-c", HEAD + code] if code else ["-m", "gpt2_flax"]
    command = [sys.executable, *program, *map(str, arguments)]
    process = subprocess.Popen(command, cwd=folder, env=environment, **pipes, **options)
    while process.poll() is None and not catches(process.pid, signal.SIGTERM):
        time.sleep(0.001)
    return process


def catches(pid, number):
    status = Path(f"/proc/{pid}/status").read_text()
    return bool(int(re.search(r"SigCgt:\s*(\w+)", status)[1], 16) >> (number - 1) & 1)


def ended(process):
    """Return exit code, standard output and standard error of a process that ends itself."""
    try:
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
    return process.returncode, out, err


pytestmark = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="asks /proc which signals are caught")


@pytest.fixture(scope="module")
def made(corpus, tokenizer_folder, dataset_folder, tmp_path_factory):
    """Return the inputs of the commands, among them a finished run."""
    from gpt2_flax.config.parse import parse_config
    from gpt2_flax.training.loop import train

    folder = tmp_path_factory.mktemp("made")
    values = {
        "output": str(folder / "run"),
        "model": {"n_positions": 32, "n_layer": 2, "n_head": 8, "n_embd": 32, "dtype": "float32"},
        "data": {"dataset": str(dataset_folder), "seq_length": 16, "global_batch_size": 16},
        "optimizer": {"name": "adamw"},
        "training": {"total_steps": 2, "log_every": 20, "evaluation_batches": 1},
    }
    config = parse_config(values, "test")
    train(config)
    endless = changed(config, output="new", training__total_steps=10**6, training__evaluate_every=10**6)
    (folder / "endless.toml").write_text(dump_config(endless), encoding="utf-8")
    return {"corpus": corpus, "tokenizer": tokenizer_folder, "run": folder / "run", "endless": folder / "endless.toml"}


COMMANDS = [
    "tokenizer {corpus} --output new --vocab-size 100",
    "prepare {corpus} --tokenizer {tokenizer} --output new --validation-fraction 0.1",
    "train {endless}",
    "evaluate {run}",
    "generate {run} --prompt 这是 --max-new-tokens 8",
    "export {run} new",
]


@pytest.mark.slow(20)
@pytest.mark.multiprocess
@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.split()[0])
def test_a_signal_at_any_moment_ends_a_command_with_one_line(command, made, tmp_path):
    name, *arguments = command.format(**made).split()
    (tmp_path / "whole").mkdir()
    begun = time.monotonic()
    whole = start(tmp_path / "whole", name, *arguments)
    if name == "train":
        while not whole.stdout.readline().startswith("step "):
            assert whole.poll() is None
    else:
        code, expected, err = ended(whole)
        assert (code, err) == (0, "")
    took = time.monotonic() - begun
    whole.kill()
    whole.communicate()

    def interrupt(moment):
        folder = tmp_path / str(moment)
        folder.mkdir()
        number = [*CODES][moment % 5]
        process = start(folder, name, *arguments)
        time.sleep(took * moment / MOMENTS)
        process.send_signal(number)
        return number, folder, *ended(process)

    with ThreadPoolExecutor(2) as pool:
        results = list(pool.map(interrupt, range(MOMENTS)))
    for number, folder, code, out, err in results:
        going_on = shlex.join(["gpt2-flax", name, *arguments])
        saved = re.fullmatch(rf"stopped at step (\d+), saved: new; to go on: {re.escape(going_on)}\n", err)
        if code == 0:
            assert (name, out) == (name, expected)
            continue
        if name == "train" and saved:
            assert code == 75
            assert (folder / "new/checkpoints" / saved[1] / "_CHECKPOINT_METADATA").is_file()
            continue
        by = "Ctrl-C" if number == signal.SIGINT else number.name
        expected_code = 75 if name == "train" and number != signal.SIGINT else CODES[number]
        assert err == (
            f"error: interrupted: gpt2-flax {name}, by {by}; "
            "run the same command again: it starts over, or resumes where it can\n"
        )
        assert code == expected_code
        assert name == "prepare" or not list(folder.glob(".*"))  # `prepare` resumes from its hidden folder
    assert sum(code != 0 for _, _, code, _, _ in results) >= MOMENTS / 2


@pytest.mark.multiprocess
def test_a_signal_to_all_processes_of_prepare_ends_all_with_one_line(made, tmp_path):
    (tmp_path / "corpus.txt").write_text(made["corpus"].read_text(encoding="utf-8") * 60, encoding="utf-8")
    arguments = ["prepare", tmp_path / "corpus.txt", "--tokenizer", made["tokenizer"], "--output"]
    code = (
        "import gpt2_flax.text.corpus as corpus; corpus.SMALLEST_UNIT_BYTES = 2**17\n"
        "from gpt2_flax.__main__ import main\n"
        "if __name__ == '__main__': main()"
    )

    def interrupt(moment):
        number = [*CODES][moment % 5]
        arguments_here = [*arguments, str(moment), "--workers", "2"]
        process = start(tmp_path, *arguments_here, code=code, start_new_session=True)
        time.sleep(0.15 * moment)
        os.killpg(process.pid, number)
        result = ended(process)
        patience = time.monotonic() + 10
        while processes_of(process.pid) and time.monotonic() < patience:
            time.sleep(0.05)
        return number, *result, processes_of(process.pid)

    with ThreadPoolExecutor(2) as pool:
        results = list(pool.map(interrupt, range(10)))
    for number, code, _, err, left in results:
        by = "Ctrl-C" if number == signal.SIGINT else number.name
        assert code in (0, CODES[number])
        assert code == 0 or err.startswith(f"error: interrupted: gpt2-flax prepare, by {by}; ")
        assert (err.count("\n"), left) == (code != 0, [])
    assert sum(code != 0 for _, code, *_ in results) >= 6


def processes_of(session):
    """Return the processes of a session that are not zombies."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, _, number = path.read_text().rpartition(")")[2].split()[:4]
        except OSError:  # it has ended
            continue
        if int(number) == session and state != "Z":
            found.append(path.parent.name)
    return found


def run_as_prepare(body):
    """Return the code of a program whose command `prepare` calls `body`."""
    return (
        "import gpt2_flax.__main__; import gpt2_flax.data.prepare as p; from gpt2_flax.interruption import *; "
        "from gpt2_flax.folders import new_folder\n"
        "def body(*a, **k):\n"
        + "".join(f"    {line}\n" for line in body.splitlines())
        + "p.prepare = body\ngpt2_flax.__main__.main()"
    )


@pytest.mark.multiprocess
def test_a_signal_in_a_callback_that_swallows_exceptions_is_not_lost(made, tmp_path):
    body = (
        "import gc\n"
        "gc.callbacks.append(lambda *a: os.kill(os.getpid(), signal.SIGINT))\n"
        "gc.collect()\n"
        "gc.callbacks.clear()\n"
        "time.sleep(60)"
    )
    arguments = f"prepare {made['corpus']} --tokenizer {made['tokenizer']} --output new".split()
    code, out, err = ended(start(tmp_path, *arguments, code=run_as_prepare(body)))
    assert (code, out, err.count("\n")) == (130, "", 1)
    assert err.startswith("error: interrupted: ")


def in_prepare(made, folder, body):
    """Start `body` as the command, and wait until it has printed a line."""
    arguments = f"prepare {made['corpus']} --tokenizer {made['tokenizer']} --output new".split()
    process = start(folder, *arguments, code=run_as_prepare(body))
    assert process.stdout.readline() == "now\n"
    return process


@pytest.mark.multiprocess
def test_a_signal_while_c_code_computes_ends_the_process_and_removes_what_was_unfinished(made, tmp_path):
    body = f"with new_folder(Path('new'), 'x') as f:\n    (f / 'x').touch(); print('now', flush=True); {COMPUTE}"
    process = in_prepare(made, tmp_path, body)
    assert any(path.is_dir() for path in tmp_path.iterdir())
    process.send_signal(signal.SIGTERM)
    code, _, err = ended(process)
    assert (code, err.count("\n")) == (143, 1)
    assert not list(tmp_path.iterdir())


@pytest.mark.multiprocess
def test_what_is_being_removed_is_never_published(made, tmp_path):
    body = (
        "import shutil; removed = threading.Event(); remove = shutil.rmtree\n"
        "def slowly(*given, **options):\n    removed.set(); time.sleep(1); remove(*given, **options)\n"
        "shutil.rmtree = slowly\n"
        "with new_folder(Path('new'), 'x') as f:\n    (f / 'x').touch(); print('now', flush=True); removed.wait()"
    )
    process = in_prepare(made, tmp_path, body)
    process.send_signal(signal.SIGINT)
    code, _, err = ended(process)
    assert (code, err.count("\n")) == (130, 1)
    assert not list(tmp_path.iterdir())


@pytest.mark.multiprocess
def test_a_second_signal_does_not_wait_for_the_clean_up(made, tmp_path):
    body = "def slowly(): print('now', flush=True); time.sleep(100)\nwith cleaned_up(slowly): slowly()"
    process = in_prepare(made, tmp_path, body)
    process.send_signal(signal.SIGINT)
    assert process.stdout.readline() == "now\n"
    begun = time.monotonic()
    process.send_signal(signal.SIGINT)
    code, _, err = ended(process)
    assert (code, err.count("\n")) == (130, 1)
    assert time.monotonic() - begun < 4  # without the second signal it waits for five seconds


@pytest.mark.multiprocess
@pytest.mark.parametrize("number", CODES)
def test_a_second_signal_ends_at_once_what_the_first_asked_to_stop(number, made, tmp_path):
    process = in_prepare(made, tmp_path, f"with FirstSignal() as first:\n    print('now', flush=True); {COMPUTE}")
    process.send_signal(number)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(1)
    process.send_signal(number)
    code, _, err = ended(process)
    assert (code, err.count("\n")) == (CODES[number], 1)


@pytest.mark.multiprocess
@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2])
def test_a_signal_that_nohup_or_a_launcher_ignores_stays_ignored(number, made, tmp_path):
    arguments = f"prepare {made['corpus']} --tokenizer {made['tokenizer']} --output new".split()
    body = "with FirstSignal() as first:\n    os.kill(os.getpid(), NUMBER); time.sleep(0.5)\n"
    body += "os.kill(os.getpid(), NUMBER); time.sleep(0.5); print(first.number, signal.getsignal(NUMBER).name)\n"
    body += "raise OSError(28, '', 'the end')"
    code = run_as_prepare(body.replace("NUMBER", str(int(number))))
    ignoring = f"import signal; signal.signal({int(number)}, signal.SIG_IGN)\n"
    code, out, err = ended(start(tmp_path, *arguments, code=ignoring + code))
    assert (code, out) == (74, "None SIG_IGN\n")
    assert err.startswith("error: disk full: the end; ")


@pytest.mark.multiprocess
def test_a_signal_that_comes_twice_at_once_is_one(made, tmp_path):
    body = (
        "with FirstSignal() as first:\n"
        "    os.kill(os.getpid(), 15); os.kill(os.getpid(), 15); time.sleep(1)\n"
        "print('now', first.number, flush=True)"
    )
    arguments = f"prepare {made['corpus']} --tokenizer {made['tokenizer']} --output new".split()
    code, out, err = ended(start(tmp_path, *arguments, code=run_as_prepare(body + "; first.check()")))
    assert (code, out) == (143, "now 15\n")
    assert err.startswith("error: interrupted: gpt2-flax prepare, by SIGTERM; ")


@pytest.mark.multiprocess
def test_a_signal_after_the_end_changes_nothing(made, tmp_path):
    """Exit handlers of libraries change no exit code, and a second signal skips them."""
    late = "import atexit\ndef slowly(): print('now', flush=True); time.sleep(100)\natexit.register(slowly)\n"
    late += "raise OSError(28, '', 'x')"
    process = in_prepare(made, tmp_path, late)
    process.send_signal(signal.SIGINT)
    time.sleep(0.5)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    code, _, err = ended(process)
    assert code == 74
    assert err.startswith("error: disk full: x; ")
    assert err.count("\n") == 1


def test_outside_the_program_a_second_signal_does_what_it_did_before():
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores SIGINT
    try:
        with FirstSignal() as first:
            signal.raise_signal(signal.SIGINT)
            assert first.number == signal.SIGINT
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_folder_that_is_finished_is_no_longer_cleaned_up(tmp_path):
    from gpt2_flax import interruption

    before = list(interruption.clean_ups)
    with new_folder(tmp_path / "new", "x") as folder:
        assert len(interruption.clean_ups) == len(before) + 1
        (folder / "x").touch()
    assert interruption.clean_ups == before


# Leaves a coroutine that nobody awaits, as tensorstore does when one of several reads fails.
LEFT_READ = """
import sys
from gpt2_flax import cli
from gpt2_flax.__main__ import main
async def read(): pass
def app(*arguments, **options):
    read()
    print("one line", file=sys.stderr)
cli.app = app
main()
"""


@pytest.mark.multiprocess
def test_a_read_that_was_not_begun_is_no_warning():
    done = subprocess.run([sys.executable, "-c", LEFT_READ], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "one line\n")
