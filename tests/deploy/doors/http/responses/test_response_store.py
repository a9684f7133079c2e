"""The store of responses by itself: what it finds, what it counts, and who gives way."""

import random

import pytest

from deploy.doors.openai.responses.store.storing import ENTRY_BYTES, Bounds, KeptResponses, StoredTurn

WIDE = Bounds(1000, 1 << 20, 100.0)


class Clock:
    now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def store(clock: Clock) -> KeptResponses:
    return KeptResponses(clock)


def put(
    store: KeptResponses, owner: str, name: str, previous: str | None = None, size: int = 10, bounds: Bounds = WIDE
) -> bool:  # fmt: skip
    return store.put(owner, name, previous, b"b" * size, StoredTurn(f"i{name}".encode(), f"o{name}".encode()), bounds)


def names(store: KeptResponses, owner: str, name: str) -> list[str]:
    return [turn.input.decode()[1:] for turn in store.turns(owner, name) or ()]


def test_a_conversation_is_kept_once(store: KeptResponses) -> None:
    turn = StoredTurn(b"x" * 1000, b"y" * 1000)
    previous = None
    for name in "abcdef":
        assert store.put("ann", name, previous, b"", turn, WIDE)
        previous = name
    assert store.size_bytes == 6 * (2000 + ENTRY_BYTES)
    assert len(store.turns("ann", "f") or ()) == 6
    for name in "abcde":
        assert store.delete("ann", name)
    assert store.size_bytes == 6 * 2000 + ENTRY_BYTES, "the last one still needs them all"
    assert store.delete("ann", "f")
    assert store.size_bytes == 0


def test_branches_share_their_beginning(store: KeptResponses) -> None:
    put(store, "ann", "a")
    put(store, "ann", "b", "a")
    put(store, "ann", "c", "a")
    store.delete("ann", "a")
    assert (names(store, "ann", "b"), names(store, "ann", "c")) == (["a", "b"], ["a", "c"])
    store.delete("ann", "b")
    assert names(store, "ann", "c") == ["a", "c"]
    assert store.body("ann", "a") is None


def test_nobody_finds_what_another_has(store: KeptResponses) -> None:
    put(store, "ann", "a")
    assert (store.body("bob", "a"), store.turns("bob", "a"), store.delete("bob", "a")) == (None, None, False)
    assert not put(store, "bob", "b", "a")
    assert store.count == 1


def test_each_is_kept_for_its_time(store: KeptResponses, clock: Clock) -> None:
    put(store, "ann", "a")
    clock.now_s = 60.0
    put(store, "ann", "b", "a")
    clock.now_s = 100.0
    assert (store.body("ann", "a"), names(store, "ann", "b")) == (None, ["a", "b"])
    clock.now_s = 160.0
    assert (store.body("ann", "b"), store.count, store.size_bytes) == (None, 0, 0)


def test_the_account_that_has_most_gives_way(store: KeptResponses) -> None:
    put(store, "bob", "precious")
    bounds = Bounds(10, 1 << 20, 100.0)
    for number in range(50):
        assert put(store, "ann", f"a{number}", bounds=bounds)
    assert store.count == 10
    assert store.body("bob", "precious") is not None
    assert (store.body("ann", "a40"), store.body("ann", "a41") is None) == (None, False)
    few_bytes = Bounds(1000, 5000, 100.0)
    for number in range(50):
        put(store, "ann", f"b{number}", size=1000, bounds=few_bytes)
    assert store.size_bytes <= 5000
    assert store.body("bob", "precious") is not None


def test_what_is_too_large_pushes_nobody_out(store: KeptResponses) -> None:
    put(store, "ann", "a")
    assert not put(store, "ann", "b", size=2000, bounds=Bounds(10, 1000, 100.0))
    assert not put(store, "ann", "c", bounds=Bounds(0, 1000, 100.0))
    assert store.body("ann", "a") is not None


@pytest.mark.few(7)
@pytest.mark.parametrize("seed", range(20))
def test_whatever_happens_bounds_hold_and_conversations_are_whole(seed: int) -> None:
    chance, clock = random.Random(seed), Clock()
    store, bounds = KeptResponses(clock), Bounds(12, 9000, 30.0)
    ways: dict[tuple[str, str], list[str]] = {}
    for number in range(400):
        owner, clock.now_s = chance.choice("xyz"), clock.now_s + chance.random()
        theirs = [name for who, name in ways if who == owner]
        if chance.random() < 0.2 and theirs:
            store.delete(owner, chance.choice(theirs))
        previous = chance.choice(theirs) if theirs and chance.random() < 0.7 else None
        there = previous is None or store.body(owner, previous) is not None
        name = str(number)
        if put(store, owner, name, previous, chance.randrange(1500), bounds):
            assert there
            ways[owner, name] = [*(ways[owner, previous] if previous is not None else ()), name]
        assert store.count <= 12
        assert store.size_bytes <= 9000
        for (who, each), way in ways.items():
            assert names(store, who, each) in ([], way)
    for who, each in ways:
        store.delete(who, each)
    assert (store.count, store.size_bytes) == (0, 0)
