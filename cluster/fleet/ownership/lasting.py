"""How the actors of an estate are made, whoever makes them: detached, under names by which the next owner finds them
(`remains`)."""

from typing import Any

from scheduler.protocol.orphans import Estate


class Lasting:
    """Makes what is to outlive this process, without owning it: actors that nobody owns in time, as the estate says, end by
    themselves."""

    def __init__(self, estate: Estate) -> None:
        self.estate = estate

    def scheduler_options(self, life: int) -> dict[str, Any]:
        return self._detached(f"scheduler/{life}")

    def rank_options(self, group: int, epoch: int, rank: int) -> dict[str, Any]:
        return self._detached(f"group/{group}/{epoch}/{rank}")

    def placement_options(self, group: int, epoch: int) -> dict[str, Any]:
        return {"name": f"{self.estate.prefix}group/{group}/{epoch}", "lifetime": "detached"}

    def _detached(self, name: str) -> dict[str, Any]:
        return {"name": f"{self.estate.version}/{name}", "namespace": self.estate.namespace, "lifetime": "detached"}

    def keep(self, actor: Any) -> None:
        """From now on somebody owns it: not here."""

    def check(self) -> None:
        """Before whatever is done to the estate."""
