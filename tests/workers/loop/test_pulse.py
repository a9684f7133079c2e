"""How long a step may take: by its own kind, with time for what is the first of its kind."""

import threading
import time

import numpy as np
import pytest

from scheduler.batching import StepPlan
from scheduler.protocol.leaders import Beat
from workers.loop.batch import Launched, Measured
from workers.loop.pulse import FACTOR, FIRST_S, FLOOR_S, FORGETTING, RESIZED_S, Heart, Pulse, kind_of


def step(decodes: int, chunk: int = 0, *, measured: bool = False) -> Launched:
    counts = np.array([1] * decodes + [chunk] * bool(chunk))
    plan = StepPlan(np.arange(len(counts)), counts, decodes)
    return Launched(plan, counts, counts, counts > 0, (Measured(0, 1, 1),) * measured)


class Loop:
    """A step loop by a clock of its own."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self.pulse = Pulse(lambda: self.now_s)

    def turn(self, took_s: float, *steps: Launched, committed: bool = True) -> float:
        """What the turn might have taken."""
        self.pulse.begin([kind_of(each) for each in steps])
        self.now_s += took_s
        busy_s, patience_s = self.pulse.busy()
        assert busy_s == pytest.approx(took_s)
        self.pulse.end(committed=committed)
        assert self.pulse.busy() == (0.0, 0.0)
        return patience_s


def test_the_first_step_of_a_kind_has_time_to_compile() -> None:
    loop = Loop()
    assert loop.turn(200.0, step(4)) == FIRST_S
    assert loop.turn(0.1, step(4)) == FACTOR * 200.0
    assert loop.turn(0.1, step(4, chunk=60)) == FIRST_S, "as many tokens, but a chunk"
    assert loop.turn(0.1, step(4, chunk=60, measured=True)) == FIRST_S, "and the whole vocabulary's logits"


def test_a_turn_that_has_begun_goes_on_when_another_step_comes_into_it() -> None:
    """Its time counts from its begin, also for what it teaches of the kind; how long it may take is asked anew."""
    loop = Loop()
    loop.turn(0.02, step(4))
    loop.pulse.begin([kind_of(step(4))])
    loop.now_s += 30.0
    loop.pulse.begin([kind_of(step(4)), kind_of(step(4, chunk=60))])
    loop.now_s += 20.0
    busy_s, patience_s = loop.pulse.busy()
    assert busy_s == pytest.approx(50.0)
    assert patience_s == FIRST_S
    loop.pulse.end(committed=True)
    assert loop.turn(1.0, step(4, chunk=60)) == pytest.approx(FACTOR * 50.0)
    assert loop.pulse.busy() == (0.0, 0.0), "and the next begins anew"


def test_one_of_another_size_is_given_what_its_tokens_take_and_time_for_a_kernel() -> None:
    loop = Loop()
    loop.turn(0.02, step(4))
    assert loop.turn(0.1, step(64)) == RESIZED_S
    loop.turn(1.0, step(1, chunk=500))
    assert loop.turn(0.1, step(1, chunk=50)) == RESIZED_S, "fewer tokens take no longer"
    assert loop.turn(0.1, step(1, chunk=4_000)) == pytest.approx(64 * FACTOR * 0.1), "by who promises least"
    assert loop.turn(0.1, step(1, chunk=500, measured=True)) == FIRST_S, "and what it does was never done"


def test_a_known_one_is_given_times_what_it_takes_and_seconds_at_least() -> None:
    loop = Loop()
    loop.turn(0.02, step(4))
    loop.turn(40.0, step(4, chunk=2048))
    assert loop.turn(0.02, step(4)) == FLOOR_S
    assert loop.turn(35.0, step(3, chunk=2048)) == pytest.approx(FACTOR * 40.0)


def test_what_this_process_slept_through_is_no_time_of_a_step() -> None:
    loop = Loop()
    loop.turn(0.02, step(4))
    loop.pulse.begin([kind_of(step(4))])
    loop.now_s += 30.0
    loop.pulse.slept(29.5)
    assert loop.pulse.busy() == pytest.approx((0.5, FLOOR_S))
    loop.pulse.end(committed=True)
    assert loop.turn(0.02, step(4)) == pytest.approx(FACTOR * 0.5), "nor does the next one have more for it"
    loop.pulse.begin([kind_of(step(4))])
    loop.now_s += 6.0
    assert loop.pulse.busy() == pytest.approx((6.0, FACTOR * FORGETTING * 0.5)), "what was slept before counts"


def test_a_slow_step_is_forgotten_in_time() -> None:
    loop = Loop()
    loop.turn(300.0, step(4))
    for _ in range(1000):
        loop.turn(0.02, step(4))
    assert loop.turn(0.02, step(4)) == FLOOR_S


def test_with_steps_under_way_the_turn_is_that_of_the_slowest() -> None:
    loop = Loop()
    loop.turn(0.001, step(4, chunk=2048), committed=False)
    assert loop.turn(1.0, step(4, chunk=2048), step(5)) == FIRST_S
    assert loop.turn(0.02, step(5), step(5)) == FIRST_S, "what was only launched is not known"
    assert loop.turn(0.02, step(5), step(5)) == FLOOR_S


def test_a_step_that_waits_for_a_grammar_may_take_any_time() -> None:
    loop = Loop()
    loop.turn(0.02, step(4))
    loop.pulse.begin([kind_of(step(4)), None])
    assert loop.pulse.busy() == (0.0, FIRST_S)


def test_a_heart_beats_while_the_loop_is_in_a_step_and_ends_when_nobody_listens() -> None:
    heard, ended = threading.Event(), threading.Event()
    pulse = Pulse()
    pulse.begin([kind_of(step(1))])

    def send(beat: Beat) -> None:
        assert beat.epoch == 7
        assert beat.busy_s > 0.0
        if heard.is_set():
            ended.set()
            raise ConnectionError("nobody listens")
        heard.set()

    heart = Heart(7, send, pulse)
    assert ended.wait(60.0)
    heart._thread.join(60.0)
    assert not heart._thread.is_alive()


def test_a_heart_that_was_kept_from_looking_leaves_that_out_of_the_step() -> None:
    said: list[tuple[float, float]] = []
    pulse, began_s = Pulse(), time.monotonic()
    pulse.begin([kind_of(step(1))])

    def send(beat: Beat) -> None:
        said.append((beat.busy_s, time.monotonic() - began_s))
        if len(said) == 2:
            raise ConnectionError("nobody listens")
        time.sleep(2.0)  # as if this process had no core

    heart = Heart(7, send, pulse)
    heart._thread.join(60.0)
    (_, first_s), (busy_s, wall_s) = said
    assert wall_s - first_s > 2.0
    assert 0.0 < busy_s < wall_s - 1.5
