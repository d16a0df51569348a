"""Run the checks of `gpt2-flax doctor`, the most important first, each in its own process with a time limit.

This process never touches a device. So a check that crashes or hangs costs only itself, a JAX that cannot be imported
is one more fault, and each check has the whole memory of the devices.
"""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any, Literal, NamedTuple

import gpt2_flax
from gpt2_flax.doctor.report import Record
from gpt2_flax.errors import printable
from gpt2_flax.folders import scratch_folder
from gpt2_flax.interruption import cleaned_up
from gpt2_flax.progress import duration, status


class Check(NamedTuple):
    name: str
    code: str
    """The function that runs the check, as `module:function`."""
    seconds: float
    """The time limit."""


JAX = "jax"
CHECKS = (
    Check("machine", "gpt2_flax.doctor.machine:machine", 60),
    Check(JAX, "gpt2_flax.doctor.backend:backend", 60),
    Check("rates", "gpt2_flax.doctor.rates:rates", 60),
    Check("attention", "gpt2_flax.doctor.attention:attention", 100),
    Check("determinism", "gpt2_flax.doctor.training:determinism", 75),
    Check("collectives", "gpt2_flax.doctor.rates:collectives", 45),
    Check("training", "gpt2_flax.doctor.training:speed", 150),
)
_LEAST = 2.0  # seconds that a check needs to report anything
_COLUMN = 28
_KILLED_AFTER = 5.0  # seconds after its limit, if a check does not end itself
_POLL = 0.05
_LOG = 8000  # characters of the log of a failed check that are kept
_CHILD = """import json, sys
sys.path[:] = json.loads(sys.argv[3])  # import the same package as the parent, in any folder
from gpt2_flax.doctor import child
child.run(*sys.argv[1:3])
"""


@dataclass
class Outcome:
    """The results of a check."""

    status: Literal["done", "failed", "out of time", "skipped"] = "skipped"
    seconds: float = 0.0
    found: list[Record] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    log: str = ""
    """The end of the log of a check that is not done."""


def examine(seconds: float, say: Callable[[str], object]) -> dict[str, Any]:
    """Run all checks within `seconds`, print the results with `say`, and return them for JSON.

    The list `wrong` in the results has a sentence for each fault.
    """
    start, outcomes = time.monotonic(), {}
    for number, check in enumerate(CHECKS, 1):
        left = seconds - (time.monotonic() - start)
        if JAX in outcomes and outcomes[JAX].status != "done":
            outcome = Outcome(skipped=[f"{check.name}: JAX does not start"])
        elif left < _LEAST:
            outcome = Outcome(skipped=[f"{check.name}: no time left"])
        else:
            doing = f"{check.name}, check {number} of {len(CHECKS)}"
            with status(doing) as show:
                outcome = run_check(check, left, partial(_tick, show, doing, start + seconds))
        outcomes[check.name] = outcome
        for line in _lines(check, outcome):
            say(line)
    wrong = [sentence for outcome in outcomes.values() for sentence in outcome.wrong]
    skipped = sum(len(outcome.skipped) for outcome in outcomes.values())
    unseen = f", {skipped} skipped" if skipped else ""
    say(f"{'result':<{_COLUMN}}{count_of(wrong)} wrong{unseen}, in {duration(time.monotonic() - start)}")
    return {
        "gpt2_flax": gpt2_flax.__version__,
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "seconds": round(time.monotonic() - start, 1),
        "wrong": wrong,
        "parts": {name: asdict(outcome) for name, outcome in outcomes.items()},
    }


def run_check(check: Check, left: float, tick: Callable[[], object] = lambda: None) -> Outcome:
    """Run a check in its own process until its limit, but at most `left` seconds; call `tick` often."""
    limit, start = min(check.seconds, left), time.monotonic()
    with scratch_folder() as folder:
        records, log = folder / "records", folder / "log"
        command = [sys.executable, "-c", _CHILD, check.code, str(limit), json.dumps(sys.path)]
        with open(records, "wb") as out, open(log, "wb") as err:
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=out, stderr=err, start_new_session=True
            )
        with cleaned_up(lambda: os.killpg(process.pid, signal.SIGKILL)):
            while (code := process.poll()) is None and time.monotonic() < start + limit + _KILLED_AFTER:
                tick()
                time.sleep(_POLL)
            if code is None:
                os.killpg(process.pid, signal.SIGKILL)
                code = process.wait()
        took = time.monotonic() - start
        found = [json.loads(line) for line in records.read_text(encoding="utf-8").splitlines() if line[-1:] == "}"]
        messages = log.read_text(encoding="utf-8", errors="replace")[-_LOG:]
    outcome = Outcome("done" if code == 0 else "out of time" if took >= limit else "failed", round(took, 1))
    outcome.found = [record for record in found if "name" in record]
    outcome.wrong = [record["wrong"] for record in found if "wrong" in record]
    outcome.skipped = [record["skipped"] for record in found if "skipped" in record]
    if code == 0:
        return outcome
    outcome.log = messages
    if outcome.status == "failed":
        reasons = [record["failed"] for record in found if "failed" in record] or [_ending(code, messages)]
        outcome.wrong.append(f"{check.name} failed: {reasons[0]}")
    elif limit < check.seconds:
        outcome.skipped.append(f"the rest of {check.name}, cut off after {duration(limit)}: give more --seconds")
    else:
        outcome.wrong.append(f"{check.name} hangs: no end after {duration(limit)}{_place(messages)}")
    return outcome


def _ending(code: int, messages: str) -> str:
    how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
    last = [line for line in messages.splitlines() if line.strip() and not line.startswith((" ", "Extension modules"))]
    return f"its process ended with {how}{_place(messages)}" + (f", after: {last[-1][:200]}" if last else "")


def _place(messages: str) -> str:
    """Return the innermost line of this package in a traceback of `faulthandler`."""
    found = re.search(r'File "[^"]*(gpt2_flax/(?!doctor/child)[^"]+)", line (\d+)', messages)
    return f" at {found[1]}:{found[2]}" if found else ""


def _tick(show: Callable[[str], object], doing: str, end: float) -> None:
    show(f"{doing}; at most {duration(max(0.0, end - time.monotonic()))} to go")


def _lines(check: Check, outcome: Outcome) -> Iterator[str]:
    took = "" if outcome.status == "skipped" else f" in {duration(outcome.seconds)}"
    yield f"{check.name:<{_COLUMN}}{outcome.status}{took}"
    facts = [(record["name"], record["text"]) for record in outcome.found]
    facts += [("skipped", name) for name in outcome.skipped] + [("WRONG", sentence) for sentence in outcome.wrong]
    for name, text in facts:
        yield f"  {name:<{_COLUMN - 2}}{printable(text)}"


def count_of(wrong: list[str]) -> str:
    """Return "nothing", "1 thing" or "N things"."""
    return f"{len(wrong) or 'nothing'}{' thing' if len(wrong) == 1 else ' things' if wrong else ''}"
