"""How far a job is, in words. Reads no clock. Imports rich's words for sizes."""

from datetime import timedelta

from rich.filesize import decimal


class JobTally:
    """What this run has done: each line was answered, has failed, or was skipped. total_bytes: of the input; it measures
    progress, since nobody has counted the lines."""

    def __init__(self, total_bytes: int) -> None:
        self.answered = self.failed = self.skipped = self.output_tokens = 0
        self._total_bytes = total_bytes
        self._done_bytes = self._skipped_bytes = 0
        self._started_s: float | None = None
        self._told = (0.0, 0)

    def start(self, now_s: float) -> None:
        """The work begins; what was before, such as loading a model, says nothing about its pace."""
        self._started_s = now_s
        self._told = (now_s, 0)

    def skip(self, size_bytes: int) -> None:
        """A former run had done it."""
        self.skipped += 1
        self._skipped_bytes += size_bytes

    def count(self, size_bytes: int, *, failed: bool, output_tokens: int = 0) -> None:
        self.answered += not failed
        self.failed += failed
        self.output_tokens += output_tokens
        self._done_bytes += size_bytes

    def words(self, now_s: float) -> str:
        """How far it is, with the tokens per second since the last call."""
        told_s, told_tokens = self._told
        self._told = (now_s, self.output_tokens)
        rate = (self.output_tokens - told_tokens) / max(now_s - told_s, 1e-9)
        share = (self._done_bytes + self._skipped_bytes) / self._total_bytes if self._total_bytes else 1.0
        told = [self._counts(), f"{share:.1%} of {decimal(self._total_bytes)}", f"{rate:,.0f} tokens/s"]
        if self._done_bytes and self._started_s is not None:
            rest_bytes = max(0, self._total_bytes - self._done_bytes - self._skipped_bytes)
            rest_s = rest_bytes * (now_s - self._started_s) / self._done_bytes
            told.append(f"{timedelta(seconds=round(rest_s))} left")
        return ", ".join(told)

    def summary(self, now_s: float) -> str:
        if self._started_s is None:
            return self._counts()
        elapsed_s = now_s - self._started_s
        rate = self.output_tokens / max(elapsed_s, 1e-9)
        duration = timedelta(seconds=round(elapsed_s))
        return f"{self._counts()}; {self.output_tokens:,} tokens in {duration}, {rate:,.0f} tokens/s"

    def _counts(self) -> str:
        before = f", {self.skipped:,} done before" if self.skipped else ""
        return f"{self.answered:,} answered, {self.failed:,} failed{before}"
