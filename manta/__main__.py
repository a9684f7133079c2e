"""`python -m manta` is `manta`, the command."""

from manta.commands import main

__all__ = ["main"]

if __name__ == "__main__":
    main()
