"""Batch inference as a step of a Ray Data pipeline: rows with a `prompt` or `messages` come in, and leave with a `completion`.

One actor of the pipeline opens an LLM, whose groups ask Ray for places of their own all over the cluster; one scheduler knows
what each of them has cached. Joins the cluster that RAY_ADDRESS names, else starts one on this machine.
`pip install 'manta-serve[data]'`.

    python examples/ray_data.py examples/prompts.jsonl /tmp/completions --groups 2
    python examples/ray_data.py s3://bucket/prompts/ s3://bucket/completions/ --model /models/Qwen3-8B --groups 8
"""

import asyncio
from typing import Any

import pyarrow as pa
import ray
import typer

from manta import LLM, GenerationError, PromptError

ASKED = ("prompt", "messages", "max_tokens", "temperature", "top_p", "stop", "seed")
"""Columns that are a request's own. All others go through as they are."""
BATCH_ROWS = 64
"""Ray Data has four batches under way in an actor: as many sequences together as one group runs at once."""


class Complete:
    """options: as those of `LLM`."""

    def __init__(self, **options: Any) -> None:
        self.llm = LLM(**options)

    async def __call__(self, batch: pa.Table) -> pa.Table:
        answers = await asyncio.gather(*(self.answer(row) for row in batch.to_pylist()))
        for name, column in zip(("completion", "finish_reason", "error"), zip(*answers, strict=True), strict=True):
            batch = batch.append_column(name, pa.array(column, pa.string()))
        return batch

    async def answer(self, row: dict[str, Any]) -> tuple[str | None, str | None, str | None]:
        """The text and what ended it; or what was wrong with this row, which the others do not suffer from."""
        asked = {name: row[name] for name in ASKED if row.get(name) is not None}
        try:
            async for output in self.llm.stream(asked):
                last = output.outputs[0]
        except (PromptError, GenerationError) as error:
            return None, None, str(error)
        return last.text, last.finish_reason, None


def completed(prompts: ray.data.Dataset, **options: Any) -> ray.data.Dataset:
    """The rows with their completions, computed once they are taken or written."""
    return prompts.map_batches(
        Complete,
        fn_constructor_kwargs=options,
        compute=ray.data.ActorPoolStrategy(size=1),
        batch_size=BATCH_ROWS,
        batch_format="pyarrow",
    )


def main(source: str, target: str, model: str | None = None, groups: int = 1, tensor_parallel_size: int = 1) -> None:
    """source: JSON lines, a file or a folder of them. target: a folder for the same with completions."""
    prompts = ray.data.read_json(source)
    completed(prompts, model=model, groups=groups, tensor_parallel_size=tensor_parallel_size).write_json(target)


if __name__ == "__main__":
    typer.run(main)
