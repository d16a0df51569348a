"""The watchdogs of several processes, which are threads here; test_processes.py has real processes."""

import contextlib
import json
import math
import random
import re
import socket
import threading
import time

import pytest
from support.two_processes import free_ports
from support.watchdogs import Stranger, join, wait_until

from gpt2_flax.errors import ExitCode, UserError
from gpt2_flax.processes import meeting, messages, peers, phases
from gpt2_flax.processes.watchdog import Watchdog

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("quick")]


@pytest.fixture
def address():
    return f"localhost:{free_ports()}"


def leave(dog, error=None):
    """Run a stage within the watchdog in a thread; return the thread and a list for its exception."""
    raised = []

    def run():
        try:
            with dog, dog.running("runs/x"):
                if error:
                    raise error
        except Exception as found:
            raised.append(found)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    return thread, raised


def test_a_run_of_one_process_has_no_hub():
    dog = Watchdog()
    with dog, dog.running("run"):
        dog.phases.step(1)
        with dog.phases.during("save", 1):
            pass


def test_all_finish_in_any_order(address, left):
    stranger = threading.Timer(1.5, lambda: dogs.extend(join(address, 3, 2)))  # longer than SILENCE
    dogs = []
    stranger.start()
    dogs[:0] = join(address, 3, 0, 1)
    stranger.join()
    threads = []
    for dog in reversed(dogs):
        threads.append(leave(dog)[0])
        time.sleep(0.3)
        assert threads[0].is_alive() == (len(threads) < 3)  # it waits for the others
    for thread in threads:
        thread.join(5)
        assert not thread.is_alive()
    assert not left


@pytest.mark.parametrize("closing", ["whole", "half a line", "nonsense"])
def test_a_closed_connection_ends_all(address, left, closing):
    stranger = Stranger.__new__(Stranger)
    connect = threading.Thread(target=lambda: (stranger.__init__(address), stranger.hello(2, 3)))
    connect.start()
    dogs = join(address, 3, 0, 1)
    connect.join()
    stranger.wait_for("started")
    with dogs[0].running("runs/x"), dogs[1].running("runs/x"):
        stranger.socket.sendall({"whole": b"", "half a line": b'{"kind"', "nonsense": b"[1]\n"}[closing])
        stranger.socket.close()
        wait_until(lambda: len(left) == 2)
    for code, sentence in left.values():
        assert code == ExitCode.TRY_AGAIN
        how = "said what no process of a run says: '[1]'" if closing == "nonsense" else "has ended"
        assert sentence.startswith(f"process 2 (host far, pid 7) of the run {how}: runs/x; start the same command")


def test_silence_ends_all(address, left):
    connect = threading.Thread(target=lambda: strangers.append(Stranger(address)) or strangers[0].hello(1, 2))
    strangers = []
    connect.start()
    join(address, 2, 0)
    wait_until(lambda: left)
    assert left[0][0] == ExitCode.TRY_AGAIN
    assert "process 1 (host far, pid 7) of the run has been silent for 1 s" in left[0][1]
    assert strangers[0].wait_for("verdict")["number"] == 1  # it gets the verdict too, in case it wakes up
    strangers[0].socket.close()


def test_process_0_gone(address, left, monkeypatch):
    monkeypatch.setattr(
        peers.Hub, "_judge", lambda self: setattr(self, "_ended", True)
    )  # then it closes its connections
    join(address, 2, 0, 1)
    wait_until(lambda: len(left) == 2)
    assert left[1][0] == ExitCode.TRY_AGAIN
    assert re.match(r"process 0 \(host .*, pid \d+\) of the run has ended: gpt2-flax train; start the", left[1][1])


def test_process_0_silent(address, left, monkeypatch):
    monkeypatch.setattr(peers.Hub, "_judge", lambda self: time.sleep(2))
    join(address, 2, 0, 1)
    wait_until(lambda: len(left) == 2)
    assert re.match(r"process 0 \(host .*, pid \d+\) of the run has been silent for 1 s", left[1][1])


def test_one_fails_and_the_others_say_so(address, left):
    dogs = join(address, 3, 0, 1, 2)
    failure = UserError(ExitCode.IO, "disk full", "runs/x", "free some")
    thread, raised = leave(dogs[1], failure)
    wait_until(lambda: 0 in left and 2 in left)
    thread.join(5)
    assert raised == [failure]  # its own error
    for number in (0, 2):
        assert left[number][0] == ExitCode.IO
        assert re.match(
            r"process 1 \(.*\) of the run has failed: .*; it says: disk full: runs/x; free", left[number][1]
        )
    wait_until(lambda: 1 in left)  # it hangs while it unwinds, so it is ended with its own error
    assert left[1] == (ExitCode.IO, "disk full: runs/x; free some")


def test_process_0_fails_alone(address, left, tmp_path):
    dogs = join(address, 2, 0, 1)
    _, raised = leave(dogs[0], ZeroDivisionError("no"))
    wait_until(lambda: 1 in left)
    assert left[1][0] == ExitCode.BUG
    assert "process 0 (" in left[1][1]
    assert re.search(rf"it says: a bug in gpt2_flax \(ZeroDivisionError\): {tmp_path}/gpt2-flax-crash-", left[1][1])
    wait_until(lambda: raised and 0 in left)


@pytest.mark.parametrize(("code", "apart"), [(ExitCode.DIVERGED, 0.2), (ExitCode.TRY_AGAIN, 1.0)])
def test_all_fail_each_with_its_own_error(address, left, code, apart):
    """After an agreement one process may take much longer than the other, as in a save."""
    dogs = join(address, 2, 0, 1)
    errors = [UserError(code, f"error {number}", "runs/x", "fix") for number in range(2)]
    first, first_raised = leave(dogs[1], errors[1])
    time.sleep(apart)
    second, second_raised = leave(dogs[0], errors[0])
    first.join(5)
    second.join(5)
    assert (first_raised, second_raised) == ([errors[1]], [errors[0]])
    assert not left


def test_what_follows_from_a_death_is_not_blamed(address, left):
    """A collective raises in a survivor before the silent machine counts as dead."""
    connect = threading.Thread(target=lambda: strangers.append(Stranger(address)) or strangers[0].hello(1, 2))
    strangers = []
    connect.start()
    dogs = join(address, 2, 0)
    leave(dogs[0], ValueError("Gloo all-reduce failed"))
    wait_until(lambda: left)
    assert left[0][0] == ExitCode.TRY_AGAIN
    assert "process 1 (host far, pid 7) of the run has been silent" in left[0][1]
    strangers[0].socket.close()


def test_no_step_finished(address, left):
    dogs = join(address, 2, 0, 1)
    time.sleep(1.2)  # compilation may take long
    for step in (1, 2):
        for dog in dogs:
            dog.phases.step(step)
    for dog in dogs:
        with dog.phases.during("save", 2):
            time.sleep(0.7)
    time.sleep(0.2)
    assert not left
    dogs[0].phases.step(3)
    begun = time.monotonic()
    wait_until(lambda: len(left) == 2)
    assert time.monotonic() - begun > 0.8
    for code, sentence in left.values():
        assert code == ExitCode.TRY_AGAIN
        assert re.match(r"process 1 \(.*\) behind: no progress in step 2 for 1 s, and its limit is 1 s: ", sentence)


def work(dog, folder, during=None, wait=None):
    """Run two steps in a thread, and wait in an evaluation or save of the second step, or in the step for ever."""

    def run():
        with dog, dog.running(str(folder)):
            for step in (1, 2):
                dog.phases.step(step)
            with dog.phases.during(during, 2) if during else contextlib.nullcontext():
                if wait:
                    wait.wait()
            threading.Event().wait()

    threading.Thread(target=run, daemon=True).start()


HANG = r"no progress in step 2 for 1 s, and its limit is 1 s: "


def test_one_that_hangs_while_others_save_is_noticed_and_all_leave_their_stacks(address, left, tmp_path):
    """The other processes have finished the step, and wait in a save that may take long."""
    dogs = join(address, 3, 0, 1, 2)
    for dog, *where in zip(dogs, ["save", None, "save"], [threading.Event(), None, threading.Event()], strict=True):
        work(dog, tmp_path, *where)
    wait_until(lambda: len(left) == 3)
    for number, (code, sentence) in left.items():
        assert code == ExitCode.TRY_AGAIN
        assert re.match(rf"process 1 \(.*\) behind: {HANG}{tmp_path}; start the same command again", sentence)
        (log,) = tmp_path.glob(f"crash-*-{number}.log")
        assert sentence.endswith(f"; the stacks of this process are in {log}")
        text = log.read_text(encoding="utf-8")
        assert "behind: no progress in step 2" in text
        assert text.count(" in run\n") >= 3  # one for each thread of `work`: the log has all threads


def test_one_that_saves_for_long_is_waited_for(address, left, tmp_path):
    dogs, saved = join(address, 2, 0, 1), threading.Event()
    work(dogs[0], tmp_path, "save")
    work(dogs[1], tmp_path, "save", saved)
    time.sleep(2.0)  # process 0 waits in step 2 for twice its limit
    assert not left
    saved.set()
    begun = time.monotonic()
    wait_until(lambda: len(left) == 2)
    assert time.monotonic() - begun > 0.8  # the earlier wait of process 0 does not count
    for _, sentence in left.values():
        assert re.match(HANG, sentence)  # no single process is named: all wait


def test_a_run_of_one_process_that_hangs_is_ended(left, tmp_path):
    work(Watchdog(), tmp_path)
    wait_until(lambda: left)
    (log,) = tmp_path.glob("crash-*-0.log")
    assert left[0][0] == ExitCode.TRY_AGAIN
    assert re.match(HANG, left[0][1])
    assert left[0][1].endswith(f"{tmp_path}; {phases.AGAIN}; the stacks of this process are in {log}")
    assert " in run\n" in log.read_text(encoding="utf-8")


def test_outside_its_context_a_watchdog_of_one_process_watches_nothing(left, tmp_path):
    """A program that calls the functions of the package keeps its process, and gets errors unchanged."""
    dog = Watchdog()
    with contextlib.suppress(ZeroDivisionError), dog.running(str(tmp_path)):
        dog.phases.step(1)
        dog.phases.step(2)
        time.sleep(1.5)
        1 / 0  # noqa: B018
        pytest.fail("it was suppressed")
    assert not left
    assert not list(tmp_path.iterdir())


def test_a_bug_leaves_its_traceback_in_the_run_folder(tmp_path):
    with pytest.raises(UserError) as caught, Watchdog() as dog, dog.running(str(tmp_path)):
        1 / 0  # noqa: B018
    (log,) = tmp_path.iterdir()
    assert re.fullmatch(r"crash-\d{8}-\d{6}-0\.log", log.name)
    assert caught.value.exit_code == ExitCode.BUG
    assert str(caught.value) == f"a bug in gpt2_flax (ZeroDivisionError): {log}; please report it with that file"
    assert isinstance(caught.value.__cause__, ZeroDivisionError)
    assert "1 / 0" in log.read_text(encoding="utf-8")


def test_what_follows_from_the_end_of_another_leaves_no_crash_log(address, left, tmp_path):
    connect = threading.Thread(target=lambda: strangers.append(Stranger(address)) or strangers[0].hello(1, 2))
    strangers = []
    connect.start()
    (dog,) = join(address, 2, 0)
    connect.join()

    def run():
        with contextlib.suppress(UserError), dog, dog.running(str(tmp_path)):
            raise ValueError("Gloo all-reduce failed")

    threading.Thread(target=run, daemon=True).start()
    wait_until(lambda: list(tmp_path.iterdir()))
    strangers[0].socket.close()
    wait_until(lambda: left)
    assert "process 1 (host far, pid 7) of the run has ended" in left[0][1]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("wants", [[0], [1], [2], [0, 1, 2]])
def test_when_one_wants_to_stop_all_do_at_the_same_call(address, left, wants):
    dogs, draw, stopped = join(address, 3, 0, 1, 2), random.Random(0), {}
    pauses = [[draw.random() * 0.004 for _ in range(1000)] for _ in dogs]

    def run(dog):
        for question, pause in enumerate(pauses[dog.number], 1):
            time.sleep(pause)
            if dog.stops(dog.number in wants and question >= 20 + dog.number):
                stopped[dog.number] = question
                break
        assert dog.stops(False)  # from then on
        leave(dog)[0].join(10)

    threads = [threading.Thread(target=run, args=[dog]) for dog in dogs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert set(stopped) == {0, 1, 2}
    assert len(set(stopped.values())) == 1
    assert stopped[0] > 20
    assert not left


def test_one_process_stops_when_it_wants_to():
    assert [Watchdog().stops(wanted) for wanted in (False, True)] == [False, True]


def test_one_that_has_stopped_says_so_even_when_process_0_is_gone(address, left, monkeypatch):
    """Process 0, which has the hub, may end a moment before another process."""
    gone = threading.Event()
    monkeypatch.setattr(
        peers.Hub, "_judge", lambda self: setattr(self, "_ended", gone.is_set())
    )  # then it closes its connections
    dogs = join(address, 2, 0, 1)
    stopped = UserError(ExitCode.TRY_AGAIN, "stopped at step 7, saved", "runs/x", "run the same command to go on")
    thread, raised = leave(dogs[1], stopped)
    wait_until(lambda: dogs[1]._failure)
    gone.set()
    thread.join(5)
    assert raised == [stopped]
    wait_until(lambda: 1 in left)
    assert left[1] == (ExitCode.TRY_AGAIN, str(stopped))


def agree(dogs, facts, patience=math.inf):
    """Let each process compare its facts within a stage, and leave; return the error of each process."""
    raised = {}

    def run(dog, own):
        try:
            with dog, dog.running("runs/x"):
                dog.agree(own, patience)
                dog.agree({"一" * 9000: "二"})
        except UserError as error:
            raised[dog.number] = error

    threads = [threading.Thread(target=run, args=pair, daemon=True) for pair in zip(dogs, facts, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
        assert not thread.is_alive()
    return raised


def test_processes_that_agree_continue(address, left):
    dogs = join(address, 3, 0, 1, 2, facts={number: {"the version of jax": "1"} for number in range(3)})
    assert len({dog.token for dog in dogs}) == 1
    assert len(dogs[0].token) == 32
    assert agree(dogs, [{"a": "1", "b": "2"}, {"b": "2", "a": "1"}, {"a": "1", "b": "2"}]) == {}
    assert not left


def test_one_process_agrees_with_itself():
    Watchdog().agree({"a": "1"})


@pytest.mark.parametrize(
    ("facts", "name", "number", "values"),
    [
        ([{"a": "1"}, {"a": "1"}, {"a": "2"}], "a", 2, "12"),
        ([{"a": "1", "b": "x"}, {"a": "2", "b": "y"}, {"a": "1", "b": "x"}], "a", 1, "12"),
        ([{}, {}, {"late": "2"}], "late", 2, ("nothing", "2")),
    ],
)
def test_a_difference_ends_all_with_both_values(address, left, facts, name, number, values):
    raised = agree(join(address, 3, 0, 1, 2), facts)
    assert set(raised) == {0, 1, 2}
    who = r"\(host \S+, pid \d+\)"
    pattern = rf"process 0 {who} has {values[0]}, process {number} {who} has {values[1]}"
    for error in raised.values():
        assert error.exit_code == ExitCode.CONFIG
        assert error.what == f"processes of the run differ in {name}"
        assert re.fullmatch(pattern, error.where)
        assert error.fix == "start all with the same config, data, versions and devices"
    wait_until(lambda: len(left) == 3)  # no process ends itself here
    for code, sentence in left.values():
        assert code == ExitCode.CONFIG
        assert sentence.startswith(f"processes of the run differ in {name}: process 0 (")


def test_versions_are_compared_before_the_start(address):
    facts = {0: {"the version of jax": "1"}, 1: {"the version of jax": "2"}}
    for error in join(address, 2, 0, 1, facts=facts):
        assert error.exit_code == ExitCode.CONFIG
        assert error.what == "processes of the run differ in the version of jax"
        assert re.fullmatch(r"process 0 \(.*\) has 1, process 1 \(.*\) has 2", error.where)


def test_a_process_of_an_older_version_is_named(address):
    """An older version sends no facts."""
    connect = threading.Thread(target=lambda: strangers.append(Stranger(address)) or strangers[0].hello(1, 2))
    strangers = []
    connect.start()
    (error,) = join(address, 2, 0, facts={0: {"the version of gpt2_flax": "1"}})
    assert re.fullmatch(r"process 0 \(.*\) has 1, process 1 \(host far, pid 7\) has nothing", error.where)
    assert strangers[0].wait_for("verdict")["code"] == ExitCode.CONFIG
    strangers[0].socket.close()


@pytest.mark.parametrize("code", [ExitCode.NO_INPUT, ExitCode.TRY_AGAIN])
def test_processes_that_wait_for_a_failing_one_end_at_once(address, left, monkeypatch, code):
    monkeypatch.setattr(peers, "GRACE", 1000.0)
    dogs = join(address, 3, 0, 1, 2)
    failure = UserError(code, "no config", "c.toml", "make one")
    thread, own = leave(dogs[1], failure)
    raised = agree([dogs[0], dogs[2]], [{}, {}])
    thread.join(5)
    assert own == [failure]
    for error in raised.values():
        assert error.exit_code == code
        assert re.fullmatch(r"process 1 \(.*\) of the run has failed", error.what)
        assert error.fix == "it says: no config: c.toml; make one"
    assert set(raised) == {0, 2}
    wait_until(lambda: len(left) == 3)


def test_processes_that_look_for_devices_of_different_kinds_end(address, left):
    """JAX lets one process wait for devices of a kind that the other process does not have."""
    dogs = join(address, 2, 0, 1)
    raised = agree(dogs[1:], [{"the kind of local devices": "cpu"}], patience=0.5)
    assert raised[1].exit_code == ExitCode.CONFIG
    assert re.match(r"process 0 \(.*\) of the run has not named the kind of local devices within 0 s", raised[1].what)
    assert re.match(r"process 1 \(.*\) has cpu", raised[1].where)
    wait_until(lambda: len(left) == 2)
    assert left[0][0] == left[1][0] == ExitCode.CONFIG


@pytest.mark.parametrize(
    ("numbers", "n", "message"),
    [
        ([0, 1], {1: 3}, r"process 1 \(.*\) belongs to a run of 3 processes, process 0 to one of 2"),
        ([0, 2], {2: 3}, r"process 2 \(.*\) belongs to a run of 3 processes, process 0 to one of 2"),
    ],
)
def test_numbers_that_do_not_match(address, numbers, n, message):
    for error in join(address, 2, *numbers, n=n):
        assert error.exit_code == ExitCode.USAGE
        assert re.match(message, error.what)


def test_the_same_number_twice(address):
    stranger = Stranger.__new__(Stranger)
    connect = threading.Thread(target=lambda: (stranger.__init__(address), stranger.hello(1, 3)))
    connect.start()
    errors = join(address, 3, 0, 1)
    connect.join()
    stranger.socket.close()
    for error in errors:
        assert error.exit_code == ExitCode.USAGE
        assert "have the same number" in error.what
        assert "(host far, pid 7)" in error.what


def test_a_process_that_does_not_come(address, monkeypatch, capsys):
    monkeypatch.setattr(meeting, "START", 0.5)
    (error,) = join(address, 4, 0)
    assert error.exit_code == ExitCode.TRY_AGAIN
    assert error.what == "process 1, 2, 3 of 4 has not come within 0 s"
    assert "waiting for process 1, 2, 3 of 4" in capsys.readouterr().out


def test_process_0_cannot_be_reached(address, monkeypatch):
    monkeypatch.setattr(meeting, "START", 0.2)
    (error,) = join(address, 2, 1)
    assert error.exit_code == ExitCode.TRY_AGAIN
    assert "process 0 cannot be reached" in error.what
    assert error.where == address


def test_strangers_are_ignored(address, left):
    """Such as a port scanner before the start; after the start nobody is admitted."""

    def disturb():
        for said in (
            b"GET / HTTP/1.1\r\n\r\n",
            b"\xff" * 70_000,
            b"[" * 60_000 + b"\n",
            b'{"kind": "failed"}\n',
            b"{}\n",
        ):
            strangers.append(Stranger(address))
            with contextlib.suppress(OSError):
                strangers[-1].socket.sendall(said)
        late.wait()
        strangers.append(Stranger(address))
        strangers[-1].hello(1, 2)

    strangers, late = [], threading.Event()
    disturber = threading.Thread(target=disturb)
    disturber.start()
    threading.Timer(0.5, late.set).start()
    (dog,) = join(address, 2, 0)
    disturber.join()
    assert len(strangers[-1].wait_for("started")["token"]) == 32
    with pytest.raises(ConnectionError):
        socket.create_connection(("localhost", int(address.split(":")[1])))
    assert not left
    messages.send(strangers[-1].socket, "out")
    leave(dog)[0].join(5)
    strangers[-1].wait_for("over")
    for stranger in strangers:
        stranger.socket.close()


def test_messages_come_in_pieces():
    one, other = socket.socketpair()
    with one, other:
        other.settimeout(0.05)
        rest = bytearray()
        line = json.dumps({"kind": "failed", "code": 74, "sentence": "很" * 100}).encode() + b"\n"
        found = []
        for byte in line * 2:
            one.sendall(bytes([byte]))
            found += messages.receive(other, rest)
        assert found == [json.loads(line)] * 2
        assert messages.receive(other, rest) == []
        one.close()
        with pytest.raises(EOFError):
            messages.receive(other, rest)
        messages.send(other, "beat")
        messages.send(other, "beat")  # nobody is there: only `receive` reports it
