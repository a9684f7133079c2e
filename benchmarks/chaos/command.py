"""Declared faults at random moments against `manta serve`, whose every stream is compared with what it says undisturbed.

An endpoint of 2 groups of 2 CPU ranks, 2 front ends and HAProxy, on a Ray of its own, with the example checkpoint in float64
(with `--device cuda` in float32, of as many groups of one GPU as there are);
so many clients ask all the time: chat and completions, greedy and sampled by seeds, some with log-probabilities, stop strings,
two choices, penalties. Counted for each fault: streams that were lost, as their clients saw it, wrong and refused ones; seconds
until there was output again, and until all that had been there was there again; in the end blocks, processes, memory.
An endpoint that does not come back is ended by Ctrl-C, which is timed, and another is started.

    python -m benchmarks.chaos --faults kill:peer,kill:scheduler --count 10 --json
    python -m benchmarks.chaos --count 1000                                   # every fault that can be survived

Exits with 1 if an answer was wrong or something was still held; with --strict also if a stream was lost. Linux only.
"""

import argparse
import json
import os
import signal
import sys
import tempfile
from pathlib import Path

import torch

from benchmarks.chaos.faults import KINDS, LASTING, NODE, Fault, faults_of
from benchmarks.chaos.report import as_json, held_table, incidents_table, troubles
from benchmarks.chaos.roles import ROLES
from benchmarks.chaos.run import SHAPE, Chaos, Shape
from benchmarks.shared.endpoint import ServingError
from benchmarks.shared.options import positive

TINY = Path(__file__).resolve().parents[2] / "examples" / "tiny"
USUAL = [
    Fault(kind, role)
    for kind in KINDS
    for role in ((NODE,) if kind == "disk" else ROLES)
    if role not in LASTING and not (kind in ("cut", "slow") and role in ("groups", "leaders"))
]


def parse_options() -> argparse.Namespace:
    listed = "\n".join(
        [
            "kinds:",
            *(f"  {kind:<16}{what}" for kind, what in KINDS.items()),
            "roles:",
            *(f"  {role:<16}{what}" for role, what in ROLES.items()),
        ]
    )
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=listed, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--faults", type=faults_of, default=USUAL, help="kind:role,... (every one but those of gcs and raylet)")
    parser.add_argument("--count", type=positive, help="faults in all (each once)")
    parser.add_argument("--seed", type=int, default=0, help="of faults, moments and requests (%(default)s)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="of the ranks (%(default)s)")
    parser.add_argument("--streams", type=positive, default=24, help="clients, each with a stream under way (%(default)s)")
    parser.add_argument(
        "--patience-s", type=float, default=180.0, help="after which an endpoint is taken not to come back (%(default)s)"
    )
    parser.add_argument("--log", type=Path, default=Path(tempfile.gettempdir()) / "manta-benchmarks" / "logs" / "chaos.log")
    parser.add_argument("--strict", action="store_true", help="exit with 1 also if a stream was lost")
    parser.add_argument("--json", action="store_true", help="print a JSON object as well")
    return parser.parse_args()


def main() -> None:
    """Parse the command line, make the faults, and say what became of it."""
    options = parse_options()
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # a background job of a shell: the endpoint would ignore it, too
        signal.signal(signal.SIGINT, signal.default_int_handler)
    shape = SHAPE if options.device == "cpu" else Shape(groups=torch.cuda.device_count(), ranks=1, device="cuda")
    chaos = Chaos(
        TINY, options.log, streams=options.streams, seed=options.seed, patience_s=options.patience_s, shape=shape
    )
    with tempfile.TemporaryDirectory(prefix="mc-", ignore_cleanup_errors=True) as folder:  # short: sockets' paths begin with it
        os.environ["RAY_TMPDIR"] = folder
        try:
            chaos.run(options.faults, options.count or len(options.faults))
        except ServingError as error:
            print(f"error: {error}", file=sys.stderr)
        except KeyboardInterrupt:
            print("interrupted: what there is so far", file=sys.stderr)
    result = chaos.result
    print(incidents_table(result.incidents))
    if result.began is not None and result.ended is not None:
        print(held_table(result.began, result.ended))
    if options.json:
        print(json.dumps(as_json(result)))
    said = troubles(result)
    if options.strict:
        said += [f"{incident.fault}: lost {dict(incident.lost)}" for incident in result.incidents if incident.lost]
    if said:
        sys.exit("\n".join(["error:", *said]))


if __name__ == "__main__":
    main()
