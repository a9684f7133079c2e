"""What a door must know of a checkpoint, read off it once. Imports no ray; torch only to read the settings."""

from dataclasses import dataclass, replace
from pathlib import Path

from cluster.config import EngineConfig
from deploy.config.serve import ServeConfig, model_name
from deploy.text.adapters import Adapters
from deploy.text.prompts import ModelLimits, read_model_limits, read_model_uses
from deploy.text.tokenizer import Tokenizer
from scheduler.protocol.messages import Adapter
from workers.config import USUAL, ReadingConfig
from workers.model.pooling import Uses
from workers.model.sources.find import find_checkpoint

GENERATES = Uses(hidden=1, generates=True, embedding=None, no_embedding="nobody has said how", no_scores="nobody has said how")
"""Of a model of which no more is known."""


@dataclass(frozen=True, slots=True)
class ServedModel:
    """What a door must know of the checkpoint. created: seconds since 1970. uses: what its hidden states are good for. adapter:
    of a model that is a LoRA adapter beside the one that is called `parent`."""

    name: str
    checkpoint: Path
    created: int
    limits: ModelLimits
    tokenizer: Tokenizer | None
    uses: Uses = GENERATES
    adapter: Adapter | None = None
    parent: str | None = None

    def adapted(self, adapter: Adapter, created: int) -> "ServedModel":
        """The adapter as a model of its own name."""
        return replace(self, name=adapter.name, created=created, adapter=adapter, parent=self.name)

    @classmethod
    def read(
        cls,
        name: str,
        checkpoint: Path,
        max_model_len: int | None,
        tensor_parallel_size: int = 1,
        chat_template: str | None = None,
        pooling: str = "auto",
        score_tokens: str | None = None,
        how: ReadingConfig = USUAL,
    ) -> "ServedModel":
        """chat_template: a file. pooling, score_tokens: as the engine's settings. Errors: ValueError, OSError."""
        limits = read_model_limits(checkpoint, max_model_len, tensor_parallel_size, how)
        created = int((checkpoint / "config.json").stat().st_mtime)
        tokenizer = Tokenizer.load(checkpoint, None if chat_template is None else Path(chat_template))
        uses = read_model_uses(checkpoint, pooling, score_tokens, how)
        return cls(name, checkpoint, created, limits.ending_as(tokenizer), tokenizer, uses)

    @classmethod
    def of(cls, engine: EngineConfig, serve: ServeConfig) -> "ServedModel":
        """As an endpoint is told to serve it. Errors: ValueError, OSError."""
        name = model_name(serve.served_model_name, engine.model)
        return cls.read(
            name, find_checkpoint(engine), engine.max_model_len, engine.tensor_parallel_size, serve.chat_template,
            engine.pooling, engine.score_tokens, engine,
        )  # fmt: skip

    @classmethod
    def checked(cls, engine: EngineConfig, serve: ServeConfig) -> "ServedModel":
        """The same where nobody here will read the adapters beside it. Errors: also for one that cannot be served."""
        model = cls.of(engine, serve)
        Adapters(engine, model.name)
        return model
