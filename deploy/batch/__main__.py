"""`python -m deploy.batch` is `manta batch`."""

import sys

from deploy.cli.commands import main

sys.argv.insert(1, "batch")
main()
