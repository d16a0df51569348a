"""A trace that TensorBoard and XProf open, of the steps that were asked for."""

import gzip
import json

import pytest
from support.configs import changed

from gpt2_flax.checkpoint.run_folder import RunFolder
from gpt2_flax.training.loop import train

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(("steps", "traced"), [(2, {3, 4}), (100, {3, 4, 5, 6}), (0, set())])
def test_steps_are_traced(config, capsys, steps, traced):
    train(changed(config, training__evaluate_every=100, training__save_every=100), profile_steps=steps)
    folder = RunFolder(config.output).tensorboard / "plugins/profile"
    assert ("profile written" in capsys.readouterr().out) == bool(traced)
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert any(path.name.endswith(".xplane.pb") and path.stat().st_size for path in files) == bool(traced)
    if traced:
        (path,) = (path for path in files if path.name.endswith(".trace.json.gz"))
        events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
        calls = [event for event in events if event.get("name", "") == "PjitFunction(train_step)"]
        starts, seen, end = sorted((call["ts"], call["dur"]) for call in calls), 0, -1.0
        for start, took in starts:  # each call is traced by Python and again by what it calls
            seen, end = (seen + 1, start + took) if start > end else (seen, end)
        assert seen == len(traced)
