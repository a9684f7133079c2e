"""`python -m benchmarks.chaos`, its short form: no fault of a rank, no stop of the scheduler or the engine, and no cut loses a
stream or a token.

What is promised of each fault: docs/reliability.md.
"""

from pathlib import Path

import pytest

from benchmarks.chaos.faults import Fault
from benchmarks.chaos.report import incidents_table, troubles
from benchmarks.chaos.run import Chaos
from deploy.config.load import EMBEDDED_MODEL

pytestmark = [pytest.mark.ray, pytest.mark.slow]

SURVIVED = (
    "kill:leader", "stop:peer", "cut:peer", "pause:scheduler", "stop:scheduler", "cut:scheduler", "stop:engine", "cut:engine",
)  # fmt: skip
STREAMS = 8


def test_nothing_is_lost_and_nothing_is_wrong(tmp_path: Path) -> None:
    chaos = Chaos(EMBEDDED_MODEL, tmp_path / "serve.log", streams=STREAMS, seed=0, patience_s=180.0)
    result = chaos.run([Fault.parse(each) for each in SURVIVED], len(SURVIVED))
    said = incidents_table(result.incidents)
    made = {str(incident.fault): incident for incident in result.incidents if incident.fault is not None}
    assert made.keys() == set(SURVIVED), said
    for incident in made.values():
        assert incident.under_way == STREAMS, said
        assert not incident.lost, said
        assert not incident.refused, said
        assert incident.whole_s is not None, said
    assert sum(incident.answered for incident in result.incidents) > STREAMS, said
    assert troubles(result) == []
