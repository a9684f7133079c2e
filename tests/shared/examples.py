"""How many examples a property is tried with: `make test` takes fewer of each than `make test-all`, by hypothesis' profile."""

from hypothesis import settings

USUAL = 100
"""hypothesis' own number, which `make test-all` has."""


def examples(many: int) -> int:
    """As many of them as this run takes. A test module may ask when it is imported: the profile is chosen before."""
    profile = settings()
    return max(many * profile.max_examples // USUAL, 1)
