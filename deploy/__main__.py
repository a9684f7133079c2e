"""`python -m deploy` is `manta`."""

from deploy.cli import main

main()
