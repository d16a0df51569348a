"""How the hub in process 0 gathers the processes of a run.

Strangers can do little: nobody is let in after the start, and before it only by a number that is still missing.
"""

import socket
import time
from typing import Any

from gpt2_flax.errors import ExitCode, UserError, io_error
from gpt2_flax.parallel.messages import Connections, Peer, facts_of

START = 300.0  # seconds in which all processes must come


class Meeting:
    """Listens on a port from its creation on. Raises `UserError` (USAGE) when the port is taken."""

    def __init__(self, port: int, n_processes: int):
        both = socket.has_dualstack_ipv6()
        try:
            self._listener = socket.create_server(
                ("", port), family=socket.AF_INET6 if both else socket.AF_INET, dualstack_ipv6=both, backlog=4096
            )
        except OSError as error:
            reason = io_error(error, "").fix
            what = f"process 0 cannot listen on port {port}"
            fix = f"choose another port for the coordinator ({reason})"
            raise UserError(ExitCode.USAGE, what, socket.gethostname(), fix) from error
        self._n_processes = n_processes
        self.members: dict[int, Peer] = {}
        self.connections = Connections()
        self.connections.listen(self._listener)
        self.own, connection = socket.socketpair()
        """What process 0 itself speaks to the hub by; it says hello before the thread starts."""
        self.connections.add(connection)

    def gather(self) -> None:
        """Waits for all processes. Raises `UserError` for all members to end with: TRY_AGAIN, USAGE."""
        begun, told = time.monotonic(), False
        try:
            while len(self.members) < self._n_processes:
                for peer, hello in self.connections.hear(min(0.5, START / 10)):
                    self._welcome(peer, hello)
                # It has not begun: another may come in the place of one that is gone.
                self.members = {number: peer for number, peer in self.members.items() if not peer.gone}
                missing = [str(number) for number in range(self._n_processes) if number not in self.members]
                waited = time.monotonic() - begun
                if missing and waited > min(10.0, START / 2) and not told:
                    told = True
                    print(f"waiting for process {', '.join(missing)} of {self._n_processes}", flush=True)
                if missing and waited > START:
                    what = f"process {', '.join(missing)} of {self._n_processes} has not come within {START:.0f} s"
                    raise UserError(ExitCode.TRY_AGAIN, what, "", "see why it has not started, then start all again")
        finally:
            self.connections.stop_listening(self._listener)
            for stranger in set(self.connections.peers()) - set(self.members.values()):
                self.connections.drop(stranger)

    def _welcome(self, peer: Peer, hello: dict[str, Any]) -> None:
        number, n_processes = hello.get("number"), hello.get("n_processes")
        if peer.name or hello.get("kind") != "hello" or not isinstance(number, int):
            return
        peer.name = f"process {number} (host {hello.get('host')}, pid {hello.get('pid')})"
        if n_processes != self._n_processes:
            what = f"{peer.name} belongs to a run of {n_processes} processes, process 0 to one of {self._n_processes}"
            fix = "start all with the same number of processes"
        elif number in self.members:
            what = f"{self.members[number].name} and {peer.name} have the same number"
            fix = "give each process its own"
        else:
            peer.number, peer.facts = number, facts_of(hello)
            self.members[number] = peer
            return
        self.members[-1] = peer  # it is to hear of it too
        raise UserError(ExitCode.USAGE, what, "", fix)
