"""What the user asked for, as scheduler and workers take it, and what is settled for them."""

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray

from benchmarks.models.zoo import make
from cluster.config import EngineConfig
from cluster.engine import EngineError
from cluster.fleet import adoption
from cluster.fleet.group import rank_resources
from cluster.fleet.ownership.remains import Found, Remains
from cluster.launch import plan
from cluster.resolve import resolve
from scheduler.protocol.orphans import Estate

TINY = str(Path(__file__).parents[2] / "examples" / "tiny")


@pytest.mark.parametrize(
    ("options", "exchanges"),
    [
        ({}, False),
        ({"groups": 2}, True),
        ({"max_groups": 2}, True),
        ({"groups": 2, "prefix_fetch": False}, False),
        ({"groups": 2, "enable_prefix_caching": False}, False),
    ],
)
def test_ranks_open_a_port_for_others_only_where_there_can_be_others(options: dict[str, Any], exchanges: bool) -> None:
    assert EngineConfig(model=TINY, **options).exchanges_blocks is exchanges


def test_what_was_left_open_is_settled_by_the_device() -> None:
    cpu, cuda = (resolve(EngineConfig(model=TINY), device, threads=3) for device in ("cpu", "cuda"))
    assert (cpu.depth, cpu.report_steps, cpu.report_hold_s, cpu.grant_ahead, cpu.threads) == (0, 1, math.inf, 2, 3)
    assert (cuda.depth, cuda.report_steps, cuda.report_hold_s, cuda.grant_ahead) == (1, 8, 0.004, 18)


def test_what_was_asked_for_is_what_is_settled() -> None:
    config = EngineConfig(model=TINY, threads=2, report_steps=5, max_model_len=100, block_size=16)
    resolved = resolve(config, "cuda", threads=3)
    assert (resolved.threads, resolved.report_steps, resolved.report_hold_s) == (2, 5, math.inf)
    assert (resolved.max_model_len, resolved.grant_ahead) == (100, 12)


@pytest.mark.parametrize(
    ("kind", "fields", "window", "narrow"),
    [
        ("mistral", {"sliding_window": 24}, 24, None),
        ("mistral", {"sliding_window": 200}, None, None),
        ("mistral", {"sliding_window": None}, None, None),
        ("gemma3_text", {"sliding_window": 24}, None, 24),
        ("gemma3_text", {"sliding_window": 200}, None, None),
        ("llama4_text", {"layer_types": ["chunked_attention"] * 2, "attention_chunk_size": 16}, 16, None),
    ],
    ids=["windows", "beyond the context", "none", "some layers", "some layers, beyond the context", "chunks"],
)
def test_what_is_given_back_is_what_no_layer_of_a_kind_sees(
    kind: str, fields: dict[str, Any], window: int | None, narrow: int | None, tmp_path: Path
) -> None:
    """Read off the class, for the longest sequences that are served."""
    path = make(kind, tmp_path / kind, **fields)
    config = EngineConfig(model=str(path), model_implementation="transformers", max_model_len=128, max_num_batched_tokens=32)
    resolved = resolve(config, "cpu")
    assert (resolved.window, resolved.narrow) == (window, narrow)
    assert resolved.prefill_ahead == 64


def test_bounds_are_checked_where_settings_are_declared() -> None:
    with pytest.raises(ValueError, match=r"queue_age_s=-1 is below 0: raise it"):
        EngineConfig(model=TINY, queue_age_s=-1)
    with pytest.raises(ValueError, match=r"node_timeout_s=nan is not above 0: give it seconds to start in"):
        EngineConfig(model=TINY, node_timeout_s=math.nan)
    with pytest.raises(ValueError, match=r"\(--engine-seed\) is outside"):
        EngineConfig(model=TINY, seed=-1)


def test_ranks_ask_for_the_kind_of_gpu_that_was_named() -> None:
    plain, kind = EngineConfig(model=TINY), EngineConfig(model=TINY, accelerator_type="H100")
    resolved = resolve(plain, "cuda")
    assert rank_resources(plain, resolved) == {"GPU": 1.0, "CPU": 1.0}
    assert rank_resources(kind, resolved) == {"GPU": 1.0, "CPU": 1.0, "accelerator_type:H100": 0.001}


def test_gpus_of_another_kind_are_no_room(monkeypatch: pytest.MonkeyPatch) -> None:
    resources = {"GPU": 4.0, "CPU": 8.0, "accelerator_type:A10G": 1.0}
    monkeypatch.setattr(ray, "nodes", lambda: [{"Alive": True, "Resources": resources}])
    assert plan(EngineConfig(model=TINY, accelerator_type="A10G", groups=4)).device == "cuda"
    with pytest.raises(EngineError, match=r"0\.001 accelerator_type:H100 .* 0 accelerator_type:H100: room for 0 group"):
        plan(EngineConfig(model=TINY, accelerator_type="H100"))


class Asked:
    """An actor of an estate, and what it answers; None: it has died. Ray, played, takes a question for its answer. cut: the
    first time the connection to it is."""

    def __init__(self, answer: Any, *, cut: bool = False) -> None:
        self.told = SimpleNamespace(remote=lambda: self.get)
        self._answer, self._cut = answer, cut

    def get(self) -> Any:
        if self._cut:
            self._cut = False
            raise ray.exceptions.ActorUnavailableError("the connection was cut", b"\0" * 16)
        if self._answer is None:
            raise ray.exceptions.ActorDiedError
        return self._answer


@pytest.mark.parametrize(
    ("scheduler", "leaders", "device"),
    [("cuda", [], "cuda"), (None, [None, "cuda"], "cuda"), ("", [None, "cuda"], "cuda"), ("", [None], ""), (None, [], "")],
)
def test_what_runs_goes_on_as_it_was_settled_when_a_node_has_gone(
    scheduler: str | None, leaders: list[str | None], device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next engine is not to wait for the node: what is left serves, and needs somebody to look after it. scheduler: "" has
    died."""
    config, estate = EngineConfig(model=TINY, groups=2), Estate("manta-app", "1", 60.0)
    settled = resolve(config, "cuda")
    monkeypatch.setattr(ray, "nodes", lambda: [{"Alive": True, "Resources": {"CPU": 1.0}}])
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 1.0})
    monkeypatch.setattr(ray, "get", lambda question, **_: question())
    monkeypatch.setattr(ray, "wait", lambda questions, **_: (questions[:1], questions[1:]))
    told = SimpleNamespace(resolved=settled) if scheduler else None
    monkeypatch.setattr(adoption, "latest_scheduler", lambda *_: None if scheduler is None else Asked(told, cut=True))
    groups = {(group, 0): Remains(group, 0, {0: str(group)}) for group in range(len(leaders))}
    monkeypatch.setattr(adoption, "find", lambda _: {"1": Found(groups=groups), "2": Found()})
    monkeypatch.setattr(adoption, "actor_of", lambda _, name: Asked(settled if leaders[int(name)] else None))
    if device:
        assert plan(config, estate=estate).device == device
    else:
        with pytest.raises(EngineError, match="room for 1 group"):
            plan(config, estate=estate)


@pytest.mark.parametrize(
    ("options", "hosts", "ranks"),
    [
        ({"groups": 6}, [8.0, 2.0, 1.0], 6), ({"groups": 11}, [8.0, 2.0, 1.0], 8),
        ({"groups": 4, "tensor_parallel_size": 2}, [5.0, 5.0], 4), ({"max_groups": 3}, [0.0], 1),
    ],
)  # fmt: skip
def test_a_host_is_shared_out_among_the_ranks_that_it_has_room_for(
    options: dict[str, Any], hosts: list[float], ranks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cores, processes that compile, and memory: those of other hosts take nothing of it."""
    monkeypatch.setattr(ray, "nodes", lambda: [{"Alive": True, "Resources": {"GPU": gpus, "CPU": 64.0}} for gpus in hosts])
    config = EngineConfig(model=TINY, device="cuda", **options)
    assert plan(config).host_ranks == ranks
    assert resolve(config, "cuda").host_ranks == config.ranks, "of one host, where nothing else is known"


@pytest.mark.parametrize(("options", "other"), [({"device": "cpu"}, "device=cpu"), ({"local": True}, "local")])
def test_a_kind_of_gpu_goes_with_gpus_on_ray(options: dict[str, Any], other: str) -> None:
    with pytest.raises(ValueError, match=f"accelerator_type=H100 is a kind of GPU, and {other}"):
        EngineConfig(model=TINY, accelerator_type="H100", **options)
