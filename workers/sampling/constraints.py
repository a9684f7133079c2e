"""The grammars of a rank's resident rows: what each may say next, worked out by other threads while the device computes.

    admit ──▶ compile, replay ──▶ mask ──▶ allowed: waits ──▶ (sampled) ──▶ advance ──▶ mask ──▶ ...

Every rank has matchers of its own and feeds them the same tokens, so all ranks have the same masks. Imports llguidance,
`grammar`, the wire types and NumPy; no torch.
"""

import logging
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
from llguidance import LLExecutor, LLMatcher, LLTokenizer
from llguidance.numpy import consume_token_par, fill_next_token_bitmask_par

from scheduler.protocol.messages import NO_TOKEN
from scheduler.protocol.sampling import Grammar
from workers.sampling.grammar import GrammarError, compile_grammar

logger = logging.getLogger(__name__)

Ints = npt.NDArray[np.integer]
Bits = npt.NDArray[np.int32]

OPENERS = 2
"""Threads that compile, so that a grammar which takes long does not keep the next one waiting."""

GRACE_S = 0.005
"""What a grammar that was compiled before takes to be ready, mostly: not worth a turn without its row."""

MOST_COMPILED = 64
"""Grammars kept compiled; a new sequence copies one in microseconds."""


@dataclass(slots=True, eq=False)
class Constraint:
    """One lease's place in its grammar. A thread in the background owns it until `job` is done.

    bits: [words] what the next token may be; everything once it has failed, when the token no longer matters. fresh: nobody has
    waited for it to be compiled.
    """

    row: int
    bits: Bits
    matcher: LLMatcher | None = None
    failed: bool = False
    fresh: bool = True
    job: Future[None] = field(default_factory=Future)


@dataclass(frozen=True, slots=True)
class Allowed:
    """What the constrained samples of one step may be.

    samples: [n] their indices among the step's samples. bits: [n, words] bit id % 32 of word id // 32.
    """

    constraints: Sequence[Constraint]
    samples: npt.NDArray[np.int64]
    bits: Bits

    @property
    def failed(self) -> npt.NDArray[np.int64]:
        """Those of `samples` for which the grammar could not say what may follow."""
        return self.samples[[constraint.failed for constraint in self.constraints]]


class Constraints:
    """load: reads the tokenizer; called at once, in the background. vocab_size: ids in a mask. threads: for a step's masks.

    Order of calls: admit, then (allowed, advance) for each sampled token, then release.
    """

    def __init__(self, load: Callable[[], LLTokenizer], vocab_size: int, threads: int) -> None:
        self._everything: Bits = np.full(-(-vocab_size // 32), -1, np.int32)
        # Threads of their own, so that a grammar that takes long to compile does not hold up the masks of the others.
        self._opening = ThreadPoolExecutor(OPENERS, thread_name_prefix="manta-grammar-opening")
        self._following = ThreadPoolExecutor(1, thread_name_prefix="manta-grammar-following")
        self._executor = LLExecutor(threads)
        self._tokenizer = self._opening.submit(load)
        self._compiled: OrderedDict[Grammar, LLMatcher] = OrderedDict()  # of the opening threads, under the lock
        self._lock = threading.Lock()
        self._rows: dict[int, Constraint] = {}
        self._unopened: dict[int, Constraint] = {}  # looked at by `opening` last
        self.on_opened: Callable[[], None] = lambda: None
        """Called from a thread in the background when a row's grammar is ready, or could not be."""

    def admit(self, row: int, grammar: Grammar | None, output: Ints) -> None:
        """Takes over `row`. output: tokens emitted before a restart."""
        if grammar is None:
            return
        constraint = self._rows[row] = Constraint(row, self._everything)
        constraint.job = self._opening.submit(self._open, constraint, grammar, output.tolist())
        constraint.job.add_done_callback(lambda _: self.on_opened())
        self._unopened[row] = constraint

    def opening(self) -> tuple[int, ...]:
        """Rows whose grammar is being compiled: whoever wants their next token waits for that. One that was just admitted is
        given a moment."""
        if not self._unopened:
            return ()
        wait([constraint.job for constraint in self._unopened.values() if constraint.fresh], GRACE_S)
        self._unopened = {
            row: constraint for row, constraint in self._unopened.items()
            if self._rows.get(row) is constraint and not constraint.job.done()
        }  # fmt: skip
        for constraint in self._unopened.values():
            constraint.fresh = False
        return tuple(self._unopened)

    def release(self, row: int) -> None:
        self._rows.pop(row, None)

    def any(self, rows: Ints) -> bool:
        """Whether one of `rows` has a grammar."""
        return bool(self._rows) and not self._rows.keys().isdisjoint(rows.tolist())

    def allowed(self, rows: Ints) -> Allowed | None:
        """What the next tokens of `rows` [samples] may be; None if none has a grammar. Waits for the background."""
        if not self._rows:
            return None
        found = [(sample, self._rows[row]) for sample, row in enumerate(rows.tolist()) if row in self._rows]
        if not found:
            return None
        for _, constraint in found:
            constraint.job.result()
        samples = np.array([sample for sample, _ in found], np.int64)
        constraints = [constraint for _, constraint in found]
        return Allowed(constraints, samples, np.stack([constraint.bits for constraint in constraints]))

    def advance(self, allowed: Allowed, tokens: npt.NDArray[np.int64]) -> None:
        """Takes the step's sampled tokens [samples] and begins on what may follow. Leases that have ended are passed over, and
        those that end now, for which nothing could be drawn: NO_TOKEN would fail all whose masks are made with theirs."""
        alive = [
            (constraint, token)
            for constraint, token in zip(allowed.constraints, tokens[allowed.samples].tolist(), strict=True)
            if self._rows.get(constraint.row) is constraint and not constraint.failed and token != NO_TOKEN
        ]
        if alive:
            job = self._following.submit(self._follow, alive)
            for constraint, _ in alive:
                constraint.job = job

    def close(self) -> None:
        """Nobody waits for a mask any more."""
        for pool in (self._opening, self._following):
            pool.shutdown(wait=False, cancel_futures=True)

    # ---- in the background

    def _open(self, constraint: Constraint, grammar: Grammar, output: list[int]) -> None:
        try:
            matcher = constraint.matcher = self._compile(grammar)
        except GrammarError as error:
            self._fail(constraint, str(error))
            return
        matcher.consume_tokens(output)
        self._fill([(constraint, matcher)])

    def _compile(self, grammar: Grammar) -> LLMatcher:
        """A matcher at the beginning, independent of all others. Errors: GrammarError."""
        with self._lock:
            compiled = self._compiled.pop(grammar, None)
        if compiled is None:
            compiled = compile_grammar(grammar, self._tokenizer.result())
        copy = compiled.deep_copy()
        with self._lock:
            self._compiled[grammar] = compiled
            if len(self._compiled) > MOST_COMPILED:
                self._compiled.popitem(last=False)
        return copy

    def _follow(self, sampled: list[tuple[Constraint, int]]) -> None:
        followed = [(constraint, constraint.matcher) for constraint, _ in sampled if constraint.matcher is not None]
        tokens = [token for _, token in sampled]
        consume_token_par(self._executor, [(matcher, token) for (_, matcher), token in zip(followed, tokens, strict=True)])
        self._fill(followed)

    def _fill(self, followed: list[tuple[Constraint, LLMatcher]]) -> None:
        """Masks for the next token. llguidance leaves Python's lock for all of them at once."""
        bits = np.zeros((len(followed), len(self._everything)), np.int32)
        fill_next_token_bitmask_par(self._executor, [(matcher, at) for at, (_, matcher) in enumerate(followed)], bits)
        for (constraint, matcher), row in zip(followed, bits, strict=True):
            constraint.bits = row
            if matcher.is_error():
                self._fail(constraint, matcher.get_error())
            elif not row.any():
                self._fail(constraint, "no token of the vocabulary continues the output")

    def _fail(self, constraint: Constraint, why: str) -> None:
        logger.warning("a sequence cannot follow its grammar: %s", why.strip().partition("\n")[0])
        constraint.failed = True
        constraint.bits = self._everything
