"""`python -m manta` is `manta`, the command."""

from deploy.cli.commands import main

__all__ = ["main"]

if __name__ == "__main__":
    main()
