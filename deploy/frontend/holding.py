"""How many log-probabilities the answers of a process may hold until they are told: each takes some 250 bytes on its way to a
client, and a request can ask for millions. Pure.
"""

from collections.abc import Sequence

from deploy.frontend.errors import Fault, RequestError
from deploy.text.prompts import Prompt

MOST_OF_ONE, MOST_OF_ALL = 1 << 19, 1 << 20
"""Of one request: 12 prompts of 2,000 tokens with `prompt_logprobs=20`. Of a process: some 260 MB."""


class HeldLogprobs:
    """Those of a process. count: at this moment."""

    def __init__(self, most_of_one: int = MOST_OF_ONE, most_of_all: int = MOST_OF_ALL) -> None:
        self.count = 0
        self.most_of_one = most_of_one
        self.most_of_all = most_of_all

    def account(self) -> "Account":
        return Account(self)


class Account:
    """Those of one request, until it is closed."""

    def __init__(self, held: HeldLogprobs) -> None:
        self._held = held
        self._count = 0

    def __enter__(self) -> "Account":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """A second call does nothing."""
        self._held.count -= self._count
        self._count = 0

    def add(self, count: int, field: str) -> None:
        """field: the parameter that asks for them. Errors: RequestError INVALID if the request has too many; OVERLOADED if all
        requests of the process together have."""
        if self._count + count > self._held.most_of_one:
            raise RequestError.invalid(
                f"{field}: the answer would hold more than {self._held.most_of_one} log-probabilities: ask for fewer prompts, "
                "choices or tokens at once, or for fewer alternatives",
                field,
            )
        if count and self._held.count + count > self._held.most_of_all:
            message = f"answers under way hold {self._held.count} log-probabilities, and {self._held.most_of_all} are allowed"
            raise RequestError(Fault.OVERLOADED, message, param=field)
        self._count += count
        self._held.count += count


def of_prompts(prompts: Sequence[Prompt]) -> int:
    """Of the prompts' tokens, which every choice of an answer repeats."""
    return sum(
        prompt.params.n * len(prompt.token_ids) * (prompt.params.prompt_logprobs + 1)
        for prompt in prompts
        if prompt.params.prompt_logprobs is not None
    )
