"""Whom a group serves next: said by its keeper from another thread, at whatever moment of the leader's loop."""

import threading
import time
from collections.abc import Callable
from time import monotonic  # tests replace the module's

import pytest

from workers.config import SchedulerAddress
from workers.loop.terms import SchedulerTerms, Term

PATIENCE_S = 60.0


def term(epoch: int) -> Term:
    return Term(SchedulerAddress("here", epoch, "token"), epoch)


class Calling:
    """A call from another thread, and what has become of it."""

    def __init__(self, terms: SchedulerTerms, called: Term) -> None:
        self.error: BaseException | None = None
        self._thread = threading.Thread(target=self._call, args=(terms, called), daemon=True)
        self._thread.start()
        until(lambda: called in (terms._next, terms._taken) or not self._thread.is_alive())

    def _call(self, terms: SchedulerTerms, called: Term) -> None:
        try:
            terms.call(called)
        except ConnectionError as error:
            self.error = error

    def result(self) -> bool:
        """Whether the term has begun."""
        self._thread.join(PATIENCE_S)
        assert not self._thread.is_alive()
        return self.error is None

    @property
    def waits(self) -> bool:
        return self._thread.is_alive()


def until(true: Callable[[], bool]) -> None:
    deadline = monotonic() + PATIENCE_S
    while not true():
        assert monotonic() < deadline
        time.sleep(0.001)


def test_a_leader_that_serves_one_leaves_it_for_the_next() -> None:
    terms, left = SchedulerTerms(PATIENCE_S), list[int]()
    terms.begin(term(0), lambda: left.append(0))
    calling = Calling(terms, term(1))
    until(lambda: left == [0])
    assert terms.next() == term(1)
    assert calling.waits, "it has not greeted it yet"
    terms.begin(term(1), lambda: left.append(1))
    assert calling.result()
    assert left == [0]


def test_one_that_is_called_for_before_the_first_has_begun_is_next() -> None:
    terms, left = SchedulerTerms(PATIENCE_S), list[int]()
    calling = Calling(terms, term(1))
    terms.begin(term(0), lambda: left.append(0))
    assert left == [0]
    assert terms.next() == term(1)
    terms.begin(term(1), lambda: None)
    assert calling.result()


@pytest.mark.parametrize("what", ["cannot be reached", "another is called for", "the loop ends"])
def test_a_term_that_does_not_begin_is_said(what: str) -> None:
    terms = SchedulerTerms(0.0 if what == "cannot be reached" else PATIENCE_S)
    calling = Calling(terms, term(1))
    if what == "cannot be reached":
        assert terms.next() == term(1)
        assert terms.next() is None
    elif what == "another is called for":
        other = Calling(terms, term(2))
        assert terms.next() == term(2)
        terms.begin(term(2), lambda: None)
        assert other.result()
    else:
        terms.end()
    assert not calling.result()


def test_a_leader_waits_as_long_as_it_is_told_that_there_will_be_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock of its own: however long this machine keeps a thread from running, nobody is late."""
    now_s = [0.0]
    monkeypatch.setattr("workers.loop.terms.time.monotonic", lambda: now_s[0])
    terms, found = SchedulerTerms(PATIENCE_S), list[Term | None]()
    waiting = threading.Thread(target=lambda: found.append(terms.next()))
    waiting.start()
    for _ in range(4):
        now_s[0] += 0.9 * PATIENCE_S
        terms.hold_on()
        assert waiting.is_alive()
    calling = Calling(terms, term(1))
    waiting.join(PATIENCE_S)
    assert found == [term(1)]
    terms.end()
    assert not calling.result()


def test_nobody_is_waited_for_for_ever() -> None:
    assert SchedulerTerms(0.05).next() is None
