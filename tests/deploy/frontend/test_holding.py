"""Log-probabilities that answers hold are counted, and bounded for each request and for all."""

import pytest

from deploy.frontend.errors import Fault, RequestError
from deploy.frontend.service.holding import HeldLogprobs, of_prompts
from deploy.text.prompts import Prompt
from scheduler.protocol.sampling import SamplingParams


def test_a_request_that_asks_for_too_many_is_refused_for_good() -> None:
    held = HeldLogprobs(most_of_one=100, most_of_all=150)
    with held.account() as account:
        account.add(60, "logprobs")
        with pytest.raises(RequestError) as refused:
            account.add(41, "logprobs")
        assert (refused.value.fault, refused.value.param) == (Fault.INVALID, "logprobs")
        account.add(40, "logprobs")
    assert held.count == 0


def test_requests_that_hold_too_many_together_are_refused_until_one_has_ended() -> None:
    held = HeldLogprobs(most_of_one=100, most_of_all=150)
    first, second = held.account(), held.account()
    first.add(100, "prompt_logprobs")
    with pytest.raises(RequestError) as refused:
        second.add(51, "prompt_logprobs")
    assert refused.value.fault is Fault.OVERLOADED
    assert refused.value.retry_after_s > 0
    second.add(0, "prompt_logprobs")  # who holds none is refused nothing
    first.close()
    first.close()
    second.add(51, "prompt_logprobs")
    assert held.count == 51


def test_every_choice_repeats_the_prompts() -> None:
    prompts = [
        Prompt([1] * 10, SamplingParams(prompt_logprobs=4, n=3)),
        Prompt([1] * 7, SamplingParams(prompt_logprobs=0)),
        Prompt([1] * 100, SamplingParams(logprobs=5)),
    ]
    assert of_prompts(prompts) == 10 * 5 * 3 + 7
