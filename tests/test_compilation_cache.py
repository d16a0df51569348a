"""Compiled programs are found again by the next call."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest
from support.configs import changed

from gpt2_flax.compilation_cache import keep_compiled_programs
from gpt2_flax.config.parse import dump_config

NAMES = (
    "JAX_COMPILATION_CACHE_DIR",
    "JAX_COMPILATION_CACHE_MAX_SIZE",
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS",
)


@pytest.fixture
def environment(monkeypatch, tmp_path):
    for name in NAMES:
        monkeypatch.setenv(name, "")  # so that monkeypatch restores it
        monkeypatch.delenv(name)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return monkeypatch


def test_programs_go_to_the_cache_folder_of_the_user_by_processor(environment, tmp_path):
    keep_compiled_programs()
    assert Path(os.environ[NAMES[0]]).parent == tmp_path / "gpt2_flax/compiled"
    environment.delenv("XDG_CACHE_HOME")
    environment.delenv(NAMES[0])
    keep_compiled_programs()
    assert Path(os.environ[NAMES[0]]).parent == Path.home() / ".cache/gpt2_flax/compiled"


@pytest.mark.parametrize("problem", ["no home", "home that cannot be written", "no locks"])
def test_without_a_place_for_them_programs_are_not_kept(environment, tmp_path, problem):
    if problem == "no locks":

        def flock(file, operation):
            raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

        environment.setattr("fcntl.flock", flock)
    else:
        environment.delenv("XDG_CACHE_HOME")
        environment.setenv("HOME", "/proc")
    if problem == "no home":
        environment.delenv("HOME")
        environment.setattr("os.getuid", lambda: 2**31 - 9)  # a user who is not in /etc/passwd
    keep_compiled_programs()
    assert os.environ[NAMES[0]] == ""


def test_what_the_user_says_counts(environment):
    environment.setenv(NAMES[0], "")
    keep_compiled_programs()
    assert os.environ[NAMES[0]] == ""


@pytest.mark.slow(20)
@pytest.mark.multiprocess
def test_a_second_start_reads_what_the_first_has_compiled(config, tmp_path):
    path, cache = tmp_path / "config.toml", tmp_path / "cache"
    path.write_text(dump_config(changed(config, training__total_steps=1)), encoding="utf-8")
    environment = dict(os.environ, JAX_LOG_COMPILES="0")
    environment |= {"XLA_FLAGS": os.environ["XLA_FLAGS"].replace("_count=8", "_count=1"), NAMES[2]: "0"}
    losses = []
    for number, folder in enumerate([str(cache), str(cache), "", "/proc/none"]):
        command = [sys.executable, "-m", "gpt2_flax", "train", path, f"output={tmp_path / str(number)}"]
        here = environment | {"JAX_COMPILATION_CACHE_DIR": folder}
        done = subprocess.run(command, env=here, capture_output=True, text=True, check=True)
        losses += [line for line in done.stdout.splitlines() if line.startswith("step ") and "validation loss" in line]
        assert len(sorted(cache.glob("jit_train_step-*-cache"))) == 1  # from the first of the calls
    assert len(losses) == 4
    assert len(set(losses)) == 1


def of_another_user(path, monkeypatch):
    if os.getuid() == 0:
        os.chown(path, 12345, -1, follow_symlinks=False)
    else:
        other = os.getuid() + 1
        monkeypatch.setattr("os.getuid", lambda: other)


def cached(tmp_path) -> Path:
    keep_compiled_programs()
    folder = Path(os.environ.pop(NAMES[0]))
    assert folder.is_dir()
    (folder / "jit_f-0-cache").write_bytes(b"program")
    return folder


def test_the_folder_is_for_its_user_alone(environment, tmp_path, capsys):
    before = os.umask(0)
    try:
        folder = cached(tmp_path)
        (folder / "jit_f-0-cache").chmod(0o666)  # JAX writes files so with this umask; the folder is private
        assert folder.stat().st_mode & 0o777 == 0o700
        (tmp_path / "gpt2_flax").chmod(0o777)
        assert cached(tmp_path) == folder
        assert (tmp_path / "gpt2_flax").stat().st_mode & 0o777 == 0o755
    finally:
        os.umask(before)
    folder.chmod(0o755)  # as earlier versions made it
    for file in folder.iterdir():
        file.chmod(0o644)
    assert cached(tmp_path) == folder
    assert folder.stat().st_mode & 0o777 == 0o700
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda folder, patch: of_another_user(folder, patch), "belongs to another user"),
        (lambda folder, patch: of_another_user(folder.parent, patch), "belongs to another user"),
        (lambda folder, patch: of_another_user(folder / "jit_f-0-cache", patch), "belongs to another user"),
        (lambda folder, patch: folder.chmod(0o777), "may be written by other users"),
        (lambda folder, patch: folder.chmod(0o720), "may be written by other users"),
        (
            lambda folder, patch: (folder.chmod(0o755), (folder / "jit_f-0-cache").chmod(0o666)),
            "jit_f-0-cache may be written by other users",
        ),
    ],
    ids=["folder", "folder above", "file", "writable", "writable by group", "writable file"],
)
def test_programs_that_another_user_may_have_put_there_are_not_run(environment, tmp_path, capsys, damage, said):
    damage(cached(tmp_path), environment)
    keep_compiled_programs()
    assert os.environ[NAMES[0]] == ""
    warning = capsys.readouterr().err
    assert warning.startswith("warning: compiled programs are not kept: ")
    assert said in warning
    assert warning.count("\n") == 1


def test_a_link_is_followed_where_it_leads_to_a_folder_of_the_user(environment, tmp_path, capsys):
    folder, elsewhere = cached(tmp_path), tmp_path / "elsewhere"
    folder.rename(elsewhere)
    folder.symlink_to(elsewhere)
    assert cached(tmp_path) == folder
    of_another_user(elsewhere, environment)
    keep_compiled_programs()
    assert os.environ[NAMES[0]] == ""
    assert "belongs to another user" in capsys.readouterr().err
