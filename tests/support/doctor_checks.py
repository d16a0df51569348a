"""Checks that go wrong, run by tests/doctor/test_doctor.py in their own processes."""

import os
import signal
import sys
import time

from gpt2_flax.errors import ExitCode, UserError


def good(report):
    print("a library prints what it likes")
    report.line("answer", "42 and \x1b[2J", value=42, bad=float("nan"))


def raising(report):
    report.line("before", "it failed")
    raise UserError(ExitCode.DATA, "this is broken", "here", "fix it")


def crashing(report):
    report.line("before", "it crashed")
    print("about to crash", file=sys.stderr, flush=True)
    os.kill(os.getpid(), signal.SIGSEGV)
    time.sleep(60)


def hanging(report):
    report.line("before", "it hung")
    report._write = lambda record: time.sleep(600)
    report.wrong("never said")


def slow(report):
    for number in report.affordable((f"case {number}", number) for number in range(100)):
        time.sleep(0.2)
        report.line("case", str(number))


def wrong(report):
    report.wrong("the moon is full: wait")
