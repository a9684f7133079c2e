"""Grammars are compiled once at the door, so that no worker meets one that it cannot follow. Imports `formats`; no HTTP."""

import asyncio

from llguidance import LLTokenizer

from deploy.doors.dialects.tools.formats import validate
from deploy.frontend.errors import Fault, RequestError
from deploy.frontend.service.model import ServedModel
from scheduler.protocol.sampling import Grammar
from workers.sampling.grammar import GrammarError, load_tokenizer

REMEMBERED = 256
"""Grammars known to be valid, with whose they are: clients send the same schema again and again, and how long that takes tells
nobody what another one sends."""


class Grammars:
    """The grammars of one model. Belongs to one event loop."""

    def __init__(self, model: ServedModel) -> None:
        self._model = model
        self._tokenizer: asyncio.Task[LLTokenizer] | None = None
        self._valid: dict[tuple[str, Grammar], tuple[str, ...]] = {}  # and what of it is not enforced

    async def check(self, grammar: Grammar, param: str, account: str) -> tuple[str, ...]:
        """Returns what of it is not enforced. param: the field that the grammar is made of. account: of who sends it. Errors:
        RequestError UNPROCESSABLE."""
        if (known := self._valid.get((account, grammar))) is not None:
            return known
        unenforced = await asyncio.to_thread(validate, grammar, await self._loaded(), param)
        self._valid[account, grammar] = unenforced
        if len(self._valid) > REMEMBERED:
            del self._valid[next(iter(self._valid))]
        return unenforced

    async def _loaded(self) -> LLTokenizer:
        """Read with the first grammar, which takes up to a second."""
        if self._tokenizer is None:
            limits = self._model.limits
            loading = asyncio.to_thread(load_tokenizer, self._model.checkpoint, limits.vocab_size, limits.eos_ids)
            self._tokenizer = asyncio.create_task(loading)
        try:
            return await asyncio.shield(self._tokenizer)
        except GrammarError as error:
            raise RequestError(Fault.UNPROCESSABLE, str(error), code="invalid_grammar") from None
