"""Commands that fail in this process."""

from gpt2_flax import __main__ as cli


def fails(capsys, exit_code: int, arguments: list[str], *words: str) -> None:
    """Asserts the exit code and exactly one line on stderr, `error: ...`, with all of `words` in it."""
    capsys.readouterr()
    found = cli.exit_code([str(argument) for argument in arguments])
    err = capsys.readouterr().err
    assert found == exit_code, err
    assert err.startswith("error: "), err
    assert err.count("\n") == 1, err
    assert "Traceback" not in err
    for word in words:
        assert word in err
