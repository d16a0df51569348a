"""Phases of a process and their limits, by a clock that the tests set."""

import math

import pytest

from gpt2_flax.processes.phases import Phases


class Clock:
    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def phases(clock):
    return Phases(clock)


def take(phases, clock, step, seconds):
    """Wait for the step before, and dispatch this step."""
    clock.now += seconds
    phases.step(step)


def test_before_a_stage_nothing_is_limited(phases):
    assert phases.limit == math.inf


def test_the_start_and_the_first_of_each_kind_have_hours_as_they_are_compiled(phases, clock):
    phases.start()
    assert (phases.name, phases.limit) == ("the start", 7200)
    take(phases, clock, 1, 3000)  # compiled and dispatched, but not finished
    assert (phases.name, phases.limit) == ("step 1", 7200)
    with phases.during("evaluation", 1):
        assert (phases.name, phases.limit) == ("the evaluation at step 1", 7200)
    with phases.during("save", 1):
        assert (phases.name, phases.limit) == ("the save at step 1", 7200)
    assert phases.name == "step 1"


@pytest.mark.parametrize(("seconds", "limit"), [(0.5, 120), (6.0, 120), (7.0, 140), (600.0, 12000)])
def test_a_step_may_take_two_minutes_or_20_times_as_long_as_most(phases, clock, seconds, limit):
    phases.start()
    take(phases, clock, 1, 3000)
    for step in range(2, 50):
        take(phases, clock, step, 5000 if step == 9 else seconds)
    assert phases.limit == limit
    assert phases.longest("step") == 5000


def test_a_step_that_ends_in_an_evaluation_is_measured_without_it(phases, clock):
    """If each step is evaluated, the loop waits for it before it dispatches the next step."""
    phases.start()
    take(phases, clock, 1, 3000)
    for step in range(2, 6):
        clock.now += 10
        with phases.during("evaluation", step - 1):
            clock.now += 500
        clock.now += 2
        with phases.during("save", step - 1):
            clock.now += 70
        take(phases, clock, step, 0)
    assert (phases.longest("step"), phases.limit) == (12, 240)
    assert (phases.longest("evaluation"), phases.longest("save")) == (500, 70)


def test_each_batch_of_an_evaluation_is_progress(phases, clock):
    phases.start()
    take(phases, clock, 1, 1)
    with phases.during("evaluation", 1):
        clock.now += 1000  # compilation
        phases.progress()
        assert phases.limit == 20_000
        for _ in range(150):
            clock.now += 60
            phases.progress()
        assert phases.limit == 1800  # 100 batches later
    assert phases.longest("evaluation") == 1000 + 150 * 60


def test_a_save_may_take_half_an_hour_or_20_times_the_longest(phases, clock):
    phases.start()
    take(phases, clock, 1, 1)
    for seconds, limit in ((60, 7200), (200, 1800), (3, 4000), (3, 4000)):
        with phases.during("save", 1):
            assert phases.limit == limit
            clock.now += seconds
    assert phases.longest("save") == 200


def test_the_longest_save_is_never_forgotten(phases, clock):
    """Only the first save is waited for as a whole."""
    phases.start()
    take(phases, clock, 1, 1)
    for seconds in [90] + 300 * [1]:
        with phases.during("save", 1):
            clock.now += seconds
    assert phases.longest("save") == 90


def test_another_stage_compiles_anew(phases, clock):
    phases.start()
    for step in (1, 2, 3):
        take(phases, clock, step, 40)
    phases.end()
    assert phases.name == "the end"
    phases.start()
    take(phases, clock, 1, 1)
    assert phases.limit == 7200
    assert (phases.longest("start"), phases.longest("step")) == (40, 0)


def test_marks_count_alike_whatever_time_is_taken(clock):
    def marks(seconds):
        phases, found = Phases(clock), []
        phases.start()
        for step in (1, 2, 3):
            take(phases, clock, step, seconds)
            with phases.during("evaluation", step):
                phases.progress()
                found.append(phases.marks)
        phases.end()
        return [*found, phases.marks]

    assert marks(1) == marks(99) == sorted(set(marks(1)))


def test_a_process_that_was_stopped_itself_did_not_wait(phases, clock):
    """For example by Ctrl-Z and fg, or because the machine was asleep."""
    phases.start()
    for step in (1, 2):
        take(phases, clock, step, 1)
    for _ in range(10):
        clock.now += 2
        waited = phases.waited()
    assert waited == 20
    clock.now += 5000
    assert phases.waited() == 20
    clock.now += 2
    assert phases.waited() == 22


def test_a_save_may_go_on_in_the_background_for_as_long_as_the_longest(phases, clock):
    phases.start()
    take(phases, clock, 1, 1)
    assert phases.still_saving() == 0
    for seconds, later, left in ((100, 0, 0), (5, 0, 95), (5, 40, 55), (5, 200, 0)):
        with phases.during("save", 1):
            clock.now += seconds
        clock.now += later
        assert phases.still_saving() == left
