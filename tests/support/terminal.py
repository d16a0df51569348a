"""A command at a real pseudo-terminal, and what a person then sees there."""

import fcntl
import os
import pty
import re
import struct
import subprocess
import termios

COLUMNS = 100
_TOKENS = re.compile(r"\x1b\[([?\d;]*)([A-Za-z])|([\r\n])|([^\x1b\r\n]+)")


def at_terminal(command, folder, environment, until):
    """Run a command; press Ctrl-C once it has written `until`; return its exit code and all that was written."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, COLUMNS, 0, 0))
    switches = ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE", "COLUMNS", "LINES")
    environment = {name: value for name, value in environment.items() if name not in switches} | {"TERM": "xterm"}
    streams = {"stdin": theirs, "stdout": theirs, "stderr": theirs}
    keyboard = {"start_new_session": True, "preexec_fn": lambda: fcntl.ioctl(0, termios.TIOCSCTTY)}
    with subprocess.Popen(command, cwd=folder, env=environment, **keyboard, **streams) as process:
        os.close(theirs)
        written, asked = b"", False
        try:
            while more := _read(ours):
                written += more
                if not asked and until in written.decode(errors="ignore"):
                    os.write(ours, b"\x03")  # the terminal writes ^C and sends SIGINT
                    asked = True
            return process.wait(60), written.decode()
        finally:
            process.kill()
            os.close(ours)


def _read(terminal):
    try:
        return os.read(terminal, 2**16)
    except OSError:  # on Linux, nobody writes to it any more
        return b""


def seen(written):
    """Return the lines of a terminal without a lower end, and whether the cursor is shown."""
    rows, row, column, cursor = [""], 0, 0, True
    for numbers, command, control, text in _TOKENS.findall(written):
        if text:
            rows[row] = rows[row][:column].ljust(column) + text + rows[row][column + len(text) :]
            column += len(text)
        elif control:
            row, column = row + (control == "\n"), 0  # the terminal writes \r before each \n
            rows += [""] * (row == len(rows))
        elif command == "A":
            row -= int(numbers or 1)
        elif command == "K":
            assert numbers == "2"
            rows[row] = ""
        elif command in "hl":
            assert numbers == "?25"
            cursor = command == "h"
        else:
            assert command == "m", command
    return [row.rstrip() for row in rows], cursor
