"""The process of one check: it writes records to standard output, and ends itself when its time is up."""

import faulthandler
import importlib
import json
import os
import sys
import traceback

from gpt2_flax.doctor.report import Record, Report


def run(check: str, seconds: str) -> None:
    """Run a check, given as `module:function`, for at most `seconds`; end the process, with 0 if the check is done."""
    faulthandler.enable()
    faulthandler.dump_traceback_later(float(seconds), exit=True)  # ends also C code that hangs
    records = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # libraries may print to standard output

    def write(record: Record) -> None:
        print(json.dumps(record), file=records, flush=True)

    module, _, function = check.partition(":")
    code = 0
    try:
        getattr(importlib.import_module(module), function)(Report(write, 0.9 * float(seconds)))
    except Exception as error:
        traceback.print_exc()
        message = " ".join(str(error).split())
        write({"failed": f"{type(error).__name__}: {message}" if message else type(error).__name__})
        code = 1
    sys.stderr.flush()
    os._exit(code)  # the exit handlers of a library may crash, and the check is done
