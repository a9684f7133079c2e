"""The stopwatch counts what runs inside it, and neither what runs outside nor what only waits."""

import time

from simulator.stopwatch import Stopwatch


def spin(seconds: float) -> None:
    end_s = time.thread_time() + seconds
    while time.thread_time() < end_s:
        pass


def test_only_what_runs_inside_counts() -> None:
    watch = Stopwatch()
    spin(0.02)
    assert watch.look() == 0
    with watch:
        spin(0.05)
    spin(0.05)
    inside_s = watch.look()
    assert 0 < inside_s <= 0.1
    assert watch.look() == inside_s


def test_time_that_the_thread_did_not_get_is_taken_out() -> None:
    watch = Stopwatch()
    with watch:
        time.sleep(0.3)
        spin(0.01)
    assert watch.look() < 0.2
