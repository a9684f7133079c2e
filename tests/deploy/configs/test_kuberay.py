"""The Kubernetes files: known fields only, room for the groups as Ray's autoscaler sees it, doors and secrets as documented."""

from typing import Any

import pytest
from lightkube.models import core_v1, networking_v1
from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr

from deploy.config.load import KEYS_VARIABLE
from tests.deploy.configs.files import (
    CLUSTER_FILES,
    PINS,
    SERVICE_FILES,
    documents,
    engine_of,
    front_ends,
    holds_a_group,
    nodes_for_all_groups,
    serve_tree,
    strictly,
    tree,
)
from tests.deploy.configs.kuberay import RayCluster, RayClusterSpec, RayService

FILES = {name: name for name in SERVICE_FILES} | CLUSTER_FILES
AGENT_PORT = 52365
"""Where Ray's agent on every node answers /api/healthz, by default."""


def cluster_spec(name: str) -> dict[str, Any]:
    spec: dict[str, Any] = tree(name)["spec"]
    return spec["rayClusterConfig"] if name in SERVICE_FILES else spec


def parsed(name: str) -> RayClusterSpec:
    return strictly(RayClusterSpec, cluster_spec(name))


def templates(name: str) -> dict[str, core_v1.PodTemplateSpec]:
    """Pod templates by the name of their group."""
    spec = parsed(name)
    return {"head": spec.head_group_spec.template} | {group.group_name: group.template for group in spec.worker_group_specs}


def containers(name: str) -> list[core_v1.Container]:
    return [container for template in templates(name).values() for container in template.spec.containers]  # type: ignore[union-attr]


def node_types(name: str) -> dict[str, Any]:
    """What Ray's autoscaler, in the head pod, makes of the cluster. It validates too."""
    resource = {"metadata": {"name": "manta", "namespace": "default"}, "spec": cluster_spec(name)}
    found: dict[str, Any] = _derive_autoscaling_config_from_ray_cr(resource)["available_node_types"]
    return found


@pytest.mark.parametrize("name", FILES)
def test_every_field_is_known(name: str) -> None:
    if name in SERVICE_FILES:
        service, grpc = documents(name)
        strictly(RayService, service)
        strictly(core_v1.Service, grpc)
    else:
        strictly(RayCluster, tree(name))


def test_an_unknown_field_would_be_noticed() -> None:
    spec = cluster_spec("kubernetes/raycluster-cpu.yaml")
    with pytest.raises(AssertionError):
        strictly(RayClusterSpec, spec | {"enableInTreeAutoScaling": True})
    spec["headGroupSpec"]["template"]["spec"]["containers"][0]["enviroment"] = []
    with pytest.raises(AssertionError):
        strictly(RayClusterSpec, spec)


@pytest.mark.parametrize(("name", "serves"), FILES.items())
def test_pending_groups_bring_worker_nodes_and_fit_nowhere_else(name: str, serves: str) -> None:
    engine, types = engine_of(serves), node_types(name)
    (worker,) = {"gpu", "cpu"} & types.keys()
    assert nodes_for_all_groups(types, "headgroup", engine).keys() == {worker}
    assert [kind for kind, node in types.items() if holds_a_group(node["resources"], engine)] == [worker]


@pytest.mark.parametrize(("name", "serves"), FILES.items())
def test_scheduler_and_front_ends_fit_on_cpu_nodes_alone(name: str, serves: str) -> None:
    types = node_types(name)
    front = types.get("front", types["headgroup"])
    replicas = 1 + front_ends(serves)
    assert front["resources"]["front"] >= replicas
    assert front["resources"]["CPU"] >= replicas - 1
    assert [kind for kind, node in types.items() if "front" in node["resources"]] == [
        "front" if "front" in types else "headgroup"
    ]


@pytest.mark.parametrize("name", FILES)
def test_the_autoscaler_may_move(name: str) -> None:
    spec = parsed(name)
    assert spec.enable_in_tree_autoscaling
    for group in spec.worker_group_specs:
        assert group.min_replicas <= group.replicas <= group.max_replicas
        assert group.min_replicas < group.max_replicas


@pytest.mark.parametrize("name", FILES)
def test_the_image_has_the_ray_that_the_cluster_says(name: str) -> None:
    assert parsed(name).ray_version == PINS["ray"]
    assert len({container.image for container in containers(name)}) == 1


@pytest.mark.parametrize("name", FILES)
def test_keys_come_from_a_secret_and_ray_asks_for_its_token(name: str) -> None:
    assert parsed(name).auth_options.mode == "token"
    for container in containers(name):
        keys = [variable for variable in container.env or [] if variable.name == KEYS_VARIABLE]
        assert [variable.value for variable in keys] == [None]
        assert keys[0].valueFrom is not None
        assert keys[0].valueFrom.secretKeyRef is not None


@pytest.mark.parametrize("name", FILES)
def test_pods_are_unprivileged_probed_and_have_shared_memory(name: str) -> None:
    http = serve_tree(FILES[name])["http_options"]["port"]
    for group, template in templates(name).items():
        spec = template.spec
        assert spec is not None
        assert spec.securityContext is not None
        assert spec.securityContext.runAsNonRoot
        volumes = {volume.name: volume for volume in spec.volumes or []}
        container = spec.containers[0]
        assert container.securityContext is not None
        assert container.securityContext.allowPrivilegeEscalation is False
        mounts = {mount.mountPath: mount.name for mount in container.volumeMounts or []}
        shm = volumes[mounts["/dev/shm"]].emptyDir
        assert shm is not None
        assert shm.medium == "Memory"
        assert set(mounts.values()) == volumes.keys()
        served = name in SERVICE_FILES and group != "head"
        assert probe(container.livenessProbe) == (AGENT_PORT, "/api/healthz")
        assert probe(container.readinessProbe) == ((http, "/-/healthz") if served else (AGENT_PORT, "/api/healthz"))


def probe(found: core_v1.Probe | None) -> tuple[int | str, str | None]:
    assert found is not None
    assert found.httpGet is not None
    return found.httpGet.port, found.httpGet.path


@pytest.mark.parametrize("name", SERVICE_FILES)
def test_the_services_lead_to_the_doors(name: str) -> None:
    serve, grpc = serve_tree(name), strictly(core_v1.Service, documents(name)[1]).spec
    assert grpc is not None
    assert grpc.selector is not None
    assert [port.port for port in grpc.ports or []] == [serve["grpc_options"]["port"]]
    chosen = grpc.selector.items()
    assert [group for group, template in templates(name).items() if labels(template).items() >= chosen] == ["front"]
    head = templates(name)["head"].spec
    assert head is not None
    named = {port.name: port.containerPort for port in head.containers[0].ports or []}
    assert named["serve"] == serve["http_options"]["port"], "KubeRay takes the port of its service from the head's container"


def test_the_network_policy_opens_the_doors_and_nothing_else() -> None:
    policy = strictly(networking_v1.NetworkPolicy, tree("kubernetes/networkpolicy.yaml"))
    assert (policy.apiVersion, policy.kind) == ("networking.k8s.io/v1", "NetworkPolicy")
    spec = policy.spec
    assert spec is not None
    assert spec.podSelector is not None
    selected = spec.podSelector.matchLabels or {}
    for name in FILES:
        assert all(labels(template).items() >= selected.items() for template in templates(name).values())
    serve = serve_tree("serve-cluster.yaml")
    doors = [serve["http_options"]["port"], serve["grpc_options"]["port"]]
    for rule in spec.ingress or []:
        assert rule.from_ or [port.port for port in rule.ports or []] == doors


def labels(template: core_v1.PodTemplateSpec) -> dict[str, str]:
    return (template.metadata.labels if template.metadata else None) or {}
