import contextlib
import errno

import pytest

from gpt2_flax.errors import ExitCode, UserError, io_error, quote
from gpt2_flax.folders import new_folder
from gpt2_flax.progress import drawn_by, duration, progress_bar, si, status


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0s"), (59.4, "59s"), (59.6, "1m00s"), (185, "3m05s"), (7620, "2h07m"), (273600, "3d04h")],
)
def test_durations_are_for_people(seconds, text):
    assert duration(seconds) == text


@pytest.mark.parametrize(("number", "text"), [(0.5, "0.5"), (999, "999"), (1234, "1.23k"), (2.5e9, "2.5G")])
def test_rates_have_si_prefixes(number, text):
    assert si(number) == text


@pytest.mark.parametrize(
    ("number", "unit", "text"), [(5, "B", "5 B"), (56.4e6, "B", "56.4 MB"), (2e3, "tokens", "2k tokens")]
)
def test_prefixes_stand_at_symbols_and_not_at_words(number, unit, text):
    assert si(number, unit) == text


def test_bars_are_silent_where_there_is_no_terminal(capsys):
    with progress_bar("reading", 10, "B") as advance:
        advance(10)
    assert capsys.readouterr() == ("", "")


def test_bars_are_drawn_at_a_terminal(capsys, monkeypatch):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    with progress_bar("reading", 10, "B", "tokens") as advance:
        advance(10, 3)
    shown = capsys.readouterr().err
    assert "reading" in shown
    assert "tokens/s" in shown


def test_bars_and_states_within_another_display_are_drawn_by_it(capsys, monkeypatch):
    drawn = []

    @contextlib.contextmanager
    def draw(what, total):
        drawn.append((what, total))
        yield drawn.append

    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    with drawn_by(draw), progress_bar("reading", 10, "B", "tokens") as advance, status("compiling") as update:
        advance(4, 2)
        update("linking")
    assert drawn == [("reading", 10), ("compiling", None), 4]
    assert capsys.readouterr() == ("", "")


def test_a_folder_appears_whole_or_not_at_all(tmp_path):
    def fill(output, fail=False, overwrite=False):
        with new_folder(output, "marker", overwrite) as folder:
            (folder / "marker").write_text(str(fail))
            assert not (output / "new").exists()
            (folder / "new").touch()
            if fail:
                raise ValueError("half way")

    output = tmp_path / "deep" / "folder"
    with pytest.raises(ValueError, match="half way"):
        fill(output, fail=True)
    assert list(output.parent.iterdir()) == []
    fill(output)
    assert sorted(path.name for path in output.iterdir()) == ["marker", "new"]
    with pytest.raises(UserError, match="--overwrite") as error:
        fill(output)
    assert error.value.exit_code == ExitCode.CANT_CREATE
    (output / "new").unlink()
    with pytest.raises(ValueError, match="half way"):
        fill(output, fail=True, overwrite=True)
    assert [path.name for path in output.iterdir()] == ["marker"]


def test_a_folder_of_somebody_else_is_never_replaced(tmp_path):
    output = tmp_path / "theirs"
    output.mkdir()
    (output / "letter.txt").touch()
    with pytest.raises(UserError, match="not ours to replace"), new_folder(output, "marker", overwrite=True):
        pass
    assert (output / "letter.txt").exists()


def test_an_output_without_a_name_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="no name"), new_folder(type(tmp_path)(), "marker"):
        pass


@pytest.mark.parametrize(
    ("number", "code"),
    [(errno.ENOSPC, ExitCode.IO), (errno.EROFS, ExitCode.CANT_CREATE), (errno.EIO, ExitCode.IO)],
)
def test_errors_of_the_system_get_an_exit_code(number, code):
    assert io_error(OSError(number, "text"), "place").exit_code == code


def test_quotes_are_ascii_and_short():
    assert quote("好\ud800\x1b") == r"'\u597d\ud800\x1b'"
    assert len(quote("x" * 1000)) == 80
