"""When two outputs are the same: tokens, ends and choices exactly, log-probabilities up to float64's rounding."""

import pytest

from deploy.frontend.outputs import CompletionOutput, RequestOutput

ROUNDING = 1e-9


def require_equal(output: RequestOutput, expected: RequestOutput, where: str) -> None:
    assert len(output.outputs) == len(expected.outputs), where
    for ours, theirs in zip(output.outputs, expected.outputs, strict=True):
        assert ours.token_ids == theirs.token_ids, where
        assert (ours.finish_reason, ours.stop_reason) == (theirs.finish_reason, theirs.stop_reason), where
        assert ours.text == theirs.text, where
        require_equal_logprobs(ours, theirs, where)


def require_equal_logprobs(ours: CompletionOutput, theirs: CompletionOutput, where: str) -> None:
    assert (ours.logprobs is None) == (theirs.logprobs is None), where
    for mine, other in zip(ours.logprobs or [], theirs.logprobs or [], strict=True):
        assert {token: entry.rank for token, entry in mine.items()} == {
            token: entry.rank for token, entry in other.items()
        }, where
        expected = {token: entry.logprob for token, entry in other.items()}
        assert {token: entry.logprob for token, entry in mine.items()} == pytest.approx(expected, abs=ROUNDING), where
