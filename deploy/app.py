"""What Serve's configuration files call: `serve run deploy/configs/serve.yaml` and its like.

    client ──HTTP, gRPC──▶ Ingress (tokenise, hash, stream, detokenise) ══socket══▶ scheduler actor ══▶ groups
                              └──────────────status──────▶ Engine (owns scheduler and groups)

One `EngineReplica` (`deploy/serving/replicas/engine.py`) owns the cluster; `Ingress` replicas before it hold nothing. A model
beside the first is an application with an `Engine` alone, which they find (`discovery`). Imports ray.
"""

from deploy.serving.replicas.building import build, build_further

__all__ = ["build", "build_further"]
