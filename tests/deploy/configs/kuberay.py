"""KubeRay's custom resources as far as Manta uses them, after the v1 API reference of KubeRay 1.6.

No package ships the schema of the custom resource definitions, so the fields are written down here; what is inside a pod comes
from the Kubernetes models of `lightkube`. A field that is not here is an error, see `files.strictly`.
"""

from typing import Literal

from lightkube.models import core_v1, meta_v1
from msgspec import Struct


class AutoscalerOptions(Struct, rename="camel"):
    version: Literal["v1", "v2"]
    upscaling_mode: Literal["Default", "Aggressive", "Conservative"]
    idle_timeout_seconds: int
    resources: core_v1.ResourceRequirements
    security_context: core_v1.SecurityContext


class AuthOptions(Struct, rename="camel"):
    mode: Literal["token", "disabled"]


class HeadGroup(Struct, rename="camel"):
    ray_start_params: dict[str, str]
    template: core_v1.PodTemplateSpec


class WorkerGroup(Struct, rename="camel"):
    group_name: str
    replicas: int
    min_replicas: int
    max_replicas: int
    ray_start_params: dict[str, str]
    template: core_v1.PodTemplateSpec


class RayClusterSpec(Struct, rename="camel"):
    ray_version: str
    auth_options: AuthOptions
    enable_in_tree_autoscaling: bool
    autoscaler_options: AutoscalerOptions
    head_group_spec: HeadGroup
    worker_group_specs: list[WorkerGroup]


class RayServiceSpec(Struct, rename="camel"):
    exclude_head_pod_from_serve_svc: bool
    ray_cluster_deletion_delay_seconds: int
    serve_config_v2: str
    ray_cluster_config: RayClusterSpec


class RayCluster(Struct, rename="camel"):
    api_version: Literal["ray.io/v1"]
    kind: Literal["RayCluster"]
    metadata: meta_v1.ObjectMeta
    spec: RayClusterSpec


class RayService(Struct, rename="camel"):
    api_version: Literal["ray.io/v1"]
    kind: Literal["RayService"]
    metadata: meta_v1.ObjectMeta
    spec: RayServiceSpec
