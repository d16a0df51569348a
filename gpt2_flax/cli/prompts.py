"""Read prompts from a file."""

import sys
from pathlib import Path

from gpt2_flax.errors import ExitCode, UserError, io_error
from gpt2_flax.input_files import VOCABULARY_BYTES, read_whole


def read_prompts(path: Path) -> list[str]:
    """Return the lines of a UTF-8 file that are not blank; `-` means standard input.

    Raises:
        UserError: NO_INPUT if there is no file or no prompt in it; DATA for a line that is not UTF-8.
    """
    where = "stdin" if str(path) == "-" else path
    try:
        data = sys.stdin.buffer.read() if where == "stdin" else read_whole(path, VOCABULARY_BYTES)
    except FileNotFoundError:
        raise UserError(ExitCode.NO_INPUT, "file of prompts not found", path, "check the name") from None
    except OSError as error:
        raise io_error(error, path) from None
    lines = []
    for number, line in enumerate(data.removeprefix(b"\xef\xbb\xbf").split(b"\n"), 1):
        try:
            lines.append(line.decode().removesuffix("\r"))
        except UnicodeDecodeError:
            what, fix = "prompt that is not UTF-8", "convert the file with: iconv -t UTF-8"
            raise UserError(ExitCode.DATA, what, f"{where}:{number}", fix) from None
    if prompts := [line for line in lines if line.strip()]:
        return prompts
    raise UserError(ExitCode.NO_INPUT, "no prompt in the file", where, "write one on each line")
