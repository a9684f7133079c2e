"""Words of a long read come now and then, and at its end."""

import pytest

from workers.model.sources.progress import bar, in_words


def test_words_come_now_and_then_and_once_at_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    now, said = [100.0], list[str]()
    monkeypatch.setattr("workers.model.sources.progress.time.monotonic", lambda: now[0])
    tell = in_words(said.append, "reading x", every_s=5.0)
    for seconds, done in ((0.0, 0), (1.0, 10**9), (4.9, 2 * 10**9), (5.1, 3 * 10**9), (6.0, 4 * 10**9), (6.1, 4 * 10**9)):
        now[0] = 100.0 + seconds
        tell(done, 4 * 10**9)
    assert [line.rpartition(" of ")[0].split()[-1] for line in said] == ["0.00", "3.00", "4.00"]
    assert said[1].startswith("reading x ━━━")
    assert said[1].endswith("3.00 of 4.00 GB")


def test_nothing_is_said_of_what_nobody_knows_yet() -> None:
    said: list[str] = []
    in_words(said.append, "reading x")(0, 0)
    assert said == []


def test_a_bar_is_as_long_whatever_is_done() -> None:
    assert [bar(done, 4, 8) for done in (0, 1, 4, 9)] == ["╌" * 8, "━━" + "╌" * 6, "━" * 8, "━" * 8]
    assert bar(0, 0, 4) == "╌" * 4
