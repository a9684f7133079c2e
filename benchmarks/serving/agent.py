"""Coding agents at `manta serve`: each turn sends the whole conversation again, with one call of a tool and its result more.

So a prompt grows to `--context` tokens, of which a turn need compute no more than its own. Every turn must find in the cache
all of the prompt before it: its whole blocks, and what it has of the next, unless that is shorter than the stride from which
parts are reused. The command prints how much of the answer was found, too, and what a turn takes as the context grows, and
exits with 1 if a turn found less than it must. Agents at work at once have their system prompt and tools in common, and nothing
else. The model is made to call by a grammar, so one with random weights will do; where it writes a call in other tokens than
those in which it is read again, the hit ends there. Never imports an engine.

    python -m benchmarks.serving.agent                                      # 40 turns to 8,000 tokens, on two cores
    python -m benchmarks.serving.agent --context 100000 --turns 40 --door chat
    python -m benchmarks.serving.agent --model 0.6B --context 100000 --kv-gib 40 --agents 4
"""

import argparse
import contextlib
import json
import random
import shutil
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx

from benchmarks.serving.agent_doors import DOORS, TIMEOUT_S, AgentError, Tool, Turn
from benchmarks.shared.checkpoints import SHAPES, ensure_checkpoint
from benchmarks.shared.endpoint import serving
from benchmarks.shared.options import positive
from benchmarks.shared.report import table

TINY = Path(__file__).resolve().parents[2] / "examples" / "tiny"
ROOM_TOKENS = 4096
"""Beyond the context that is asked for: the last turn's answer, and what the estimate of a text's tokens is wrong by."""

BLOCK_TOKENS, STRIDE_TOKENS = 256, 32
"""Manta's defaults."""

SYSTEM_SHARE = 0.1
"""Of the context, what all agents begin with."""

WORDS = ("return", "value", "list", "item", "index", "name", "line", "file", "path", "test", "call", "self", "data", "error")
NAME = {"type": "string", "pattern": "^[a-z]{3,8}$"}
TOOLS = tuple(
    Tool(name, f"{name.replace('_', ' ')}, and return what there is.", {
        "type": "object", "properties": {argument: NAME}, "required": [argument], "additionalProperties": False,
    })
    for name, argument in (("read_file", "path"), ("list_files", "folder"), ("search_text", "words"), ("run_tests", "name"))
)  # fmt: skip
TEMPLATE = """\
{%- for message in messages %}{{ '<|im_start|>' + message.role + '\\n' + message.content }}
{%- if loop.first and tools %}
# Tools
{%- for tool in tools %}
{{ tool | tojson }}
{%- endfor %}
For each call, write <tool_call>
{"name": <function-name>, "arguments": <args-json-object>}
</tool_call>
{%- endif %}
{%- for call in message.tool_calls or [] %}{{ '<tool_call>\\n{"name": "' + call.function.name + '", "arguments": ' }}
{{- call.function.arguments | tojson }}{{ '}\\n</tool_call>' }}
{%- endfor %}{{ '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""


@dataclass(frozen=True, slots=True)
class Work:
    """What each agent does. context_tokens: of the last prompt, about. per_character: tokens of such text."""

    door: str
    turns: int
    context_tokens: int
    per_character: float

    @property
    def system(self) -> str:
        return self._text(random.Random(0), SYSTEM_SHARE * self.context_tokens)

    def run(self, client: httpx.Client, number: int) -> list[Turn]:
        """Agent number `number`. Errors: AgentError."""
        draw = random.Random(number + 1)
        conversation = DOORS[self.door](client, self.system, TOOLS, f"Task {number}: {self._text(draw, 20)}")
        each = (1 - SYSTEM_SHARE) * self.context_tokens / self.turns
        turns = []
        for _ in range(self.turns):
            turns.append(conversation.turn())
            conversation.go_on(turns[-1], self._text(draw, each))
        return turns

    def _text(self, draw: random.Random, tokens: float) -> str:
        """Lines of words."""
        said, characters = [], 0.0
        while characters < tokens / self.per_character:
            said.append(" ".join(draw.choices(WORDS, k=8)))
            characters += len(said[-1]) + 1
        return "\n".join(said)


@dataclass(frozen=True, slots=True)
class Blocks:
    """Manta's `block_size` and `hash_stride`."""

    size_tokens: int = BLOCK_TOKENS
    stride_tokens: int = STRIDE_TOKENS

    def kept(self, tokens: int) -> int:
        """What is found at least of a prompt of so many tokens, when a longer one begins with it."""
        part = tokens % self.size_tokens
        return tokens if part >= self.stride_tokens else tokens - part


@dataclass(frozen=True, slots=True)
class Report:
    """turns: of each agent."""

    turns: list[list[Turn]]
    blocks: Blocks

    @property
    def faults(self) -> list[str]:
        """Turns that found less than they must."""
        return [
            f"agent {number}, turn {at}: {turn.read_tokens} tokens were read, and {least} must have been there"
            for number, turns in enumerate(self.turns)
            for at, (before, turn) in enumerate(pairwise(turns), start=1)
            if turn.read_tokens < (least := self.blocks.kept(before.prompt_tokens))
        ]

    def lines(self) -> list[list[str]]:
        """A row for each turn; of several agents the mean."""
        return [[str(at), *(f"{value:,.3g}" if value < 100 else f"{value:,.0f}" for value in self._row(at))]
                for at in range(len(self.turns[0]))]  # fmt: skip

    def _row(self, at: int) -> tuple[float, ...]:
        each, before = [turns[at] for turns in self.turns], [turns[at - 1] for turns in self.turns if at]
        answers = [(turn.read_tokens - last.prompt_tokens) / last.output_tokens for turn, last in zip(each, before)]  # noqa: B905
        columns = (
            [turn.prompt_tokens for turn in each], [turn.read_tokens for turn in each],
            [turn.prompt_tokens - turn.read_tokens for turn in each], [100 * share for share in answers] or [0.0],
            [1000 * turn.first_s for turn in each], [1000 * turn.seconds for turn in each],
        )  # fmt: skip
        return tuple(sum(column) / len(column) for column in columns)


HEADERS = ["turn", "prompt", "read", "computed", "% of answer read", "first ms", "ms"]


def measure(address: str, door: str, turns: int, context_tokens: int, blocks: Blocks, agents: int = 1) -> Report:
    """Agents at an endpoint that is up. blocks: of its server. Errors: AgentError."""
    with httpx.Client(base_url=address) as client, ThreadPoolExecutor(agents) as threads:
        sample = Work(door, turns, 10_000, 1.0).system
        answer = client.post("/tokenize", json={"prompt": sample}, timeout=TIMEOUT_S)
        if answer.status_code != 200:
            raise AgentError(f"{answer.status_code}: {answer.text[:500]}")
        work = Work(door, turns, context_tokens, answer.json()["count"] / len(sample))
        return Report(list(threads.map(partial(work.run, client), range(agents))), blocks)


def agent_checkpoint(name: str, cache: Path, context_tokens: int) -> Path:
    """name: `tiny`, or a shape's, whose weights are random. With the tokenizer of `examples/tiny`, a template that shows tools,
    and room for this context."""
    base = TINY if name == "tiny" else ensure_checkpoint(name, cache)
    config = json.loads((base / "config.json").read_text()) | {"max_position_embeddings": context_tokens + ROOM_TOKENS}
    folder = Path(tempfile.mkdtemp(prefix=f"agent-{name}.", dir=cache))
    for file in base.glob("*.safetensors*"):
        (folder / file.name).symlink_to(file)
    for file in TINY.glob("tokenizer*"):
        (folder / file.name).symlink_to(file)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    options.cache.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        model = options.model
        if model == "tiny" or model in SHAPES:
            model = agent_checkpoint(model, options.cache, options.context)
            stack.callback(shutil.rmtree, model)
        blocks = Blocks(options.block_size, options.hash_stride)
        given = [
            *([] if options.ray else ["--local"]), f"--kv-memory={options.kv_gib}GiB", f"--block-size={blocks.size_tokens}",
            f"--hash-stride={blocks.stride_tokens}", *options.serve,
        ]  # fmt: skip
        endpoint = stack.enter_context(serving(Path(model), given, options.cache / "agent.log"))
        report = measure(endpoint.address, options.door, options.turns, options.context, blocks, options.agents)
    print(f"{options.agents} agents, through {options.door}:\n\n{table(HEADERS, report.lines())}")
    if options.json:
        print(json.dumps(_json(report)))
    print("\n".join(report.faults) or "each turn found what it must", file=sys.stderr)
    return 1 if report.faults else 0


def _json(report: Report) -> dict[str, Any]:
    return {"turns": [[asdict(turn) for turn in turns] for turns in report.turns], "faults": report.faults}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = ", ".join(("tiny", *(name for name in SHAPES if name != "tiny")))
    parser.add_argument("--model", default="tiny", help=f"{names}, or a folder whose model calls tools (%(default)s)")
    parser.add_argument("--door", default="messages", choices=[*DOORS], help="which API is spoken (%(default)s)")
    parser.add_argument("--turns", type=positive, default=40, help="of each agent (%(default)s)")
    parser.add_argument("--context", type=positive, default=8000, help="tokens of the last prompt, about (%(default)s)")
    parser.add_argument("--agents", type=positive, default=1, help="at work at once (%(default)s)")
    parser.add_argument("--kv-gib", type=positive, default=2, help="memory of the KV cache, GiB (%(default)s)")
    parser.add_argument("--block-size", type=positive, default=BLOCK_TOKENS, help="tokens of a block (%(default)s)")
    parser.add_argument(
        "--hash-stride", type=positive, default=STRIDE_TOKENS, help="tokens from which a part is reused (%(default)s)"
    )
    parser.add_argument("--ray", action="store_true", help="serve on Ray, instead of in one process")
    cache = Path(tempfile.gettempdir()) / "manta-benchmarks"
    parser.add_argument("--cache", type=Path, default=cache, help="folder of checkpoints and logs (%(default)s)")
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    parser.add_argument("serve", nargs="*", help="further options of `manta serve`, behind --")
    return parser


if __name__ == "__main__":
    sys.exit(main())
