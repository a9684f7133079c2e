"""When a group that has died is started again."""

from hypothesis import given
from hypothesis import strategies as st

from cluster.fleet.restarts import LONGEST_PAUSE_S, Restarts


def test_the_first_deaths_are_followed_soon_and_later_ones_are_waited_for_longer() -> None:
    restarts = Restarts(3, 600.0)
    pauses = [restarts.after_death(float(now_s)) for now_s in range(6)]
    assert [pause.seconds for pause in pauses] == [0.0, 1.0, 2.0, 30.0, 60.0, 120.0]
    assert [pause.spent for pause in pauses] == [False, False, False, True, True, True]


def test_what_lies_beyond_the_window_is_forgotten() -> None:
    restarts = Restarts(1, 600.0)
    assert not restarts.after_death(0.0).spent
    assert restarts.after_death(599.0).spent
    assert restarts.after_death(600.5).spent, "the one that began after the pause is remembered"
    assert restarts.after_death(2000.0).seconds == 0.0


def test_who_has_lived_well_in_between_is_not_held_back() -> None:
    """A fault every two minutes is no reason to rest, and one that is met at each start is."""
    restarts, now_s = Restarts(2, 600.0), 0.0
    for _ in range(10):
        assert restarts.after_death(now_s, lived_s=120.0, start_s=60.0).seconds == 0.0
        now_s += 180.0
    again = [restarts.after_death(now_s + each, lived_s=29.0, start_s=5.0).seconds for each in range(3)]
    assert again == [1.0, 30.0, 60.0], "the last start still counts"
    assert restarts.after_death(now_s + 200.0, lived_s=59.0, start_s=60.0).spent, "it starts longer than it lives"
    assert not restarts.after_death(now_s + 300.0, lived_s=61.0, start_s=60.0).spent
    assert Restarts(0, 600.0).after_death(0.0, lived_s=1000.0).spent, "as was asked for"


@given(st.integers(0, 5), st.lists(st.floats(0, 1e4), max_size=200))
def test_a_group_is_never_given_up(most: int, gaps_s: list[float]) -> None:
    restarts, now_s = Restarts(most, 600.0), 0.0
    for gap_s in gaps_s:
        pause = restarts.after_death(now_s, gap_s)
        assert 0.0 <= pause.seconds <= LONGEST_PAUSE_S
        now_s += pause.seconds + gap_s
