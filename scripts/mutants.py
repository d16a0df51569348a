"""Break each promise of docs/reliability.md on purpose, and require that the test of the promise fails.

A mutant is a small change of the package. The script makes it in a temporary copy of the repository and runs its test
there. Before that, all these tests run unchanged and must pass. Run the script by hand after you change code that a
mutant changes:

    python scripts/mutants.py                         # all, some minutes
    python scripts/mutants.py "set aside deletes"     # some, by name

The exit code is 1 if a mutant survives, or if the package does not contain its text exactly once.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
FAILED = 1  # pytest's exit code if tests ran and some failed


class Mutant(NamedTuple):
    name: str
    file: str
    """Path below gpt2_flax/."""
    old: str
    new: str
    test: str
    """Path below tests/, and name."""


MUTANTS = (
    Mutant(
        "checksums ignored",
        "checkpoint/store.py",
        'if checksum != expected[path]["sum"]:',
        "if False:",
        "checkpoint/test_checkpoint.py::test_a_number_that_files_do_not_betray_is_found_by_its_checksum",
    ),
    Mutant(
        "even weights in checksums",
        "checkpoint/device_checksum.py",
        "return x ^ x >> 16 | 1",
        "return (x ^ x >> 16) * 2",
        "checkpoint/test_device_checksum.py::test_no_flipped_bit_and_no_exchange_is_missed",
    ),
    Mutant(
        "checksum of the metadata ignored",
        "checkpoint/step_meta.py",
        'if written["sha256"] != json_sha256(content):',
        "if False:",
        "checkpoint/test_checkpoint.py::test_metadata_is_what_was_written",
    ),
    Mutant(
        "deletion for a step that cannot be read",
        "checkpoint/store.py",
        "if not readable or max(readable) != max(self.steps()):",
        "if not readable:",
        "checkpoint/test_checkpoint.py::test_no_step_is_deleted_for_one_that_cannot_be_read",
    ),
    Mutant(
        "fresh start of a run that has lost its checkpoints",
        "training/start.py",
        "if (lost := run.lost_checkpoint()) is not None:",
        "if (lost := None) is not None:",
        "cli/test_cli.py::test_a_run_that_has_lost_its_checkpoints_never_starts_anew",
    ),
    Mutant(
        "optimizer forgotten",
        "training/start.py",
        'TrainState(restored["model"], restored["opt_state"],',
        'TrainState(restored["model"], jax.tree.map(jnp.zeros_like, restored["opt_state"]),',
        "training/test_training.py::test_a_run_that_was_stopped_goes_on_with_the_same_bits",
    ),
    Mutant(
        "samples forgotten",
        "training/start.py",
        'progress = Progress(step, meta["samples_seen"],',
        "progress = Progress(step, 0,",
        "training/test_training.py::test_a_run_that_was_stopped_goes_on_with_the_same_bits",
    ),
    Mutant(
        "set aside deletes",
        "checkpoint/run_folder.py",
        "    return path.rename(target)\n",
        "    shutil.rmtree(path)\n    return target\n",
        "checkpoint/test_checkpoint.py::test_a_flipped_bit_is_found_and_the_step_before_is_used",
    ),
    Mutant(
        "uint16 for 65537 ids",
        "tokenizers/ragged_ids.py",
        'return "uint16" if vocab_size <= 2**16 else "uint32"',
        'return "uint16" if vocab_size <= 2**16 + 1 else "uint32"',
        "data/test_dataset.py::test_the_smallest_type_that_holds_every_id_is_taken",
    ),
    Mutant(
        "the same order in every epoch",
        "data/batches.py",
        "key = mix(mix(np.uint64(seed)) + np.uint64(epoch))",
        "key = mix(mix(np.uint64(seed)))",
        "data/test_batches.py::test_epochs_and_seeds_give_different_orders",
    ),
    Mutant(
        "each host begins a batch anew",
        "data/batches.py",
        "[start : start + last - first]",
        "[: last - first]",
        "data/test_batches.py::test_hosts_that_take_parts_of_a_batch_see_the_whole_batch",
    ),
    Mutant(
        "end tokens inserted by the place in a batch",
        "data/prompt_separator.py",
        "np.arange(first, last))",
        "np.arange(last - first))",
        "data/test_prompt_separator.py::test_hosts_that_take_parts_of_a_batch_see_the_whole_batch",
    ),
    Mutant(
        "other training data taken",
        "training/start.py",
        "if meta.get(name) != mixture.fingerprints()[name]:",
        "if False:",
        "training/test_training.py::test_other_training_tokens_are_refused_at_resume_unless_allowed",
    ),
    Mutant(
        "changes of data unseen",
        "data/integrity.py",
        "        if found == self._known:\n            return\n",
        "        return\n",
        "data/test_changed_data.py::test_no_damage_at_any_moment_is_silent",
    ),
    Mutant(
        "no limit after an evaluation",
        "processes/phases.py",
        '        elif kind == "step":\n            self.limit =',
        '        elif kind == "step":\n            self.limit = math.inf if self._longest.get("evaluation") else',
        "processes/test_phases.py::test_a_step_that_ends_in_an_evaluation_is_measured_without_it",
    ),
)


def main() -> int:
    chosen = [mutant for mutant in MUTANTS if not sys.argv[1:] or mutant.name in sys.argv[1:]]
    if unknown := set(sys.argv[1:]) - {mutant.name for mutant in chosen}:
        print(f"no such mutant: {', '.join(unknown)}; there are: {', '.join(mutant.name for mutant in MUTANTS)}")
        return 1
    with tempfile.TemporaryDirectory(prefix="gpt2-flax-mutants-") as folder:
        copy = Path(folder)
        for name in ("gpt2_flax", "tests", "scripts", "docs", "configs", "setup.cfg", "pyproject.toml", "README.md"):
            source = ROOT / name
            (shutil.copytree if source.is_dir() else shutil.copyfile)(source, copy / name)
        print(f"the tests of {len(chosen)} mutants, unchanged", flush=True)
        code, said = run([mutant.test for mutant in chosen], copy)
        if code:
            print(said)
            return 1
        survivors = [mutant.name for mutant in chosen if not is_killed(mutant, copy)]
    print(f"survived: {', '.join(survivors)}" if survivors else f"all {len(chosen)} were killed")
    return 1 if survivors else 0


def is_killed(mutant: Mutant, copy: Path) -> bool:
    path = copy / "gpt2_flax" / mutant.file
    before = path.read_text(encoding="utf-8")
    if before.count(mutant.old) != 1:
        print(f"LOST      {mutant.name}: {mutant.file} contains its text {before.count(mutant.old)} times", flush=True)
        return False
    path.write_text(before.replace(mutant.old, mutant.new), encoding="utf-8")
    try:
        code, said = run([mutant.test], copy)
    finally:
        path.write_text(before, encoding="utf-8")
    killed = code == FAILED
    print(f"{'killed  ' if killed else 'SURVIVED'}  {mutant.name}: {mutant.test}", flush=True)
    if not killed:
        print(said[-2000:])
    return killed


def run(tests: list[str], copy: Path) -> tuple[int, str]:
    """Return pytest's exit code and what it printed."""
    paths = [str(copy / "tests" / test) for test in dict.fromkeys(tests)]
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *paths]
    environment = os.environ | {"PYTHONPATH": str(copy), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(command, cwd=copy, env=environment, capture_output=True, text=True, encoding="utf-8")
    return done.returncode, done.stdout + done.stderr


if __name__ == "__main__":
    sys.exit(main())
