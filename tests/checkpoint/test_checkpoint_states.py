"""Any sequence of saves, kills, damages, resumes and changes of mesh, against a dict of what was saved."""

import shutil
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from gpt2_flax.checkpoint.store import CheckpointStore
from gpt2_flax.errors import ExitCode, UserError

pytestmark = [
    pytest.mark.slow,
    # Of reads that are still under way when another has failed.
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]

KEEP, BEST, EVERY = 2, 1, 7
NUMBERS = st.integers(0, 2**16)
LAYOUTS = {(8, 1): P("a"), (2, 4): P("a", "b"), (1, 1): P()}  # shape of the mesh -> of the matrices on it
SEEDS = st.integers(0, 2**31)
DAMAGES = ("flip", "truncate", "delete", "swap", "another item", "no item")
MESHES = st.sampled_from(list(LAYOUTS))
SHAPES = {
    "model": {"w": ((8, 4), jnp.float32), "b": ((5,), jnp.bfloat16)},
    "opt_state": {"mu": ((8, 4), jnp.float32), "count": ((), jnp.int32)},
}


def shardings(mesh_shape):
    devices = np.array(jax.devices()[: mesh_shape[0] * mesh_shape[1]]).reshape(mesh_shape)
    mesh = jax.sharding.Mesh(devices, ("a", "b"))
    return lambda shape: NamedSharding(mesh, LAYOUTS[mesh_shape] if len(shape) == 2 else P())


def drawn(seed):
    """Arrays of any bits."""
    draw = np.random.default_rng(seed)
    return {
        item: {
            name: np.frombuffer(draw.bytes(int(np.prod(shape)) * jnp.dtype(dtype).itemsize), dtype).reshape(shape)
            for name, (shape, dtype) in arrays.items()
        }
        for item, arrays in SHAPES.items()
    }


def bits(tree):
    return {
        (item, name): np.asarray(array).tobytes() for item, arrays in tree.items() for name, array in arrays.items()
    }


def one_of(choices, number):
    return sorted(choices)[number % len(choices)]


def digits(seed):
    """Many numbers, so that damage of the metadata meets some."""
    return np.random.default_rng(seed).integers(10**9, 10**10, 100).tolist()


class Runs(RuleBasedStateMachine):
    def __init__(self):
        super().__init__()
        self.place = Path(tempfile.mkdtemp(prefix="gpt2-flax-test-"))
        self.run, self.n_starts = self.place / "0", 0
        self.run.mkdir()
        self.saved, self.losses = {}, {}  # step -> bits; step -> validation loss
        self.suspect, self.lost = set(), set()  # steps of which a file was damaged, or of which an item is gone
        self.aside = []
        self.store, self.step = None, 0

    def teardown(self):
        if self.store:
            self.store._writer.close()
        shutil.rmtree(self.place)

    @property
    def folder(self):
        return self.run / "checkpoints"

    @initialize(mesh_shape=MESHES, seed=SEEDS)
    def start(self, mesh_shape, seed):
        self._resume(mesh_shape)
        for number, loss in enumerate((2.0, None, 3.0)):
            self.save(1, seed + number, loss)

    @rule(steps=st.integers(1, 4), seed=SEEDS, loss=st.none() | st.floats(0, 10))
    def save(self, steps, seed, loss):
        self.step += steps
        arrays = drawn(seed)
        placed = jax.tree.map(lambda array: jax.device_put(array, self.sharding(array.shape)), arrays)
        meta = {"metrics": {} if loss is None else {"validation/loss": loss}, "samples_seen": digits(seed)}
        self.store.save(self.step, placed["model"], placed["opt_state"], meta)
        assert self.store.seal() == self.step
        self.saved[self.step], self.losses[self.step] = (digits(seed), bits(arrays)), loss
        self._prune()

    def _prune(self):
        """Check what was deleted: good steps among the newest and the best of all stay, others go."""
        good = self.saved.keys() - self.suspect
        must_stay = good & self._worth_keeping(self.saved.keys())
        must_go = good - self._worth_keeping(good)
        present = set(self.store.steps())
        assert must_stay <= present
        assert not must_go & present
        for step in self.saved.keys() - present:
            del self.saved[step]

    def _worth_keeping(self, steps):
        rated = sorted((self.losses[step], step) for step in steps if self.losses[step] is not None)
        best = {step for _, step in rated[:BEST]}  # the first of equal ones
        return {*sorted(steps)[-KEEP:], *best, *(step for step in steps if step % EVERY == 0)}

    # Which file a number chooses depends on names that orbax draws. So rules ask for no state that depends on it.

    @rule(
        hits=st.lists(st.tuples(st.sampled_from(DAMAGES), NUMBERS, NUMBERS, NUMBERS), min_size=1, max_size=3),
        then=st.none() | MESHES,
    )
    def damage(self, hits, then):
        for hit in hits:
            self._damage(*hit)
        if then:
            self.kill_and_resume("nothing", 0, then)

    def _damage(self, how, *which):
        newest = max(self.saved, default=0)
        step = one_of(self.saved, which[0]) if self.saved and which[0] % 2 else newest
        files = [path for path in (self.folder / str(step)).rglob("*") if path.is_file()]
        if not files:
            return
        path = one_of(files, which[1])
        self.suspect.add(step)
        if how.endswith("item"):
            item = self.folder / str(step) / one_of(["model", "opt_state", "meta"], which[2])
            other = self.folder / str(one_of(self.saved, which[1])) / item.name
            if how == "no item":
                self.lost.add(step)
                shutil.rmtree(item, ignore_errors=True)
            elif other.is_dir() and other != item:
                shutil.rmtree(item, ignore_errors=True)
                shutil.copytree(other, item)
        elif how == "delete":
            path.unlink()
        elif how == "swap":
            shutil.copyfile(one_of(files, which[2]), target := path.with_name("other"))
            target.rename(path)
        elif content := bytearray(path.read_bytes()):
            place = which[2] % len(content)
            content[place] ^= 1 << which[2] % 8
            path.write_bytes(content[:place] if how == "truncate" else content)

    @rule(left=st.sampled_from(["nothing", "a save", "a deletion"]), which=NUMBERS, mesh_shape=MESHES)
    def kill_and_resume(self, left, which, mesh_shape):
        self.store._writer.close()
        if self.saved and left != "nothing":
            step = one_of(self.saved, which)
            name = f"{self.step + 1}.orbax-checkpoint-tmp" if left == "a save" else f"{step}.deleted"
            shutil.copytree(self.folder / str(step), self.folder / name)
            shutil.rmtree(self.folder / name / "model", ignore_errors=True)
        self._resume(mesh_shape)

    def _resume(self, mesh_shape):
        # Under another name, as tensorstore remembers in a process what it has read or written under one.
        self.n_starts += 1
        self.run = self.run.rename(self.place / str(self.n_starts))
        self.sharding, told = shardings(mesh_shape), []
        abstract = {
            item: {
                name: jax.ShapeDtypeStruct(shape, dtype, sharding=self.sharding(shape))
                for name, (shape, dtype) in arrays.items()
            }
            for item, arrays in SHAPES.items()
        }
        self.store = CheckpointStore(self.folder, KEEP, BEST, EVERY, told.append)
        good = self.saved.keys() - self.suspect
        try:
            found = self.store.newest(lambda step: self.store.restore(step, **abstract))
        except UserError as refusal:
            self._refused(refusal, good)
            return
        if found is None:
            assert not self.saved
            return
        step, restored = found
        assert step >= max(good, default=0)
        assert step not in self.lost
        assert (self.store.meta(step)["samples_seen"], bits(restored)) == self.saved[step]
        assert all(leaf.sharding == self.sharding(leaf.shape) for leaf in jax.tree.leaves(restored))
        newer = sorted(self.saved.keys() - set(range(step + 1)))
        assert [line.split()[2] for line in told] == [str(number) for number in reversed(newer)]
        for number in newer:
            self.aside.append(number)
            for record in (self.suspect, self.lost):
                record.discard(number)
            del self.saved[number]
        self.step = step

    def _refused(self, refusal, good):
        """All are damaged: nothing is moved, let alone deleted. The user may do so."""
        assert (refusal.exit_code, good) == (ExitCode.IO, set())
        assert set(self.store.steps()) == self.saved.keys()
        shutil.rmtree(self.folder)
        self.store._writer.close()
        self.store = CheckpointStore(self.folder, KEEP, BEST, EVERY)
        self.saved, self.suspect, self.lost, self.step = {}, set(), set(), 0

    @invariant()
    def what_was_set_aside_is_kept(self):
        found = [int(path.name.partition("-")[0]) for path in (self.run / "damaged").glob("*")]
        assert sorted(found) == sorted(self.aside)

    @invariant()
    def the_store_lists_what_was_committed(self):
        if self.store:
            assert set(self.store.steps()) == self.saved.keys()
            assert not [path.name for path in self.folder.iterdir() if not path.name.isdecimal()]


TestRuns = Runs.TestCase
TestRuns.settings = settings(max_examples=30, stateful_step_count=10)
