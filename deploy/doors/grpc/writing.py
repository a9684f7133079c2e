"""From output deltas to messages: what is new of a stream, or a whole output put together. Imports the outputs; no gRPC."""

from collections.abc import Iterable, Mapping

from deploy.frontend.outputs import ChoiceDelta, Logprob, OutputDelta
from deploy.frontend.service.model import ServedModel
from deploy.proto import manta_pb2 as pb

FINISH_REASONS = {
    None: pb.FINISH_REASON_UNSPECIFIED,
    "stop": pb.FINISH_REASON_STOP,
    "length": pb.FINISH_REASON_LENGTH,
    "abort": pb.FINISH_REASON_ABORT,
}


class Writer:
    """The output of one request."""

    def __init__(self, request_id: str, prompt_tokens: int) -> None:
        self._request_id = request_id
        self._usage = pb.Usage(prompt_tokens=prompt_tokens)

    def response(self, delta: OutputDelta) -> pb.GenerateResponse:
        """What is new; with the last delta the usage of all."""
        self._usage.completion_tokens += sum(len(choice.token_ids) for choice in delta.choices)
        if delta.finished:
            self._usage.cached_tokens = delta.cached_tokens or 0
        return pb.GenerateResponse(
            request_id=self._request_id,
            choices=map(_choice, delta.choices),
            prompt_logprobs=map(_token_logprobs, delta.prompt_logprobs or ()),
            usage=self._usage if delta.finished else None,
        )


def card(model: ServedModel) -> pb.Model:
    return pb.Model(name=model.name, created=model.created, max_model_len=model.limits.max_tokens)


def merged(parts: Iterable[pb.GenerateResponse]) -> pb.GenerateResponse:
    """One response that says what all parts of a stream say, choices in the order of their index. Uses the parts up."""
    whole = pb.GenerateResponse()
    choices: dict[int, pb.Choice] = {}
    texts: dict[int, list[str]] = {}
    for part in parts:
        for choice in part.choices:
            texts.setdefault(choice.index, []).append(choice.text)
            choices.setdefault(choice.index, pb.Choice()).MergeFrom(choice)
        part.ClearField("choices")
        whole.MergeFrom(part)
    for index, choice in sorted(choices.items()):
        choice.text = "".join(texts[index])
        whole.choices.append(choice)
    return whole


def _choice(delta: ChoiceDelta) -> pb.Choice:
    choice = pb.Choice(
        index=delta.index,
        text=delta.text,
        token_ids=delta.token_ids,
        logprobs=map(_token_logprobs, delta.logprobs or ()),
        finish_reason=FINISH_REASONS[delta.finish_reason],
    )
    match delta.stop_reason:
        case str(text):
            choice.stop = text
        case int(token):
            choice.stop_token_id = token
    return choice


def _token_logprobs(entry: Mapping[int, Logprob] | None) -> pb.TokenLogprobs:
    tokens = [
        pb.Logprob(token_id=token, logprob=one.logprob, rank=one.rank or 0, text=one.decoded_token or "")
        for token, one in (entry or {}).items()
    ]
    return pb.TokenLogprobs(tokens=tokens)
