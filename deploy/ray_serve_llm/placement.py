"""On what a group's ranks are placed: `accelerator_type`, `accelerator_config`, `placement_group_config`. As in Ray Serve LLM,
that is GPUs unless CPUs are asked for. Imports ray's names of accelerators."""

from collections.abc import Mapping, Sequence
from typing import Any

from ray._common.utils import RESOURCE_CONSTRAINT_PREFIX
from ray.util.accelerators import accelerators

from deploy.ray_serve_llm.reading import Reading, Translation, aside, mapping, only, read, refuse, set_engine

KINDS = tuple(value for name, value in vars(accelerators).items() if name.startswith("NVIDIA_"))
OTHER_SPELLINGS = {"A10": "A10G"}
DEVICES = {"gpu": "cuda", "cpu": "cpu"}
PLACEMENT_GROUP: dict[str, Reading] = {
    "bundles": aside,
    "bundle_per_worker": aside,
    "strategy": only(("PACK", "STRICT_PACK"), "a group lies on one node: say STRICT_PACK"),
}


def read_placement(translation: Translation, path: str, asked: Mapping[str, Any]) -> None:
    """asked: the three keys, None where one was left out; `path` is of what holds them. Errors: ConfigError."""
    if "device" in translation.engine and not any(asked.values()):
        return
    kind = _accelerator_type(f"{path}.accelerator_type", asked["accelerator_type"])
    groups_path, groups = f"{path}.placement_group_config", asked["placement_group_config"]
    bundles = [] if groups is None else _bundles(translation, groups_path, groups)
    device = _device(f"{path}.accelerator_config", asked["accelerator_config"], kind, bundles)
    set_engine(translation, "device", DEVICES[device], f"{path}.accelerator_config")
    for position, bundle in enumerate(bundles):
        place = f"{groups_path}.bundles[{position}]" if "bundles" in groups else f"{groups_path}.bundle_per_worker"
        kind = _check_bundle(translation, place, bundle, device, kind)
    set_engine(translation, "accelerator_type", kind, f"{path}.accelerator_type")


def _accelerator_type(path: str, value: Any) -> str | None:
    kind = OTHER_SPELLINGS.get(value, value) if isinstance(value, str) else value
    if kind is not None and kind not in KINDS:
        refuse(path, value, f"Manta has kernels for NVIDIA's GPUs and for CPUs; of the former Ray knows {', '.join(KINDS)}")
    return kind


def _device(path: str, config: Any, kind: str | None, bundles: list[Mapping[str, Any]]) -> str:
    """gpu or cpu: as told, else as is asked for."""
    if config is None:
        on_cpus = bundles and not any(bundle.get("GPU") for bundle in bundles)
        return "cpu" if on_cpus and kind is None else "gpu"
    device = mapping(path, config).get("kind")
    if device not in DEVICES:
        refuse(f"{path}.kind", device, "ranks are placed on GPUs (kind: gpu) or CPUs (kind: cpu)")
    if device == "cpu" and kind is not None:
        refuse(path, config, f"accelerator_type={kind} is a kind of GPU: leave one of them out")
    return str(device)


def _bundles(translation: Translation, path: str, given: Any) -> list[Mapping[str, Any]]:
    """One for each rank of a group, or one for all."""
    size = translation.engine.get("tensor_parallel_size", 1)
    keys = mapping(path, given)
    read(translation, path, keys, PLACEMENT_GROUP)
    if (keys.get("bundles") is None) == (keys.get("bundle_per_worker") is None):
        refuse(path, given, "write either bundle_per_worker or bundles")
    if keys.get("bundles") is None:
        return [mapping(f"{path}.bundle_per_worker", keys["bundle_per_worker"])]
    bundles = keys["bundles"]
    if not isinstance(bundles, Sequence) or len(bundles) != size:
        refuse(f"{path}.bundles", bundles, f"a group of tensor_parallel_size={size} has {size}, one for each rank: list them")
    return [mapping(f"{path}.bundles[{position}]", bundle) for position, bundle in enumerate(bundles)]


def _check_bundle(
    translation: Translation, path: str, bundle: Mapping[str, Any], device: str, kind: str | None
) -> str | None:
    """The kind of GPU that it asks for, or that was asked for before."""
    for name, amount in bundle.items():
        if not isinstance(amount, int | float):
            refuse(f"{path}.{name}", amount, "write a number")
        if name.startswith(RESOURCE_CONSTRAINT_PREFIX) and device == "gpu":
            named = _accelerator_type(f"{path}.{name}", name.removeprefix(RESOURCE_CONSTRAINT_PREFIX))
            if kind is not None and named != kind:
                refuse(f"{path}.{name}", amount, f"a group's GPUs are of one kind, and accelerator_type is {kind}")
            kind = named
        elif name not in ("GPU", "CPU") and amount:
            refuse(f"{path}.{name}", amount, "ranks ask for GPU and CPU, and accelerator_type: leave it out")
    gpus, cpus = bundle.get("GPU") or 0, bundle.get("CPU") or 0
    if device == "cpu":
        if gpus:
            refuse(f"{path}.GPU", gpus, "accelerator_config says kind: cpu: leave one of them out")
        if cpus != int(cpus) or cpus < 1:
            refuse(f"{path}.CPU", cpus, "a rank has as many threads as its bundle has CPUs: say a whole number from 1 up")
        set_engine(translation, "threads", int(cpus), f"{path}.CPU")
        return kind
    if gpus != 1:
        refuse(f"{path}.GPU", gpus, "a rank has one GPU to itself: say 1")
    if cpus not in (0, 1):
        refuse(f"{path}.CPU", cpus, "a rank takes one CPU beside its GPU: say 1")
    return kind
