"""How a process of a run comes to the hub in process 0."""

import socket
import time

from gpt2_flax.errors import ExitCode, UserError
from gpt2_flax.parallel import meeting


def connect(host: str, port: int) -> socket.socket:
    """Returns a connection to the hub, for which it waits. Raises `UserError` (TRY_AGAIN)."""
    patience = time.monotonic() + meeting.START
    while True:
        try:
            return socket.create_connection((host, port), timeout=5.0)
        except OSError as error:  # no name yet, nobody listens yet: process 0 may be started later
            if time.monotonic() > patience:
                what = f"process 0 cannot be reached within {meeting.START:.0f} s ({error.strerror or error})"
                fix = "check that it runs, its address, and that the hosts let each other in"
                raise UserError(ExitCode.TRY_AGAIN, what, f"{host}:{port}", fix) from error
            time.sleep(min(1.0, meeting.START / 10))
