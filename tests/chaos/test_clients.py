"""What the clients of `benchmarks/chaos` count, against a server that answers as it is told to."""

import asyncio
import json
import threading
from collections.abc import Callable
from typing import Any

import pytest

from benchmarks.chaos.asks import Answer, Ask, mixed
from benchmarks.chaos.clients import Clients, Taken, fulfil, http_to, undisturbed
from benchmarks.chaos.ledger import Incident, Ledger
from tests.shared.servers import QuietHandler, answering

ASK = Ask(0, "/v1/completions", {"prompt": "x", "stream": True})
WORDS = ["one ", "two ", "three ", "four"]

Reply = Callable[["Scripted"], None]


class Scripted(QuietHandler):
    """Plays one reply after the other; the last one for ever."""

    replies: list[Reply]
    seen: list[dict[str, str]]

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["content-length"]))
        self.seen.append({name.lower(): value for name, value in self.headers.items()})
        (self.replies.pop(0) if len(self.replies) > 1 else self.replies[0])(self)

    def begin(self) -> None:
        self.send_response(200)
        self.send_header("content-type", "text/event-stream")
        self.end_headers()

    def event(self, content: Any, event_id: int | None = None) -> None:
        if event_id is not None:
            self.wfile.write(f"id: {event_id}\n".encode())
        self.wfile.write(f"data: {content if isinstance(content, str) else json.dumps(content)}\n\n".encode())

    def words(self, first: int = 0, until: int = len(WORDS), ids: bool = False) -> None:
        for at in range(first, until):
            finish = "length" if at == len(WORDS) - 1 else None
            logprobs = {"tokens": [str(at)], "token_logprobs": [-0.1], "top_logprobs": [{str(at): -0.1}]}
            choice = {"index": 0, "text": WORDS[at], "finish_reason": finish, "logprobs": logprobs}
            self.event({"choices": [choice]}, at if ids else None)

    def end(self, tokens: int = len(WORDS)) -> None:
        self.event({"choices": [], "usage": {"completion_tokens": tokens}})
        self.event("[DONE]")


def whole(server: Scripted) -> None:
    server.begin()
    server.words()
    server.end()


def cut_short(server: Scripted) -> None:
    server.begin()
    server.words(until=2)


def cut_with_ids(server: Scripted) -> None:
    server.begin()
    server.words(until=2, ids=True)


def rest(server: Scripted) -> None:
    server.begin()
    server.words(first=int(server.headers["last-event-id"]) + 1, ids=True)
    server.end()


def failed(server: Scripted) -> None:
    server.begin()
    server.words(until=1)
    server.event({"error": {"message": "the scheduler has gone"}})
    server.event("[DONE]")


def done_too_soon(server: Scripted) -> None:
    server.begin()
    server.words(until=3)
    server.event("[DONE]")


def hung_up(server: Scripted) -> None:
    """Says nothing."""


def refused(status: int, retry_after: str | None = None) -> Reply:
    def reply(server: Scripted) -> None:
        server.send_response(status)
        if retry_after is not None:
            server.send_header("retry-after", retry_after)
        server.send_header("content-length", "0")
        server.end_headers()

    return reply


def other_text(server: Scripted) -> None:
    server.begin()
    server.event({"choices": [{"index": 0, "text": "one two, three four", "finish_reason": "length", "logprobs": None}]})
    server.end()


def counted(*replies: Reply) -> tuple[Incident, list[dict[str, str]], Ledger]:
    """What one request came to that got these replies, until it was answered."""

    class Server(Scripted):
        pass

    Server.replies, Server.seen = [whole, *replies], []
    with answering(Server) as port:
        address = f"http://127.0.0.1:{port}"
        ledger = Ledger(undisturbed(address, [ASK], 1))

        async def ask() -> None:
            async with http_to(address) as http:
                await fulfil(http, Taken(ASK), ledger, 0)

        asyncio.run(ask())
    return ledger.incidents[-1], Server.seen[1:], ledger


@pytest.mark.parametrize(
    ("reply", "lost", "refusals"),
    [
        (whole, {}, {}),
        (cut_short, {"cut": 1}, {}),
        (hung_up, {"cut before an answer": 1}, {}),
        (failed, {"error event": 1}, {}),
        (done_too_soon, {"ended early": 1}, {}),
        (refused(503, "0"), {}, {"503, Retry-After": 1}),
        (refused(404), {}, {"404": 1}),
    ],
    ids=["whole", "cut", "hung up", "error event", "done too soon", "503", "404"],
)
def test_how_a_stream_ends_is_counted_as_its_client_saw_it(
    reply: Reply, lost: dict[str, int], refusals: dict[str, int]
) -> None:
    incident, _, _ = counted(reply, whole)
    assert (dict(incident.lost), dict(incident.refused)) == (lost, refusals)
    assert incident.said == (["the scheduler has gone"] if "error event" in lost else [])
    assert (incident.answered, incident.wrong) == (1, 0), "what was left of the first attempt is not used"


def test_a_stream_whose_events_have_ids_is_taken_up_where_it_was_cut() -> None:
    incident, seen, _ = counted(cut_with_ids, rest)
    assert (incident.taken_up, dict(incident.lost), incident.wrong) == (1, {}, 0)
    assert [headers.get("last-event-id") for headers in seen] == [None, "1"]
    assert len({headers["x-request-id"] for headers in seen}) == 1


def test_an_answer_that_is_another_is_wrong_and_it_is_said_where() -> None:
    incident, _, ledger = counted(other_text)
    assert incident.wrong == 1
    assert "from character 7 of 19" in ledger.samples[0]


def test_log_probabilities_may_differ_by_rounding_alone() -> None:
    def answer(logprob: float) -> Answer:
        made = Answer()
        logprobs = {"tokens": ["a"], "token_logprobs": [logprob], "top_logprobs": [{"a": logprob}]}
        made.take({"choices": [{"index": 0, "text": "a", "finish_reason": "stop", "logprobs": logprobs}]})
        return made

    assert answer(-0.1 + 1e-9).departs_from(answer(-0.1)) is None
    assert answer(-0.1001).departs_from(answer(-0.1)) is not None


def test_every_client_has_a_stream_under_way_until_they_are_ended() -> None:
    held, arrived = threading.Event(), threading.Semaphore(0)

    def held_up(server: Scripted) -> None:
        server.begin()
        server.words(until=1)
        server.wfile.flush()
        arrived.release()
        held.wait(60.0)

    class Server(Scripted):
        pass

    Server.replies, Server.seen = [held_up], []
    ledger = Ledger({})
    with answering(Server) as port:
        with Clients(f"http://127.0.0.1:{port}", [ASK], ledger, 5, seed=0):
            for _ in range(5):
                assert arrived.acquire(timeout=60.0)
            incident = ledger.begin(None)
        held.set()
    assert incident.under_way == 5
    assert len(Server.seen) == 5


def test_requests_are_of_all_sorts_and_the_same_for_a_seed() -> None:
    asks = mixed(24, 1)
    assert asks == mixed(24, 1) != mixed(24, 2)
    assert {ask.path for ask in asks} == {"/v1/completions", "/v1/chat/completions"}
    for name in ("seed", "logprobs", "stop", "n", "presence_penalty"):
        assert 0 < sum(name in ask.body for ask in asks) < len(asks)
