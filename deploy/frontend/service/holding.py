"""How many log-probabilities, and numbers of embeddings, the answers of a process may hold until they are told: the former take
some 250 bytes each on their way to a client, the latter some 30, and a request can ask for millions. Pure.
"""

from collections.abc import Sequence

from deploy.frontend.errors import Fault, RequestError
from deploy.text.prompts import Prompt

MOST_OF_ONE, MOST_OF_ALL = 1 << 19, 1 << 20
"""Of one request: 12 prompts of 2,000 tokens with `prompt_logprobs=20`. Of a process: some 260 MB."""


NUMBERS_OF_ONE, NUMBERS_OF_ALL = 1 << 22, 1 << 23
"""Of one request: 1,024 embeddings of 4,096 numbers. Of a process: some 250 MB."""


class Held:
    """Those of a process. count: at this moment. what: they are; fewer: of what to ask for fewer of them."""

    def __init__(self, what: str, fewer: str, most_of_one: int, most_of_all: int) -> None:
        self.count = 0
        self.what, self.fewer = what, fewer
        self.most_of_one = most_of_one
        self.most_of_all = most_of_all

    def account(self) -> "Account":
        return Account(self)


class HeldLogprobs(Held):
    """Log-probabilities."""

    def __init__(self, most_of_one: int = MOST_OF_ONE, most_of_all: int = MOST_OF_ALL) -> None:
        fewer = "prompts, choices or tokens at once, or for fewer alternatives"
        super().__init__("log-probabilities", fewer, most_of_one, most_of_all)


class HeldNumbers(Held):
    """Numbers of embeddings."""

    def __init__(self, most_of_one: int = NUMBERS_OF_ONE, most_of_all: int = NUMBERS_OF_ALL) -> None:
        super().__init__("numbers", "embeddings at once", most_of_one, most_of_all)


class Account:
    """Those of one request, until it is closed."""

    def __init__(self, held: Held) -> None:
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
                f"{field}: the answer would hold more than {self._held.most_of_one} {self._held.what}: ask for fewer "
                f"{self._held.fewer}",
                field,
            )
        if count and self._held.count + count > self._held.most_of_all:
            message = f"answers under way hold {self._held.count} {self._held.what}, and {self._held.most_of_all} are allowed"
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
