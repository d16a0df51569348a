"""Damage runs in every way in which a disk or a user can, and require that no reader is silently wrong.

The script damages two runs: one that ended, and one that was killed right after a commit. A damage changes one file of
the newest checkpoint or of the run folder. The kinds are a flipped bit, a shorter file, zeros, an empty file, no file,
the content of another file of the checkpoint, and the same file of an older checkpoint. Readers then read each damaged
copy. Each reader must

* print the numbers of the undamaged checkpoint; or
* name the damaged checkpoint in a warning and print the numbers of the checkpoint before; or,
* if the damaged file exists only once, such as config.toml, print `error: ...` with a suitable exit code.

    python scripts/damage_loop.py                                 # 200 damages
    python scripts/damage_loop.py --damages 2000 --seed random --thorough --workers 4    # for a night

The exit code is 0 if everything holds, else 1; then the folder stays.
"""

import argparse
import hashlib
import random
import re
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).parent))
import kill_loop

SUITABLE = {65, 66, 74, 78}
ROWS = 8  # in a batch, set by `make_config`
TURNS = {
    "evaluate": (0, 2),
    "generate": (1, 2),
    "export": (3, 16),
    "verify": (2, 4),
    "resume": (0, 1),
    "train": (5, 40),
}
"""Reader -> the first damage that it reads, and the interval: evaluate, generate and export load in the same way."""
LONGER = ("training.total_steps=18", "--allow-change", "training.total_steps")


class Damage(NamedTuple):
    run: str
    file: str
    """Path below the run's folder."""
    kind: str
    seed: int

    def __str__(self) -> str:
        return f"{self.kind} {self.file} of the run that {self.run} (seed {self.seed})"


class Answer(NamedTuple):
    """The result of a reader for a run."""

    code: int
    said: str
    numbers: object
    """The result that must be right: printed lines, or bytes."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--damages", type=int, default=200)
    parser.add_argument("--seed", default="0", help="a number, or random")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--thorough", action="store_true", help="let each reader read each damage")
    parser.add_argument("--folder", type=Path, help="working folder, which stays")
    given = parser.parse_args()
    seed = random.randrange(2**32) if given.seed == "random" else int(given.seed)
    folder, begun = given.folder or Path(tempfile.mkdtemp(prefix="gpt2-flax-damage-loop-")), time.monotonic()
    print(f"seed {seed}, folder {folder}", flush=True)
    kill_loop.prepare_parent(folder)
    runs = make_runs(folder)
    damages = choose(runs, given.damages, random.Random(seed))
    logs = [folder / f"worker-{number}.log" for number in range(given.workers)]
    for log in logs:
        log.unlink(missing_ok=True)
    pids = [
        kill_loop.fork(
            lambda n=number: Worker(folder, n, runs, logs[n], given.thorough).work(damages[n :: given.workers]), log
        )
        for number, log in enumerate(logs)
    ]
    codes = [kill_loop.wait(pid, 3600.0) for pid in pids]
    lines = [line for log in logs for line in log.read_text(encoding="utf-8").splitlines()]
    answers = Counter(line.removeprefix("answer: ") for line in lines if line.startswith("answer: "))
    wrong = [line for line in lines if line.startswith("WRONG: ")]
    print(*wrong, *(f"{count:>6} {what}" for what, count in sorted(answers.items())), sep="\n")
    done = sum(line.startswith("damage: ") for line in lines)
    whole = not wrong and not any(codes) and done == len(damages)
    print(
        f"{'passed' if whole else 'FAILED'}: {done} damages, {sum(answers.values())} answers, {len(wrong)} wrong; "
        f"{time.monotonic() - begun:.0f} s",
        flush=True,
    )
    if whole and given.folder is None:
        shutil.rmtree(folder)
    return 0 if whole else 1


def make_runs(folder: Path) -> dict[str, Path]:
    """Return a run that ended, and a run that was killed right after step 12 was committed."""
    training = {"total_steps": 15, "keep_checkpoints": 2, "evaluate_every": 6}
    config = kill_loop.make_config(folder, training, "constant")  # a schedule that does not depend on the last step
    runs = {"ended": folder / "ended", "was killed": folder / "killed"}
    for name, run in runs.items():
        if run.exists():
            continue

        def call(run: Path = run, killed: bool = name == "was killed") -> None:
            if killed:
                kill_loop.crash_at("committed", 4)
            kill_loop.command("train", config, f"output={run}")

        code = kill_loop.wait(kill_loop.fork(call, run.with_suffix(".log")))
        if code != (0 if name == "ended" else -9):
            raise SystemExit(f"{run}: exit code {code}, {kill_loop.last_line(run.with_suffix('.log'))}")
    return runs


def choose(runs: dict[str, Path], count: int, draw: random.Random) -> list[Damage]:
    """Return `count` damages: each file and folder once, then each again in another way."""
    targets = [(name, str(path.relative_to(run))) for name, run in runs.items() for path in targets_of(run)]
    draw.shuffle(targets)
    left = {target: draw.sample(kinds := kinds_of(runs[target[0]] / target[1]), len(kinds)) for target in targets}
    found: list[Damage] = []
    while len(found) < count:
        for target in targets:
            kinds = left[target]
            kinds.append(kinds.pop(0))
            found.append(Damage(*target, kinds[-1], draw.randrange(2**32)))
    return found[:count]


def targets_of(run: Path) -> Iterator[Path]:
    """Yield the newest checkpoint, its items, its files, and the files of the run's folder."""
    newest = run / "checkpoints" / str(max(kill_loop.committed(run)))
    yield newest
    yield from (path for path in sorted(newest.iterdir()) if path.is_dir())
    for path in sorted(path for path in run.rglob("*") if path.is_file()):
        if path.is_relative_to(newest) or not path.is_relative_to(newest.parent):
            yield path


def kinds_of(path: Path) -> tuple[str, ...]:
    if path.is_dir():
        return ("delete", "older")
    of_step = "checkpoints" in path.parts
    kinds = ("flip", "truncate", "zeros", "delete", *(("swap", "older") if of_step else ()))
    return kinds if path.stat().st_size else (*kinds[3:], "fill")


def apply(damage: Damage, run: Path) -> bool:
    """Damage a run; return whether the damage changed anything."""
    draw, path = random.Random(damage.seed), run / damage.file
    if damage.kind in ("delete", "older"):
        substitute = older(path, run) if damage.kind == "older" else None
        before = path.read_bytes() if path.is_file() else None
        shutil.rmtree(path) if path.is_dir() else path.unlink()
        if substitute is not None:
            (shutil.copytree if substitute.is_dir() else shutil.copyfile)(substitute, path)
        return substitute is None or before is None or path.read_bytes() != before
    before = path.read_bytes()
    content = bytearray(before)
    if damage.kind == "flip":
        content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    elif damage.kind == "truncate":
        del content[draw.choice((0, draw.randrange(len(content)))) :]
    elif damage.kind == "zeros":
        first = draw.choice((0, draw.randrange(len(content))))
        content[first : first + 4096] = bytes(len(content[first : first + 4096]))
    elif damage.kind == "swap":
        others = [other for other in step_of(path, run).rglob("*") if other.is_file() and other != path]
        content = draw.choice(sorted(others)).read_bytes()
    else:
        content = draw.randbytes(100)
    path.write_bytes(content)
    return bytes(content) != before


def step_of(path: Path, run: Path) -> Path:
    return run / Path(*path.relative_to(run).parts[:2])


def older(path: Path, run: Path) -> Path | None:
    """Return the counterpart of a path in the checkpoint before; data files have random names and match by size."""
    newest, before = (run / "checkpoints" / str(step) for step in sorted(kill_loop.committed(run))[:-3:-1])
    same = before / path.relative_to(newest)
    if same.exists():
        return same
    by_size = [
        sorted((file for file in place.iterdir()), key=lambda file: (file.stat().st_size, file.name))
        for place in (path.parent, same.parent)
    ]
    return by_size[1][min(by_size[0].index(path), len(by_size[1]) - 1)]


class Worker:
    """Process a list of damages in one process, so that each program is compiled once."""

    def __init__(self, folder: Path, number: int, runs: dict[str, Path], log: Path, thorough: bool):
        self.thorough = thorough
        self.copies, self.n_copies, self.copy = folder / f"copies-{number}", 0, Path()
        self.output = folder / f"export-{number}"
        self.config, self.runs, self.log = folder / "config.toml", runs, log
        self.readers: dict[str, Callable[[], Answer]] = {
            "evaluate": lambda: self._print("evaluate", self.copy),
            "generate": lambda: self._print("generate", self.copy, "--prompt", "这是", "--temperature", 3),
            "export": self._export,
            "verify": self._verify,
            "resume": self._resume,
            "train": self._train,
        }
        self.expected: dict[tuple[str, str], dict[int, object]] = {}
        self.found: set[int] | None = None
        """Steps that `checkpoints --verify` reported as damaged."""

    def work(self, damages: list[Damage]) -> None:
        from gpt2_flax.__main__ import _unraisable

        sys.unraisablehook = _unraisable  # like `main`
        for name in self.runs:
            self._learn(name)
        for number, damage in enumerate(damages):
            self._copy(damage.run)
            if not apply(damage, self.copy):
                apply(damage := damage._replace(kind="flip"), self.copy)  # this always changes something
            print(f"damage: {damage}", flush=True)
            for reader, (first, every) in TURNS.items():
                if self.thorough or number % every == first:
                    answer = self.readers[reader]()
                    verdict = self._judge(damage, reader, answer)
                    wrong = f"WRONG: {reader}, {damage}: {answer.code} {answer.said[-600:]!r}"
                    print(f"answer: {reader}: {verdict}" if verdict else wrong, flush=True)

    def _copy(self, name: str) -> None:
        """Copy a run to a new path: tensorstore caches what it has read from a path."""
        shutil.rmtree(self.copies, ignore_errors=True)
        self.n_copies += 1
        self.copy, self.found = self.copies / str(self.n_copies), None
        shutil.copytree(self.runs[name], self.copy)

    def _learn(self, name: str) -> None:
        """Store the result of each reader for the newest checkpoint and for the checkpoint before."""
        steps = sorted(kill_loop.committed(self.runs[name]))
        for step in steps[:-3:-1]:
            self._copy(name)
            for later in steps[steps.index(step) + 1 :]:
                shutil.rmtree(self.copy / "checkpoints" / str(later))
            for reader, read in self.readers.items():
                answer = read()
                assert answer.code == 0, answer.said
                self.expected.setdefault((name, reader), {})[step] = answer.numbers
            arrays = kill_loop.arrays_of(self.runs[name] / "checkpoints" / str(step))
            assert self.expected[name, "resume"][step] == (step, step * ROWS, arrays)
        for reader in self.readers:
            one, other = self.expected[name, reader].values()
            # Further training reaches the same state from both; verification is compared with the resume.
            assert (one == other) == (reader in ("train", "verify")), reader

    def _judge(self, damage: Damage, reader: str, answer: Answer) -> str | None:
        """Return a description of a good answer, None for a wrong answer."""
        of_step = damage.file.startswith("checkpoints/")
        errors = [line for line in answer.said.splitlines() if line.startswith("error: ")]
        if "Traceback" in answer.said:
            return None
        if reader == "verify":
            return f"{answer.code}" if answer.code == (74 if self.found else 0) else None
        newest, before = numbers = self.expected[damage.run, reader]
        if reader == "resume" and self.found is not None:
            moved = {int(path.name.partition("-")[0]) for path in (self.copy / "damaged").glob("[0-9]*")}
            if moved != self.found:
                return None
        if answer.code:
            return f"{answer.code}" if len(errors) == 1 and answer.code in SUITABLE and not of_step else None
        if answer.numbers == numbers[newest]:
            return "as undamaged"
        gone = damage.kind == "delete" and damage.file == f"checkpoints/{newest}"
        named = f"warning: checkpoint {newest} is damaged" in answer.said
        return "the one before" if answer.numbers == numbers[before] and of_step and (named or gone) else None

    def _verify(self) -> Answer:
        code, said = self._command("checkpoints", self.copy, "--verify")
        self.found = {int(step) for step in re.findall(r"^ *(\d+) .* damaged", said, re.MULTILINE)}
        return Answer(code, said, None)

    def _print(self, *arguments: object) -> Answer:
        code, said = self._command(*arguments)
        return Answer(code, said, "".join(line for line in said.splitlines(True) if not line.startswith("warning: ")))

    def _export(self) -> Answer:
        code, said = self._command("export", self.copy, self.output, "--overwrite", "--name", "x")
        files = sorted(path for path in self.output.glob("*") if path.is_file())
        return Answer(code, said, {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files})

    def _resume(self) -> Answer:
        """Start a training run, and stop before its first step."""
        import jax
        import numpy as np

        from gpt2_flax.parallel.rules import path_of
        from gpt2_flax.training import loop
        from gpt2_flax.training.start import Progress
        from gpt2_flax.training.step import TrainState

        numbers, run_steps = None, loop.run_steps

        def note(stage: object, progress: Progress, state: TrainState, *others: object) -> None:
            nonlocal numbers
            arrays = {}
            for item in ("model", "opt_state"):
                for path, leaf in jax.tree_util.tree_leaves_with_path(getattr(state, item)):
                    arrays[f"{item}/{path_of(path)}"] = (leaf.dtype.name, np.asarray(leaf).tobytes())
            numbers = (int(state.step), progress.samples_seen, arrays)

        loop.run_steps = note
        try:
            code, said = self._command("train", self.config, f"output={self.copy}", *LONGER)
        finally:
            loop.run_steps = run_steps
        return Answer(code, said, numbers)

    def _train(self) -> Answer:
        """Train to step 18; damaged checkpoints that were moved before stay moved."""
        code, said = self._command("train", self.config, f"output={self.copy}", *LONGER)
        step = self.copy / "checkpoints" / "18"
        return Answer(code, said, kill_loop.arrays_of(step) if step.exists() else None)

    def _command(self, *arguments: object) -> tuple[int, str]:
        """Run a gpt2-flax command in this process; return its exit code and its output."""
        from gpt2_flax.__main__ import exit_code

        sys.stdout.flush()
        begin = self.log.stat().st_size
        code = exit_code([str(argument) for argument in arguments])
        sys.stdout.flush()
        with open(self.log, encoding="utf-8", errors="replace") as file:
            file.seek(begin)
            return code, file.read()


if __name__ == "__main__":
    sys.exit(main())
