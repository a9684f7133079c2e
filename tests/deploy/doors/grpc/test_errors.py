"""What is refused, and in which words: status codes, trailing metadata, API keys, clients of other machines."""

import asyncio
import socket
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from typing import Any, TypeAlias

import grpc
import pytest

from deploy.config.serve import ServeConfig
from deploy.doors.access import ApiKeys, account
from deploy.doors.grpc.server import STATUS, GrpcDoor, start_server
from deploy.frontend.errors import Fault, RequestError
from deploy.frontend.service.service import Service
from deploy.proto import manta_pb2 as pb
from deploy.text.prompts import Prompt
from tests.deploy.doors.grpc.calls import PROMPT, consumed, ids, text
from tests.deploy.doors.grpc.conftest import Connect

Answer = Callable[[Awaitable[Any]], Any]
Code: TypeAlias = grpc.StatusCode


def refusal(answer: Answer, call: Any) -> grpc.aio.AioRpcError:
    """The status of a call that must fail."""

    with pytest.raises(grpc.aio.AioRpcError) as refused:
        answer(consumed(call) if isinstance(call, grpc.aio.UnaryStreamCall) else call)
    return refused.value


def trailing(error: grpc.aio.AioRpcError) -> dict[str, Any]:
    return dict(error.trailing_metadata())


def test_every_fault_has_its_status() -> None:
    assert STATUS.keys() == {*Fault}


@pytest.mark.parametrize("fault", Fault)
def test_a_fault_of_the_service_is_the_status_of_the_call(
    answer: Answer, stub: Any, service: Service, monkeypatch: pytest.MonkeyPatch, fault: Fault
) -> None:
    async def fail(*_: Any, **__: Any) -> AsyncGenerator[Any, None]:
        raise RequestError(fault, "not now — später", param="n", code="later", retry_after_s=2.5)
        yield

    monkeypatch.setattr(service, "generate", fail)
    error = refusal(answer, stub.Generate(text()))
    assert error.code() is STATUS[fault]
    assert error.details() == "not now — später"
    assert trailing(error) == {"retry-after": "3", "error-code": "later", "error-param": "n"}

    (result,) = answer(stub.GenerateBatch(pb.GenerateBatchRequest(requests=[text(request_id="a")]))).results
    told = pb.Error(
        request_id="a", code=STATUS[fault].value[0], message="not now — später", param="n", reason="later", retry_after_s=2.5
    )
    assert result.error == told


def test_a_fault_of_the_servers_says_nothing_of_its_inside(
    answer: Answer, stub: Any, service: Service, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(service, "generate", lambda *_, **__: 1 / 0)
    error = refusal(answer, stub.Generate(text(request_id="unlucky")))
    assert error.code() is Code.INTERNAL
    assert "division" not in str(error.details())
    assert "unlucky" in caplog.text
    assert "ZeroDivisionError" in caplog.text


@pytest.mark.parametrize(
    ("request_", "code", "param"),
    [
        (pb.GenerateRequest(), Code.INVALID_ARGUMENT, "prompt"),
        (text(""), Code.INVALID_ARGUMENT, "prompt.text"),
        (ids(), Code.INVALID_ARGUMENT, "prompt.token_ids"),
        (ids(1 << 20), Code.INVALID_ARGUMENT, "prompt.token_ids"),
        (ids(*[5] * 3000), Code.INVALID_ARGUMENT, "prompt.token_ids"),
        (pb.GenerateRequest(prompt=pb.Prompt(chat=pb.Chat())), Code.INVALID_ARGUMENT, "prompt.chat"),
        (text(request_id="two words"), Code.INVALID_ARGUMENT, "request_id"),
        (text(n=0), Code.INVALID_ARGUMENT, "n"),
        (text(n=17), Code.INVALID_ARGUMENT, "n"),
        (text(temperature=-1.0), Code.INVALID_ARGUMENT, "temperature"),
        (text(top_p=float("nan")), Code.INVALID_ARGUMENT, "top_p"),
        (text(max_tokens=0), Code.INVALID_ARGUMENT, "max_tokens"),
        (text(logprobs=21), Code.INVALID_ARGUMENT, "logprobs"),
        (text(stop=["x"] * 17), Code.INVALID_ARGUMENT, "stop"),
        (text(stop_token_ids=[1 << 20]), Code.INVALID_ARGUMENT, "stop_token_ids"),
        (text(logit_bias=dict.fromkeys(range(1025), 1.0)), Code.INVALID_ARGUMENT, "logit_bias"),
        (text(logit_bias={1 << 20: 1.0}), Code.INVALID_ARGUMENT, "logit_bias"),
        (text(guided_json="{"), Code.INVALID_ARGUMENT, "guided_json"),
        (text(guided_regex="("), Code.INVALID_ARGUMENT, "guided_regex"),
        (text(guided_choice=pb.Texts()), Code.INVALID_ARGUMENT, "guided_choice"),
        (text(guided_grammar="x" * (129 << 10)), Code.RESOURCE_EXHAUSTED, "guided_grammar"),
        (pb.GenerateRequest(prompt=pb.Prompt(text=PROMPT), model="gpt"), Code.NOT_FOUND, "model"),
    ],
)
def test_a_bad_request_is_refused_by_the_name_of_its_field(
    answer: Answer, stub: Any, request_: pb.GenerateRequest, code: Code, param: str
) -> None:
    error = refusal(answer, stub.Generate(request_))
    assert (error.code(), trailing(error).get("error-param")) == (code, param), error.details()
    assert "retry-after" not in trailing(error)


def test_other_methods_refuse_alike(answer: Answer, stub: Any) -> None:
    assert refusal(answer, stub.Tokenize(pb.TokenizeRequest())).code() is Code.INVALID_ARGUMENT
    assert refusal(answer, stub.Abort(pb.AbortRequest())).code() is Code.INVALID_ARGUMENT
    many = pb.GenerateBatchRequest(requests=[text()] * 65)
    assert "max_prompts" in str(refusal(answer, stub.GenerateBatch(many)).details())


def test_a_service_without_a_scheduler_is_unavailable(answer: Answer, connect: Connect, unconnected: Service) -> None:
    stub, _ = connect(GrpcDoor(unconnected, ServeConfig(), ApiKeys()))
    error = refusal(answer, stub.Generate(text()))
    assert error.code() is Code.UNAVAILABLE
    assert trailing(error)["retry-after"] == "1"


def test_a_request_that_is_too_large(answer: Answer, connect: Connect, service: Service) -> None:
    stub, _ = connect(GrpcDoor(service, ServeConfig(max_request_bytes=1000), ApiKeys()))
    error = refusal(answer, stub.Generate(text("x" * 1001)))
    assert error.code() is Code.RESOURCE_EXHAUSTED
    assert "max_request_bytes" in str(error.details())


def test_a_call_is_on_the_account_of_its_key(
    answer: Answer, connect: Connect, service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []
    generate = service.generate

    def watch(prompts: Sequence[Prompt], **named: Any) -> Any:
        told.extend(prompt.terms.tenant for prompt in prompts)
        return generate(prompts, **named)

    monkeypatch.setattr(service, "generate", watch)
    stub, _ = connect(GrpcDoor(service, ServeConfig(), ApiKeys(["one", "other"])))
    for key in ("one", "other", "one"):
        batch = pb.GenerateBatchRequest(requests=[text(max_tokens=1)])
        answer(stub.GenerateBatch(batch, metadata=[("authorization", f"Bearer {key}")]))
    assert told == [account("one"), account("other"), account("one")]
    assert told[0] != told[1]


def test_a_key_opens(answer: Answer, connect: Connect, service: Service) -> None:
    stub, _ = connect(GrpcDoor(service, ServeConfig(), ApiKeys(["secret"])))
    calls = [
        (stub.Generate, text(max_tokens=1)),
        (stub.GenerateBatch, pb.GenerateBatchRequest()),
        (stub.Tokenize, pb.TokenizeRequest(prompt=pb.Prompt(text="a"))),
        (stub.Abort, pb.AbortRequest(request_id="a")),
        (stub.ListModels, pb.ListModelsRequest()),
    ]
    for method, message in calls:
        assert refusal(answer, method(message)).code() is Code.UNAUTHENTICATED
        assert refusal(answer, method(message, metadata=[("authorization", "Bearer guess")])).code() is Code.UNAUTHENTICATED
    for method, message in calls[1:]:
        answer(method(message, metadata=[("authorization", "Bearer secret")]))


class Peer:
    """The context of a call from somewhere."""

    def __init__(self, peer: str, key: str = "") -> None:
        self._peer, self._key, self.code = peer, key, Code.OK

    def invocation_metadata(self) -> list[tuple[str, str | bytes]]:
        return [("authorization", f"Bearer {self._key}")] if self._key else []

    def peer(self) -> str:
        return self._peer

    def time_remaining(self) -> None: ...

    def set_code(self, code: Code) -> None:
        self.code = code

    def set_details(self, details: str) -> None: ...

    def set_trailing_metadata(self, trailing_metadata: Any) -> None: ...


@pytest.mark.parametrize(
    "peer", ["ipv4:10.0.0.5:4000", "ipv6:[2001:db8::1]:4000", "ipv6:%5Bfe80::1%5D:4000", "ipv4:127", "unknown"]
)
def test_without_keys_only_the_own_machine_is_answered(answer: Answer, service: Service, peer: str) -> None:
    def told(config: ServeConfig, keys: ApiKeys, context: Peer) -> Code:
        answer(GrpcDoor(service, config, keys).ListModels(pb.ListModelsRequest(), context))
        return context.code

    assert told(ServeConfig(), ApiKeys(), Peer(peer)) is Code.UNAUTHENTICATED
    for own in ("ipv4:127.0.0.1:4000", "ipv6:[::1]:4000", "ipv6:%5B::1%5D:4000", "ipv6:[::ffff:127.0.0.1]:4000", "unix:/tmp/s"):
        assert told(ServeConfig(), ApiKeys(), Peer(own)) is Code.OK
    assert told(ServeConfig(auth=False), ApiKeys(), Peer(peer)) is Code.OK
    assert told(ServeConfig(), ApiKeys(["secret"]), Peer(peer, "secret")) is Code.OK


def test_a_port_that_is_taken(runner: asyncio.Runner, service: Service) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        config = ServeConfig(grpc_port=other.getsockname()[1])
        with pytest.raises(OSError, match="choose another grpc_port"):
            runner.run(start_server(GrpcDoor(service, config, ApiKeys()), config))


def test_nobody_goes_before_others_just_by_asking(answer: Answer, connect: Connect, service: Service) -> None:
    stub, _ = connect(GrpcDoor(service, ServeConfig(), ApiKeys(["plain", "urgent"], {"urgent": -5})))

    def code(key: str, priority: int) -> int:
        asked = text(max_tokens=1)
        asked.priority = priority
        batch = pb.GenerateBatchRequest(requests=[asked])
        (result,) = answer(stub.GenerateBatch(batch, metadata=[("authorization", f"Bearer {key}")])).results
        return int(result.error.code)

    bad = Code.INVALID_ARGUMENT.value[0]
    assert [code("plain", priority) for priority in (1, 0, -1)] == [0, 0, bad]
    assert [code("urgent", priority) for priority in (-5, -6)] == [0, bad]
