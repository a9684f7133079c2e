"""The resident batch: the log applied row by row, lengths and stops counted like the scheduler counts them."""

import numpy as np
import pytest

from scheduler.protocol.leaders import (
    ROW_BITS,
    Command,
    Copy,
    Cut,
    Drop,
    End,
    Grant,
    LeaseId,
    Load,
    Offload,
    Receive,
    Remap,
    Send,
    Start,
    Trim,
)
from scheduler.protocol.messages import NO_TOKEN, FinishReason
from scheduler.protocol.sampling import Grammar, SamplingParams
from workers.loop.batch import MEASURED_TOKENS, Launched, Measured, ResidentBatch


def lease(serial: int, row: int) -> LeaseId:
    return LeaseId(serial << ROW_BITS | row)


def start(
    name: LeaseId,
    tokens: int = 6,
    *,
    output: int = 0,
    cached: int = 0,
    blocks: tuple[int, ...] = (0, 1),
    max_tokens: int = 8,
    min_tokens: int = 0,
    stop_ids: tuple[int, ...] = (),
    grammar: Grammar | None = None,
    prompt_logprobs: int | None = None,
    first: int = 0,
) -> Start:
    return Start(
        lease=name,
        tokens=np.arange(tokens, dtype=np.int32).tobytes(),
        prompt_tokens=tokens - output,
        cached_tokens=cached,
        blocks=np.array(blocks, np.int32).tobytes(),
        params=SamplingParams(max_tokens=max_tokens, min_tokens=min_tokens, grammar=grammar, prompt_logprobs=prompt_logprobs),
        seed=1,
        choice=0,
        stop_ids=stop_ids,
        max_tokens=max_tokens,
        first=first,
    )


def batch(max_num_seqs: int = 3, max_num_batched_tokens: int = 64) -> ResidentBatch:
    return ResidentBatch(max_num_seqs, 4, max_num_batched_tokens, 32)


def step(resident: ResidentBatch) -> Launched:
    return resident.launch(resident.plan())


def collect(resident: ResidentBatch, launched: Launched, *tokens: int) -> list[tuple[int, FinishReason]]:
    return resident.collect(launched, np.array(tokens, np.int64))


def test_a_start_fills_its_row() -> None:
    resident = batch()
    resident.apply(start(lease(1, 2), tokens=6, cached=4, blocks=(7, 5)))
    assert resident.applied == 1
    assert (resident.known[2], resident.computed[2], resident.granted[2]) == (6, 4, 8)
    assert resident.full.ids[2, :2].tolist() == [7, 5]
    launched = step(resident)
    assert (launched.plan.rows.tolist(), launched.plan.counts.tolist(), launched.first.tolist()) == ([2], [2], [4])


BLOCKS = np.arange(2, dtype=np.int32).tobytes()


@pytest.mark.parametrize(
    "command",
    [
        Copy(1, 0, 3),
        Send(1, BLOCKS, 1, 0),
        Receive(1, BLOCKS, 1, 0, ("host:1",)),
        Offload(1, BLOCKS, BLOCKS),
        Load(1, BLOCKS, BLOCKS),
        Cut(1, 0),
    ],
    ids=lambda command: type(command).__name__,
)
def test_what_moves_blocks_counts_as_applied_and_changes_no_row(command: Command) -> None:
    resident, untouched = batch(), batch()
    resident.apply(start(lease(1, 0)))
    untouched.apply(start(lease(1, 0)))
    resident.apply(command)
    assert (resident.applied, resident.vacated) == (2, [])
    for name in ("lease", "known", "computed", "granted"):
        assert (getattr(resident, name) == getattr(untouched, name)).all()
    assert (resident.full.counts == untouched.full.counts).all()
    assert (resident.full.ids == untouched.full.ids).all()


def test_grants_and_remaps_change_the_block_table_of_their_lease_only() -> None:
    resident = batch()
    resident.apply(start(lease(1, 0)))
    resident.apply(start(lease(2, 1), blocks=(3, 4)))
    resident.apply(Grant(lease(1, 0), (8, 9)))
    resident.apply(Remap(lease(2, 1), 0, 6))
    assert resident.full.ids[0, :4].tolist() == [0, 1, 8, 9]
    assert resident.full.ids[1, :2].tolist() == [6, 4]
    assert resident.granted[:2].tolist() == [16, 8]


def test_a_start_in_the_midst_keeps_the_places_of_its_blocks() -> None:
    """Those before the first that is seen have none; what is given back later keeps its place too."""
    resident = batch()
    resident.apply(start(lease(1, 0), 20, cached=12, blocks=(7, 5, 3), first=2))
    assert (resident.full.first[0], resident.full.counts[0], resident.granted[0]) == (2, 5, 20)
    assert resident.full.ids[0, 2:5].tolist() == [7, 5, 3]
    assert resident.full.edited == [(0, 2, 5)]
    launched = step(resident)
    assert (launched.first.tolist(), launched.plan.counts.tolist()) == ([12], [8])
    resident.apply(Grant(lease(1, 0), (9,)))
    resident.apply(Trim(lease(1, 0), 4))
    assert resident.full.ids[0, 4:6].tolist() == [3, 9]
    assert (resident.full.first[0], resident.granted[0]) == (4, 24)
    resident.apply(Drop(lease(1, 0)))
    assert resident.full.first[0] == 0


@pytest.mark.parametrize(
    "late", [Grant(lease(1, 0), (8,)), Remap(lease(1, 0), 0, 8), Drop(lease(1, 0)), Trim(lease(1, 0), 1)]
)
@pytest.mark.parametrize("reused", [False, True])
def test_a_command_for_an_ended_lease_is_a_no_op(late: Grant | Remap | Drop | Trim, reused: bool) -> None:
    resident = batch()
    resident.apply(start(lease(1, 0)))
    resident.apply(Drop(lease(1, 0)))
    if reused:
        resident.apply(start(lease(2, 0), blocks=(3, 4)))
    before = (resident.lease.tolist(), resident.granted.tolist(), resident.full.ids.tolist(), resident.known.tolist())
    resident.apply(late)
    assert before == (
        resident.lease.tolist(),
        resident.granted.tolist(),
        resident.full.ids.tolist(),
        resident.known.tolist(),
    )
    assert not resident.full.first.any()
    assert resident.applied == 3 + reused


def test_the_log_ends() -> None:
    resident = batch()
    resident.apply(End("shut down"))
    assert resident.ended == "shut down"


def test_max_tokens_counts_the_output_before_a_restart() -> None:
    resident = batch()
    resident.apply(start(lease(1, 0), tokens=6, output=4, max_tokens=6, blocks=(0, 1)))
    launched = step(resident)
    assert collect(resident, launched, 9) == []
    launched = step(resident)
    assert resident.plan().rows.tolist() == [], "no step is launched beyond max_tokens"
    assert collect(resident, launched, 9) == [(0, FinishReason.LENGTH)]
    assert resident.lease[0] == -1


@pytest.mark.parametrize(("min_tokens", "ends_after"), [(0, 1), (1, 1), (3, 3)])
def test_stop_ids_count_from_min_tokens_on(min_tokens: int, ends_after: int) -> None:
    resident = batch()
    resident.apply(start(lease(1, 0), tokens=2, min_tokens=min_tokens, stop_ids=(5, 7)))
    for count in range(1, ends_after + 1):
        ended = collect(resident, step(resident), 7)
        assert ended == ([(0, FinishReason.STOP)] if count == ends_after else [])


def test_a_stop_id_wins_over_length() -> None:
    resident = batch()
    resident.apply(start(lease(1, 0), tokens=2, max_tokens=1, stop_ids=(7,)))
    assert collect(resident, step(resident), 7) == [(0, FinishReason.STOP)]


def test_a_row_s_stop_ids_are_forgotten_with_its_lease() -> None:
    resident = batch()
    resident.apply(start(lease(1, 0), stop_ids=(5, 7, 9)))
    resident.apply(start(lease(2, 1), stop_ids=(3,)))
    resident.apply(Drop(lease(1, 0)))
    resident.apply(start(lease(3, 0), stop_ids=()))
    assert collect(resident, step(resident), 9, 7) == []


def test_a_chunk_that_does_not_end_the_prompt_samples_nothing() -> None:
    resident = batch(max_num_batched_tokens=4)
    resident.apply(start(lease(1, 0), tokens=6, stop_ids=(7,), max_tokens=1))
    launched = step(resident)
    assert launched.samples.tolist() == [False]
    assert collect(resident, launched, 7) == []
    assert step(resident).samples.tolist() == [True]


def test_a_step_under_way_does_not_end_the_lease_that_took_over_its_row() -> None:
    resident = batch()
    resident.apply(start(lease(1, 0), stop_ids=(7,)))
    launched = step(resident)
    resident.apply(Drop(lease(1, 0)))
    resident.apply(start(lease(2, 0), tokens=3, stop_ids=(7,)))
    assert resident.live(launched).tolist() == [False]
    assert collect(resident, launched, 7) == []
    assert resident.lease[0] == lease(2, 0)


def test_rows_whose_lease_has_ended_are_named_once() -> None:
    resident = batch()
    resident.apply(start(lease(1, 0), max_tokens=1))
    resident.apply(start(lease(2, 1)))
    assert resident.vacated == []
    collect(resident, step(resident), 1, 1)
    resident.apply(Drop(lease(2, 1)))
    resident.apply(Drop(lease(1, 0)))
    assert resident.vacated == [0, 1]


def test_a_sequence_out_of_slots_waits_for_its_grant() -> None:
    resident = batch()
    resident.apply(start(lease(1, 0), tokens=4, blocks=(0,)))
    step(resident)
    assert resident.plan().rows.tolist() == []
    resident.apply(Grant(lease(1, 0), (1,)))
    assert resident.plan().rows.tolist() == [0]


# ---- grammars and edits

DIGITS = Grammar("regex", "[0-9]+")


def test_a_row_with_a_grammar_goes_on_like_any_other_while_its_newest_token_is_on_the_device() -> None:
    resident = batch()
    resident.apply(start(lease(1, 0), grammar=DIGITS))
    resident.apply(start(lease(2, 1)))
    assert step(resident).plan.rows.tolist() == [0, 1]
    assert resident.plan().rows.tolist() == [0, 1]


def test_what_has_changed_in_the_block_table_is_written_down_for_executors() -> None:
    resident = batch()
    resident.apply(start(lease(1, 1), tokens=4, blocks=(5, 6)))
    resident.apply(Grant(lease(1, 1), (7,)))
    resident.apply(Remap(lease(1, 1), 0, 9))
    resident.apply(Grant(lease(9, 1), (8,)))  # of a lease that is not there
    assert resident.full.edited == [(1, 0, 2), (1, 2, 3), (1, 0, 1)]
    assert resident.full.ids[1, :3].tolist() == [9, 6, 7]


def test_a_row_is_not_held_back_by_a_grammar_it_had_before() -> None:
    resident = batch()
    resident.apply(start(lease(1, 0), grammar=DIGITS))
    step(resident)
    resident.apply(Drop(lease(1, 0)))
    resident.apply(start(lease(2, 0)))
    step(resident)
    assert resident.plan().rows.tolist() == [0]


@pytest.mark.parametrize("stop_ids", [(), (7,)])
def test_no_token_ends_a_sequence_as_failed(stop_ids: tuple[int, ...]) -> None:
    resident = batch()
    resident.apply(start(lease(1, 0), grammar=DIGITS, stop_ids=stop_ids))
    assert collect(resident, step(resident), NO_TOKEN) == [(0, FinishReason.FAILED)]
    assert resident.lease[0] == -1


# ---- log-probabilities of prompts


def measured(max_num_seqs: int = 3, max_num_batched_tokens: int = 1024) -> ResidentBatch:
    return ResidentBatch(max_num_seqs, 256, max_num_batched_tokens, 2048)


def test_a_measured_prompt_is_cut_into_bounded_chunks() -> None:
    resident = measured()
    resident.apply(start(lease(1, 0), 600, blocks=(0, 1, 2), prompt_logprobs=3))
    steps = [step(resident) for _ in range(4)]
    assert [launched.plan.counts.tolist() for launched in steps] == [[256], [256], [88], [1]]
    assert [launched.measured for launched in steps] == [
        (Measured(0, 256, 3),),
        (Measured(0, 256, 3),),
        (Measured(0, 87, 3),),  # the last token of the prompt predicts no prompt token
        (),
    ]


def test_measured_prompts_share_the_bound_oldest_first_and_the_others_fill_the_step() -> None:
    resident = measured()
    resident.apply(start(lease(3, 0), 200, prompt_logprobs=0))
    resident.apply(start(lease(2, 1), 100, prompt_logprobs=1))
    resident.apply(start(lease(1, 2), 500))
    launched = step(resident)
    assert dict(zip(launched.plan.rows.tolist(), launched.plan.counts.tolist(), strict=True)) == {2: 500, 1: 100, 0: 156}
    assert sum(part.count for part in launched.measured) <= MEASURED_TOKENS
    assert {int(launched.plan.rows[part.index]): (part.count, part.most) for part in launched.measured} == {
        1: (99, 1),
        0: (156, 0),
    }
    assert [part.count for part in step(resident).measured] == [43]


def test_a_prompt_of_one_token_has_nothing_to_measure() -> None:
    resident = measured()
    resident.apply(start(lease(1, 0), 1, prompt_logprobs=3))
    assert step(resident).measured == ()


def test_a_prompt_is_not_measured_again_once_it_has_output() -> None:
    """What was measured came to the scheduler before the first token of the output."""
    resident = measured()
    resident.apply(start(lease(1, 0), 500, output=1, prompt_logprobs=3))
    launched = step(resident)
    assert (launched.plan.counts.tolist(), launched.measured) == ([500], ())


def test_a_row_is_not_measured_for_the_lease_before() -> None:
    resident = measured()
    resident.apply(start(lease(1, 0), 500, prompt_logprobs=3))
    step(resident)
    resident.apply(Drop(lease(1, 0)))
    resident.apply(start(lease(2, 0), 500))
    launched = step(resident)
    assert (launched.plan.counts.tolist(), launched.measured) == ([500], ())
