"""Kill a training run again and again, and require the bits of an undisturbed run.

One process imports JAX and forks each trial before a backend exists, so a kill costs little more than the start of a
run. The runs train a model of two layers with dropout for 60 steps and save every third step. Kills come at random
moments: 15% during the start, the others after the first new step. When a run has all its steps, the script requires:

* metrics.jsonl has every step, and every number, repeated steps included, equals the undisturbed run's;
* parameters and optimizer state of the last step equal the undisturbed run's bit by bit;
* each start resumed from the newest committed step;
* no temporary file is left, the same steps are kept, and all kept steps pass verification.

    python scripts/kill_loop.py                              # 20 kills of one process
    python scripts/kill_loop.py --kills 200 --seed random    # for a night
    python scripts/kill_loop.py --kills 6 --processes 2      # kills one of two processes, or both
    python scripts/kill_loop.py --kills 0 --crash-at all     # kills at each named point, see POINTS
    python scripts/kill_loop.py --kills 2 --forget rng       # each resume forgets something: must fail

The exit code is 0 if everything holds, else 1; then the folder stays.
"""

import argparse
import atexit
import contextlib
import json
import os
import random
import re
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import NoReturn

TOTAL, SAVE_EVERY = 60, 3
LONGEST = 180.0  # seconds that a trial may take
IN_START = 0.15  # share of the kills
OF_SPEED = {"time", *(f"train/{name}" for name in ("tokens_per_second", "real_tokens_per_second", "mfu"))}
OF_SPEED |= {"train/data_wait_s", "train/device_memory_peak_bytes"}

_STEP = r"/checkpoints/\d+"
POINTS = {
    "lock": ("open", r"/lock$"),
    "config": ("os.rename", r"/config\.toml$"),
    "tokenizer-incomplete": ("open", r"/tokenizer\.tmp/tokenizer_config\.json$"),
    "tokenizer": ("os.rename", r"/tokenizer$"),
    "save": ("os.mkdir", rf"{_STEP}\.orbax-checkpoint-tmp$"),
    "arrays": ("os.rename", r"orbax-checkpoint-tmp/model$"),
    "optimizer": ("os.rename", r"orbax-checkpoint-tmp/opt_state$"),
    "meta": ("os.rename", r"orbax-checkpoint-tmp/meta$"),
    "commit": ("os.rename", rf"{_STEP}$"),
    "committed": ("after os.rename", rf"{_STEP}$"),
    "pruning": ("os.rename", rf"{_STEP}\.deleted$"),
    "pruned": ("shutil.rmtree", rf"{_STEP}\.deleted$"),
    "pruned-incomplete": ("os.rmdir", r"^(model|opt_state)$"),  # only `rmtree` removes folders by these names
    "set-aside": ("os.rename", r"/damaged/"),
    "metrics": ("half a line", ""),
}
"""Name of a point -> the Python audit event before which the process ends, and a pattern of the file's name."""


class Failure(Exception):
    """A requirement does not hold."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--kills", type=int, default=20, help="number of kills at random moments")
    parser.add_argument("--seed", default="0", help="a number, or random")
    parser.add_argument("--processes", type=int, default=1, choices=(1, 2))
    parser.add_argument("--crash-at", nargs="+", default=[], metavar="POINT[:N]", help=f"all, or {', '.join(POINTS)}")
    parser.add_argument("--forget", choices=("opt", "rng", "data"), help="spoil each resume: the comparison must fail")
    parser.add_argument("--folder", type=Path, help="working folder, which stays")
    given = parser.parse_args()
    seed = random.randrange(2**32) if given.seed == "random" else int(given.seed)
    crashes = [f"{name}:1" for name in POINTS] if given.crash_at == ["all"] else given.crash_at
    for crash in crashes:
        if crash.partition(":")[0] not in POINTS:
            parser.error(f"no point {crash}: {', '.join(POINTS)}")
    folder, begun = given.folder or Path(tempfile.mkdtemp(prefix="gpt2-flax-kill-loop-")), time.monotonic()
    print(f"seed {seed}, folder {folder}", flush=True)
    prepare_parent(folder)
    loop = KillLoop(folder, given.processes, random.Random(seed), given.forget)
    try:
        loop.run(given.kills, crashes)
    except Failure as failure:
        print(f"FAILED after {loop.counts()}: {failure}", flush=True)
        return 1
    if given.folder is None:
        shutil.rmtree(folder)
    print(f"passed: {loop.counts()}; {time.monotonic() - begun:.0f} s", flush=True)
    return 0


def prepare_parent(folder: Path) -> None:
    """Import everything that a trial needs, and start nothing: a fork copies neither threads nor backends."""
    folder.mkdir(parents=True, exist_ok=True)
    os.environ |= {"JAX_PLATFORMS": "cpu", "PYTHONUTF8": "1"}
    os.environ |= {"JAX_COMPILATION_CACHE_DIR": str(folder / "compiled"), "XLA_FLAGS": ""}
    os.environ |= {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    sys.path.insert(0, str(Path(__file__).parents[1]))
    import gpt2_flax.__main__
    import gpt2_flax.cli
    import gpt2_flax.processes.launch
    import gpt2_flax.training.loop  # noqa: F401
    from gpt2_flax.cpu import tune_cpu
    from gpt2_flax.training.tensorboard import TensorBoard

    TensorBoard(folder, print)  # imports tensorboardX
    tune_cpu()  # the same for all commands: the first call in a process decides
    assert threading.active_count() == 1


def make_config(folder: Path, training: Mapping[str, int] = MappingProxyType({}), schedule: str = "cosine") -> Path:
    """Write a small corpus, its dataset and a config into `folder`; return the config's path."""
    from gpt2_flax.config.parse import dump_config, parse_config
    from gpt2_flax.data.prepare import prepare
    from gpt2_flax.tokenizers.tokenizer import load_tokenizer
    from gpt2_flax.tokenizers.train import train_wordpiece

    draw = random.Random(0)
    characters = "这是很久之前的事情了我们在北京看见一只大鸟飞过山河人说好天水火木金土日月年时书车马"
    starts = [(draw.randrange(40), draw.randint(1, 60)) for _ in range(400)]
    lines = ["".join(characters[(start + i) % 40] for i in range(length)) for start, length in starts]
    corpus, tokenizer, dataset, path = (folder / name for name in ("corpus.txt", "vocabulary", "data", "config.toml"))
    corpus.write_text("\n".join(lines) + "\n", encoding="utf-8")
    if not dataset.exists():
        tokenizer.mkdir(exist_ok=True)
        train_wordpiece(lines, vocab_size=100).save(tokenizer)
        with contextlib.redirect_stdout(None):
            prepare([str(corpus)], load_tokenizer(tokenizer), dataset, validation_fraction=0.1)
    values = {
        "output": str(folder / "undisturbed"),
        "model": {"n_positions": 32, "n_layer": 2, "n_head": 2, "n_embd": 32, "dtype": "float32", "resid_pdrop": 0.1},
        "data": {"dataset": str(dataset), "seq_length": 16, "global_batch_size": 8},
        "optimizer": {"name": "adamw", "learning_rate": 1e-2, "warmup": 2, "schedule": schedule},
        "training": {"total_steps": TOTAL, "save_every": SAVE_EVERY, "keep_checkpoints": 2, "log_every": 1}
        | {"evaluate_every": 15, "evaluation_batches": 1}
        | dict(training),
    }
    path.write_text(dump_config(parse_config(values, path)), encoding="utf-8")
    return path


def fork(call: Callable[[], object], log: Path) -> int:
    """Run `call` in a forked process that writes to `log`, and return its id. `call` determines its exit code."""
    sys.stdout.flush()
    if pid := os.fork():
        return pid
    from gpt2_flax import interruption

    code = 1
    try:
        file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, 1)
        os.dup2(file, 2)
        call()
        code = 0
    except SystemExit as end:
        code = end.code or 0
        # JAX's exit functions make its processes wait for each other. `_leave` must not run before them, as it would
        # here, because JAX was imported before the program began.
        atexit.unregister(interruption._leave)
        atexit._run_exitfuncs()
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(code)


def wait(pid: int, longest: float = LONGEST) -> int:
    """Return the exit code of a process; a negative one names the signal that killed it."""
    patience = time.monotonic() + longest
    while (done := os.waitpid(pid, os.WNOHANG)) == (0, 0):
        if time.monotonic() > patience:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            raise Failure(f"a process hung for {longest:.0f} s")
        time.sleep(0.002)
    return os.waitstatus_to_exitcode(done[1])


def command(*arguments: object) -> NoReturn:
    """Run `gpt2-flax` with these arguments in this process, and exit."""
    import gpt2_flax.__main__

    sys.argv = ["gpt2-flax", *map(str, arguments)]
    gpt2_flax.__main__.main()


class KillLoop:
    def __init__(self, folder: Path, processes: int, draw: random.Random, forget: str | None):
        self.folder, self.processes, self.draw, self.forget = folder, processes, draw, forget
        self.kills = dict.fromkeys(("in the start", "in training", "at named points"), 0)
        self.runs, self.numbers = 0, 0
        self.config = make_config(folder)
        self.run_folder = folder / f"undisturbed-{processes}"
        self.spoilt: set[int] = set()
        if not self.run_folder.exists():
            self._end_of(self._start())
        lines = metrics_of(self.run_folder)
        times = [line["time"] for line in lines]
        self.span, self.start_seconds = 0.3 * (times[-1] - times[0]), 2.0
        self.expected = {kind_of(line): numbers_of(line) for line in lines}
        self.kept, self.reference = committed(self.run_folder), self.run_folder

    def counts(self) -> str:
        kills = ", ".join(f"{count} {where}" for where, count in self.kills.items() if count)
        return f"{sum(self.kills.values())} kills ({kills}), {self.runs} runs whole, {self.numbers} lines equal"

    def run(self, kills: int, crashes: Sequence[str]) -> None:
        self._new_run()
        for crash in crashes:
            name, _, count = crash.partition(":")
            if name.startswith(("tokenizer", "metrics")) and committed(self.run_folder):
                self._finish()  # a run copies the tokenizer once
            # A run may end before it reaches the point. The next run starts from step 0.
            if not self._crash(name, int(count or 1)) and not self._crash(name, int(count or 1)):
                raise Failure(f"no process reached the point {crash}")
        while sum(self.kills.values()) < kills + len(crashes):
            self._kill()
        self._finish()

    def _new_run(self) -> None:
        self.run_folder, self.spoilt = self.folder / f"run-{self.runs}", set()
        shutil.rmtree(self.run_folder, ignore_errors=True)

    def _start(self, crash: tuple[str, int] | None = None) -> list[int]:
        """Start the processes of the run; the first process ends at `crash`."""
        arguments = ["train", self.config, f"output={self.run_folder}"]
        if self.processes > 1:
            with socket.socket() as free:
                free.bind(("localhost", 0))
                address = f"localhost:{free.getsockname()[1]}"
            arguments += ["--coordinator", address, "--num-processes", self.processes, "--process-id"]
        self.log_start = self._log().stat().st_size if self._log().exists() else 0
        self.may_resume_from = max(committed(self.run_folder) - self.spoilt, default=None)

        def call(number: int) -> None:
            if self.forget and self.may_resume_from is not None:
                forget(self.forget)
            if crash and number == 0:
                crash_at(*crash)
            command(*arguments, *([number] if self.processes > 1 else []))

        logs = [self._log(), *(self._log().with_suffix(f".{number}.log") for number in range(1, self.processes))]
        return [fork(lambda number=number: call(number), log) for number, log in enumerate(logs)]

    def _log(self) -> Path:
        return self.run_folder.with_name(self.run_folder.name + ".log")

    def _crash(self, name: str, count: int) -> bool:
        """Let the run end at a point; return whether it reached the point."""
        if name == "set-aside":
            while len(committed(self.run_folder)) < 2:
                if not self._crash("commit", 3):
                    raise Failure("no run with two checkpoints")
                self.kills["at named points"] -= 1
            newest = max(committed(self.run_folder))
            spoil(self.run_folder / "checkpoints" / str(newest))
            self.spoilt.add(newest)
        pids = self._start((name, count))
        if wait(pids[0]) == 0:
            self._end_of(pids[1:])
            self._check()
            self._new_run()
            return False
        self._end_of(pids[1:], killed=True)
        self.kills["at named points"] += 1
        self._check_start()
        return True

    def _kill(self) -> None:
        """Kill the run at a random moment; if it ended before, check it and begin another run."""
        in_start, begun = self.draw.random() < IN_START, time.monotonic()
        share, victims = self.draw.random(), self.draw.choice([[0], [1], [0, 1]]) if self.processes > 1 else [0]
        size = size_of(self.run_folder / "metrics.jsonl")
        pids = self._start()

        def is_over() -> bool:
            return os.waitid(os.P_PID, pids[0], os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None

        if in_start:
            time.sleep(share * self.start_seconds)
        else:
            while size_of(self.run_folder / "metrics.jsonl") <= size and not is_over():
                if time.monotonic() - begun > LONGEST:
                    raise Failure("no step after minutes")
                time.sleep(0.001)
            self.start_seconds = 0.5 * self.start_seconds + 0.5 * (time.monotonic() - begun)
            time.sleep(share * self.span)
        if is_over():
            self._end_of(pids)
            self._check()
            self._new_run()
            return
        for number in victims:
            os.kill(pids[number], signal.SIGKILL)
        self._end_of(pids, killed=True)
        self.kills["in the start" if in_start else "in training"] += 1
        self._check_start()

    def _finish(self) -> None:
        self._end_of(self._start())
        self._check()
        self._new_run()

    def _end_of(self, pids: Sequence[int], killed: bool = False) -> None:
        """Wait for processes; require exit code 0, or after a kill also SIGKILL or 75, which asks for a restart."""
        allowed = {0, 75, -signal.SIGKILL} if killed else {0}
        for pid in pids:
            if (code := wait(pid)) not in allowed:
                raise Failure(f"exit code {code} in {self.run_folder}: {last_line(self._log())}")

    def _check_start(self) -> list[dict]:
        """Require that the last start resumed from the newest committed step, and that all numbers so far are right.

        Returns the lines of metrics.jsonl.
        """
        with open(self._log(), encoding="utf-8") as file:
            file.seek(self.log_start)
            said = file.read()
        step = self.may_resume_from
        wrong = "resumed from step" if step is None else "starting from scratch"
        found = re.search(r"resumed from step (\d+)", said)
        if wrong in said or (found and int(found[1]) != step):
            raise Failure(f"step {step} was committed in {self.run_folder}, but: {found[0] if found else wrong}")
        errors = [line for line in said.splitlines() if line.startswith(("error: ", "Traceback"))]
        if errors and not re.match(r"error: process [01] .* has ended", errors[0]):  # said by the surviving process
            raise Failure(f"{self._log()}: {errors[0]}")
        lines = metrics_of(self.run_folder)
        for line in lines:
            expected, found = self.expected[kind_of(line)], numbers_of(line)
            if found != expected:
                name = next(name for name in expected if found.get(name) != expected[name])
                at = f"{line.get(name)!r}, undisturbed {float.fromhex(expected[name])!r}"
                raise Failure(f"{self.run_folder}: {name} of step {line['step']} is {at}")
        return lines

    def _check(self) -> None:
        """Require that a finished run equals the undisturbed run."""
        run, lines = self.run_folder, self._check_start()
        # A kill between a commit and its line in metrics.jsonl loses the line.
        needed = {kind for kind in self.expected if kind[1] != "checkpoint"}
        if missing := needed - {kind_of(line) for line in lines}:
            raise Failure(f"{run}: metrics.jsonl lacks {sorted(missing)[:5]}")
        if left := [path for path in run.rglob("*") if "tmp" in path.name or path.name == "token"]:
            raise Failure(f"left behind: {left[0]}")
        if committed(run) != self.kept:
            raise Failure(f"{run}: steps {sorted(committed(run))} are kept, not {sorted(self.kept)}")
        aside = {int(path.name.partition("-")[0]) for path in (run / "damaged").glob("*")}
        if aside != self.spoilt:
            raise Failure(f"{run}: damaged/ holds {sorted(aside)}, not {sorted(self.spoilt)}")
        log = self._log().with_suffix(".check.log")
        if wait(fork(lambda: (compare_states(self.reference, run), command("checkpoints", run, "--verify")), log)):
            raise Failure(f"{run}: {last_line(log)}")
        self.runs, self.numbers = self.runs + 1, self.numbers + len(lines)


def committed(run: Path) -> set[int]:
    """Return the steps that orbax has renamed to their final names."""
    return {int(path.name) for path in (run / "checkpoints").glob("*") if path.name.isdecimal()}


def metrics_of(run: Path) -> list[dict]:
    """Return the complete lines of metrics.jsonl; a kill may cut a line."""
    lines, path = [], run / "metrics.jsonl"
    for line in path.read_text(encoding="utf-8").split("\n") if path.exists() else ():
        with contextlib.suppress(ValueError):
            lines.append(json.loads(line))
    return lines


def numbers_of(line: dict) -> dict[str, str]:
    """Return the numbers that must not depend on a kill, as hexadecimal floats."""
    return {name: float(value).hex() for name, value in line.items() if name not in OF_SPEED}


def kind_of(line: dict) -> tuple[int, str]:
    """Return the step of a line and its first name, which tells training, evaluation and checkpoint lines apart."""
    return line["step"], min(line.keys() - {"step", "time"})


def size_of(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def last_line(path: Path) -> str:
    return path.read_text(encoding="utf-8").strip().rpartition("\n")[2]


def arrays_of(step: Path) -> dict[str, tuple[str, bytes]]:
    """Return dtype and bytes of each array of a checkpoint, read by orbax alone; this starts a backend."""
    import jax
    import numpy as np
    import orbax.checkpoint as ocp

    found = {}
    with ocp.PyTreeCheckpointer() as reader:
        for item in ("model", "opt_state"):
            place = step.absolute() / item
            as_numpy = jax.tree.map(
                lambda _: ocp.RestoreArgs(restore_type=np.ndarray), reader.metadata(place).item_metadata
            )
            for path, leaf in jax.tree_util.tree_leaves_with_path(reader.restore(place, restore_args=as_numpy)):
                found["/".join([item, *(key.key for key in path)])] = (leaf.dtype.name, leaf.tobytes())
    return found


def compare_states(one: Path, other: Path) -> None:
    first, second = (arrays_of(run / "checkpoints" / str(TOTAL)) for run in (one, other))
    for path in sorted(first.keys() | second.keys()):
        if first.get(path) != second.get(path):
            print(f"the last states differ in {path}")
            raise SystemExit(1)


def spoil(step: Path) -> None:
    """Flip a bit in the largest file of a checkpoint's model."""
    path = max((path for path in (step / "model").rglob("*") if path.is_file()), key=size_of)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


def crash_at(name: str, count: int) -> None:
    """Make this process kill itself when it reaches a point for the `count`-th time."""
    event, pattern = POINTS[name]
    left = count

    def die() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    if event == "half a line":
        from gpt2_flax.training.metrics_log import MetricsLog

        write = MetricsLog.write

        def write_half(log: MetricsLog, step: int, values: dict[str, float], line: str) -> None:
            nonlocal left
            left -= 1
            if left == 0:
                with open(log._run.metrics, "a", encoding="utf-8") as file:
                    file.write(f'{{"step": {step}, "train/lo')
                die()
            write(log, step, values, line)

        MetricsLog.write = write_half
        return

    passed = False

    def hook(happening: str, arguments: tuple) -> None:
        nonlocal left, passed
        if passed and happening in ("os.rename", "os.mkdir", "open"):
            die()
        if happening == event.removeprefix("after "):
            path = arguments[1] if happening == "os.rename" else arguments[0]
            if re.search(pattern, str(path)):
                left -= 1
                if left == 0:
                    passed = True
                    if not event.startswith("after "):
                        die()

    sys.addaudithook(hook)


def forget(what: str) -> None:
    """Make each resume in this process lose the optimizer state, the dropout seed or the position in the data."""
    import jax

    from gpt2_flax.training import loop

    start, make = loop.start_or_resume, loop.make_train_step

    def start_without(*arguments):
        progress, state = start(*arguments)
        if what == "opt":
            state = state._replace(opt_state=jax.tree.map(lambda leaf: leaf * 0, state.opt_state))
        return progress._replace(samples_seen=0) if what == "data" else progress, state

    def make_with_other_dropout(config, *arguments):
        other = config.training.model_copy(update={"seed": config.training.seed + 1})
        return make(config.model_copy(update={"training": other}), *arguments)

    loop.start_or_resume = start_without
    if what == "rng":
        loop.make_train_step = make_with_other_dropout


if __name__ == "__main__":
    sys.exit(main())
