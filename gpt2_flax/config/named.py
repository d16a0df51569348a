"""The configs of this package, and their names: `base` is `configs/base.toml`."""

from pathlib import Path

from gpt2_flax.errors import ExitCode, UserError, quote

_PACKAGE = Path(__file__).parents[1]
_FOLDERS = (_PACKAGE / "configs", _PACKAGE.parent / "configs")  # in a wheel, in a checkout


def named_configs() -> dict[str, Path]:
    """Return the config files of the package by name, in alphabetical order."""
    folder = next(filter(Path.is_dir, _FOLDERS))
    return {path.stem: path for path in sorted(folder.glob("*.toml"))}


def config_file(given: Path) -> Path:
    """Return the file that a user means by a path or by the name of a config; a file wins over a name.

    A folder does not: the config `quickstart` makes a folder `quickstart`.
    """
    return given if given.exists() and not given.is_dir() else named_configs().get(str(given), given)


def config_text(name: str) -> str:
    """Return the text of a config of the package; raise `UserError` (USAGE) for an unknown name."""
    try:
        return named_configs()[name].read_text(encoding="utf-8")
    except KeyError:
        raise UserError(ExitCode.USAGE, "there is no config of this name", quote(name), f"take {names()}") from None


def names() -> str:
    """Return the names of the configs as part of a sentence."""
    *first, last = named_configs()
    return f"{', '.join(first)} or {last}"
