"""Ids of a stream's events: each says how far the stream has come, so that any replica can go on behind it.

Nothing has to be kept anywhere: for whoever comes back with the same request and the id of the last event that it has, the
same is computed again, with the same seeds and hence the same tokens, unless the scheduler still knows them (`Recall`). Told
is what comes after. So a stream outlives its replica, the proxy before it, the scheduler and the cluster. What a client makes
up does no harm: an id decides what is left out of its own stream.

Imports msgspec, the words for outputs and the door's errors; no HTTP.
"""

import base64
import binascii
import zlib
from array import array
from collections.abc import Sequence
from dataclasses import replace

import msgspec
import xxhash

from deploy.frontend.errors import Fault, RequestError
from deploy.frontend.generation.choice import Told
from deploy.frontend.outputs import ChoiceDelta
from deploy.text.prompts import Prompt
from scheduler.protocol.sampling import InvalidField

LAST_EVENT_ID = "Last-Event-ID"
MOST_CHOICES = 64
"""Of a stream whose events have ids: each takes a few bytes of every id."""


class ChoiceMark(msgspec.Struct, array_like=True, forbid_unknown_fields=True):
    """How far one choice has been told. check: CRC-32 of its tokens. begun: something was told that comes before them. turns:
    so many of thoughts and answers, which take turns, have been told whole, perhaps beyond the tokens."""

    tokens: int = 0
    check: int = 0
    begun: bool = False
    ended: bool = False
    turns: int = 0

    def advance(self, new: ChoiceDelta) -> None:
        self.tokens += len(new.token_ids)
        self.check = zlib.crc32(array("i", new.token_ids).tobytes(), self.check)
        self.begun, self.ended = True, self.ended or new.finish_reason is not None

    @property
    def told(self) -> Told:
        return Told(self.tokens, self.check, self.ended)


class Mark(msgspec.Struct, array_like=True, forbid_unknown_fields=True):
    """How far a stream has been told. request: `digest` of it. seeds: of each prompt, once they are known. choices: of all
    prompts, in the order of their numbers. whole: nothing is left but the end."""

    request: int
    created: int
    seeds: list[int | None] = []
    choices: list[ChoiceMark] = []
    whole: bool = False

    def id(self) -> bytes:
        """What a client sends as `Last-Event-ID`: letters, digits, - and _."""
        return base64.urlsafe_b64encode(_encoder.encode(self)).rstrip(b"=")

    def begin(self, prompts: Sequence[Prompt]) -> None:
        """Nothing has been told yet."""
        self.seeds = [prompt.params.seed for prompt in prompts]
        self.choices = [ChoiceMark() for prompt in prompts for _ in range(prompt.params.n)]

    def seeded(self, prompts: Sequence[Prompt]) -> list[Prompt]:
        """The same prompts, to be sampled as they were. Errors: RequestError."""
        if len(self.seeds) != len(prompts) or len(self.choices) != sum(prompt.params.n for prompt in prompts):
            raise _unreadable()
        try:
            params = [
                prompt.params if seed is None else msgspec.structs.replace(prompt.params, seed=seed)
                for prompt, seed in zip(prompts, self.seeds, strict=True)
            ]
        except InvalidField:
            raise _unreadable() from None
        return [replace(prompt, params=each) for prompt, each in zip(prompts, params, strict=True)]

    def told(self, prompts: Sequence[Prompt]) -> list[list[Told]]:
        """Of each prompt's choices."""
        marks = iter(self.choices)
        return [[next(marks).told for _ in range(prompt.params.n)] for prompt in prompts]


def read_mark(text: str, request: int) -> Mark:
    """The id of an event of a stream that was asked for by this request. Errors: RequestError with its own code."""
    try:
        mark = _decoder.decode(base64.b64decode(text + "=" * (-len(text) % 4), b"-_", validate=True))
    except (msgspec.MsgspecError, binascii.Error, ValueError):
        raise _unreadable() from None
    sane = all(0 <= c.tokens < 2**31 and 0 <= c.check < 2**32 and 0 <= c.turns < 2**31 for c in mark.choices)
    if not sane or len(mark.choices) > MOST_CHOICES:
        raise _unreadable()
    if mark.request != request:
        said = "is of another request: send the same body, the same X-Request-Id and the same key as the first time"
        raise RequestError(Fault.INVALID, f"{LAST_EVENT_ID} {said}", param=LAST_EVENT_ID, code="event_id_mismatch")
    return mark


def check_known(mark: ChoiceMark, known: ChoiceDelta) -> None:
    """What was computed again is what the client has. Errors: RequestError."""
    again = ChoiceMark()
    again.advance(known)
    if again.told != mark.told:
        said = f"choice {known.index} cannot be computed again as it was told: send the request without {LAST_EVENT_ID}"
        raise RequestError(Fault.INTERNAL, said, code="stream_not_resumable")


def digest(*parts: bytes) -> int:
    """Of what makes a request the same."""
    whole = xxhash.xxh3_64()
    for part in parts:
        whole.update(len(part).to_bytes(8, "little"))
        whole.update(part)
    return whole.intdigest()


def _unreadable() -> RequestError:
    said = f"{LAST_EVENT_ID} is no id of an event of this server: send that of the last event, or leave it out"
    return RequestError(Fault.INVALID, said, param=LAST_EVENT_ID, code="event_id_invalid")


_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(Mark)
