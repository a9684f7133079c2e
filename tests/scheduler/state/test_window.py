"""A model that sees a window: what is before it is given back while a sequence runs, and a hit needs no more than it."""

import pytest

from kvcache.ids import GroupId
from scheduler.config.core import Resolved
from scheduler.placement.limits import RequestRefused
from scheduler.protocol.leaders import Receive
from scheduler.state.sequence import State
from scheduler.state.window import Window
from tests.scheduler.cluster import Cluster, Stream, filled

PROMPT = filled(0, 1, 1, 0, 1, 0, 0, 1, 1, 1, 0, 0)


@pytest.mark.parametrize("window", range(1, 40))
@pytest.mark.parametrize("block_size", [4, 16])
def test_what_is_held_is_what_the_next_token_sees(window: int, block_size: int) -> None:
    """And a block at most beside it, wherever in its block that token stands."""
    made = Window.of(Resolved(window=window, grant_ahead=2, prefill_ahead=0), block_size)
    assert made is not None
    for position in range(200):
        full = position // block_size
        seen = max(0, position - window + 1) // block_size
        assert made.first(full) <= min(seen, max(0, full - 1))
        assert seen - made.first(full) <= (2 if window <= block_size else 1)
        assert (made.first(full) + made.most) * block_size >= position + 3, "there is room for what is granted ahead"


def test_without_a_window_there_is_none() -> None:
    assert Window.of(Resolved(), 16) is None


def submit(cluster: Cluster, prompt: list[int], max_tokens: int, priority: int = 0) -> Stream:
    return cluster.submit(prompt, max_tokens=max_tokens, priority=priority)[0]


@pytest.mark.parametrize("depth", [0, 1])
@pytest.mark.parametrize("enable_prefix_caching", [True, False])
def test_a_long_output_holds_no_more_than_the_window(depth: int, enable_prefix_caching: bool) -> None:
    cluster = Cluster((6,), window=9, depth=depth, max_num_batched_tokens=4, enable_prefix_caching=enable_prefix_caching)
    stream = submit(cluster, [1, 0, 1], 200)
    most = 0
    while stream.finished is None:
        cluster.step()
        most = max(most, cluster.held())
    assert most <= 2 + 2 + 1, "two that are seen, one that is filled, and what is granted ahead"
    assert len(stream.tokens) == 200
    cluster.run()
    assert cluster.given_back > 40


@pytest.mark.parametrize("depth", [0, 1])
def test_a_prompt_longer_than_its_pool_is_computed_in_chunks(depth: int) -> None:
    cluster = Cluster((8,), window=9, depth=depth, max_num_batched_tokens=4)
    streams = [submit(cluster, PROMPT, 5), submit(cluster, PROMPT[4:], 60)]
    cluster.run()
    assert [len(stream.tokens) for stream in streams] == [5, 60]
    assert cluster.core.counters.preemptions == 0, "what fits at the beginning fits to the end"


def test_chunks_do_not_wait_for_grants() -> None:
    """Reports and grants cross in time, also with a step under way while the next one is planned."""
    cluster = Cluster((8,), window=5, depth=1, max_num_batched_tokens=4)
    stream = submit(cluster, PROMPT, 1)
    turns = 0
    while stream.finished is None:
        cluster.step()
        turns += 1
    assert turns == len(PROMPT) // 4 + 1, "a chunk in each turn, and one more until its token is known"


def test_what_does_not_fit_at_once_is_refused() -> None:
    """A prompt of which less is needed than the window and what is granted ahead is served all the same."""
    cluster = Cluster((5,), window=9, depth=1, max_num_batched_tokens=4)
    assert Window.of(cluster.core.resolved, 4) == Window(2, 6)
    with pytest.raises(RequestRefused, match="need 6 blocks"):
        cluster.submit(PROMPT[:20], max_tokens=5)
    stream = submit(cluster, PROMPT[:12], 8)
    cluster.run()
    assert len(stream.tokens) == 8


def next_turn(cluster: Cluster, former: Stream, max_tokens: int = 1) -> int:
    """Tokens of a former prompt that the next turn of its conversation hits."""
    stream = submit(cluster, [*former.prompt, *former.tokens, 1, 0], max_tokens)
    cluster.run()
    return cluster.cached_tokens(stream)


def test_a_hit_needs_the_window_before_its_end_and_nothing_else() -> None:
    """The prompt's beginning has been evicted for its own end; the next turn of the conversation hits all of it."""
    cluster = Cluster((8,), window=9, max_num_batched_tokens=4)
    first = submit(cluster, PROMPT, 1)
    cluster.run()
    assert len(cluster.core.table.index.blocks[GroupId(0)]) <= 8 < len(PROMPT) // 4
    assert next_turn(cluster, first, 20) == len(PROMPT)
    assert cluster.begun_in_the_midst == 1


def test_where_a_part_of_the_window_is_gone_nothing_is_hit() -> None:
    cluster = Cluster((8,), window=9, max_num_batched_tokens=4)
    first = submit(cluster, PROMPT, 1)
    cluster.run()
    cluster.submit(filled(1, 0, 1, 1, 0, 0), salt="other", max_tokens=3)
    cluster.run()
    left = [node for node in cluster.core.table.index.blocks[GroupId(0)] if cluster.core.table.index.children[node]]
    assert left, "something of it is there"
    assert next_turn(cluster, first) == 0
    assert cluster.core.counters.miss_evicted >= len(PROMPT) - 4


def test_choices_of_one_prompt_share_its_window() -> None:
    cluster = Cluster((12,), window=9, max_num_batched_tokens=8)
    streams = cluster.submit(PROMPT, n=3, max_tokens=30)
    cluster.run()
    assert sorted(cluster.cached_tokens(stream) for stream in streams) == [0, len(PROMPT) - 4, len(PROMPT) - 4]
    assert cluster.core.counters.preemptions == 0


def test_who_has_to_give_way_goes_on_where_it_was() -> None:
    """Short prompts with long outputs: three fit at the beginning, and not when all have grown."""
    cluster = Cluster((8,), window=9, max_num_batched_tokens=4)
    streams = [submit(cluster, [value, 1], 60, priority=place) for place, value in enumerate((0, 1, 0))]
    cluster.run()
    assert [len(stream.tokens) for stream in streams] == [60, 60, 60]
    assert cluster.core.counters.preemptions > 0


def test_a_prompt_that_is_measured_or_averaged_is_computed_from_its_first_token_on() -> None:
    cluster = Cluster((8,), window=9, max_num_batched_tokens=4)
    cluster.submit(PROMPT, max_tokens=1)
    cluster.run()
    streams = [*cluster.submit(PROMPT, prompt_logprobs=0), *cluster.submit(PROMPT, pooling="mean")]
    cluster.run()
    assert [cluster.cached_tokens(stream) for stream in streams] == [0, 0]


def test_the_next_scheduler_is_told_what_can_be_hit_from_the_beginning() -> None:
    """What stands behind a block that has been overwritten has lost the tokens before it."""
    for pool, hit in ((16, len(PROMPT)), (8, 0)):
        cluster = Cluster((pool,), window=9, max_num_batched_tokens=4)
        first = submit(cluster, PROMPT, 1)
        cluster.run()
        cluster.lose_scheduler([0])
        assert next_turn(cluster, first) == hit


def busy_source(host_blocks: int = 0) -> tuple[Cluster, Stream]:
    """Two groups of one row each. The first has a conversation in its pool, and is busy with something else."""
    cluster = Cluster((24, 24), window=9, max_num_seqs=1, max_num_batched_tokens=4, fetch=True, host_blocks=host_blocks)
    talk = submit(cluster, PROMPT, 1)
    cluster.run()
    blocker = submit(cluster, filled(1, 1, 1), 60)
    assert cluster.core.groups[GroupId(0)].running == {cluster.sequence(blocker)}
    return cluster, talk


def window_under_way() -> tuple[Cluster, Stream, int]:
    """The next turn of the conversation goes to the second group; this transfer brings what it needs from the first."""
    cluster, talk = busy_source()
    second = submit(cluster, [*PROMPT, *talk.tokens, 1, 0], 3)
    for group in (0, 1):
        cluster.deliver(group)
        cluster.turn(group)
    (transfer,) = cluster.moves()
    return cluster, second, transfer


def test_a_window_is_fetched_and_nothing_before_it() -> None:
    cluster, talk = busy_source()
    second = submit(cluster, [*PROMPT, *talk.tokens, 1, 0], 9)
    assert cluster.sequence(second).state is State.FETCHING
    (receive,) = [command for command in cluster.groups[GroupId(1)].down if isinstance(command, Receive)]
    assert len(receive.blocks) // 4 == 2, "the two blocks that are seen, of twelve"
    cluster.run()
    assert cluster.cached_tokens(second) == len(PROMPT)
    assert cluster.core.counters.fetched_tokens == 8
    assert next_turn(cluster, second) >= len(PROMPT), "a window that was brought is hit as one that was computed"


def test_a_window_that_does_not_arrive_is_computed() -> None:
    """It is not fetched a second time, and what had been reserved for it is free."""
    cluster, second, transfer = window_under_way()
    cluster.move(transfer, ok=False)
    cluster.arrive(0)
    cluster.arrive(1)
    assert cluster.sequence(second).state is State.RUNNING
    cluster.run()
    assert cluster.cached_tokens(second) == 0
    assert (cluster.core.counters.failed_transfers, cluster.core.counters.fetches) == (1, 0)


def test_the_source_of_a_window_may_go_when_it_has_sent_it() -> None:
    """What it alone had of the prompt's beginning goes with it, and the window is named all the same."""
    cluster, second, transfer = window_under_way()
    cluster.move(transfer)
    cluster.arrive(0)
    cluster.lose(0)
    cluster.arrive(1)
    cluster.run()
    assert cluster.cached_tokens(second) == len(PROMPT)


def test_a_running_sequence_moves_with_its_window() -> None:
    cluster = Cluster((24, 24), window=9, max_num_batched_tokens=4, fetch=True)
    stream = submit(cluster, PROMPT, 60)
    cluster.step(times=20)
    assert stream.tokens
    assert cluster.migrate(stream)
    cluster.run()
    assert len(stream.tokens) == 60
    assert cluster.core.counters.migrations == 1
    assert cluster.core.counters.recomputed_tokens == 0
    moved = cluster.core.counters.fetched_tokens
    assert 0 < moved <= 5 * 4, "two blocks ahead, and two and a part when it has stopped"


def test_a_window_is_kept_in_host_memory() -> None:
    cluster = Cluster((8,), window=9, max_num_batched_tokens=4, host_blocks=40)
    first = submit(cluster, PROMPT, 1)
    cluster.run()
    assert cluster.core.counters.offloaded_tokens == 8
    cluster.submit(filled(1, 0, 1, 1, 0, 0, 1), salt="other", max_tokens=3)
    cluster.run()
    assert next_turn(cluster, first, 9) == len(PROMPT)
    assert (cluster.core.counters.loads, cluster.core.counters.loaded_tokens) == (1, 8)
