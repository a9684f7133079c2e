"""`python -m deploy` is `manta`."""

from deploy.cli.commands import main

main()
