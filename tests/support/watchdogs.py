"""The processes of a run as threads of this process, and a process whose messages are written by hand."""

import socket
import threading
import time

from gpt2_flax.errors import UserError
from gpt2_flax.processes import messages
from gpt2_flax.processes.place import Place
from gpt2_flax.processes.watchdog import Watchdog


def join(address, n_processes, *numbers, n=None, facts=None):
    """Return the watchdogs of processes `numbers`, or their errors."""
    results = {}

    def come(number):
        try:
            place = Place(address, (n or {}).get(number, n_processes), number)
            results[number] = Watchdog.join(place, (facts or {}).get(number, {}))
        except UserError as error:
            results[number] = error

    threads = [threading.Thread(target=come, args=[number]) for number in numbers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    return [results[number] for number in numbers]


class Stranger:
    """Sends messages written by hand."""

    def __init__(self, address):
        host, port = address.split(":")
        patience = time.monotonic() + 5
        while True:
            try:
                self.socket = socket.create_connection((host, int(port)))
                break
            except OSError:
                assert time.monotonic() < patience
                time.sleep(0.01)
        self.rest = bytearray()

    def hello(self, number, n_processes):
        messages.send(self.socket, "hello", number=number, n_processes=n_processes, host="far", pid=7)

    def wait_for(self, kind):
        while True:
            for message in messages.receive(self.socket, self.rest):
                if message["kind"] == kind:
                    return message


def wait_until(true):
    patience = time.monotonic() + 10
    while not true():
        assert time.monotonic() < patience
        time.sleep(0.01)
