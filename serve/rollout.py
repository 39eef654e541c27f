"""Hand a build over to the tools that roll it out: gateways, Kubernetes, Ray, vLLM on several nodes.

Every file is made from the same two arms, the parent and the build, each with a served model name of its own so
that dashboards and queries tell them apart. Nothing here talks to a cluster.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from prune2serve.errors import Prune2ServeError
from prune2serve.records import Comparison
from prune2serve.serve.rollout_gates import argo_analysis
from prune2serve.serve.rollout_settings import Arm, RolloutSettings, metadata, object_name
from prune2serve.staging import staged_directory


def litellm(settings: RolloutSettings) -> Any:
    """LiteLLM proxy: picks an arm a request, by weight. The weight must stand on every entry."""
    return {
        "model_list": [_litellm_entry(settings.model, arm, {"weight": arm.weight}) for arm in settings.arms],
        "router_settings": {"routing_strategy": "simple-shuffle", "num_retries": 1},
    }


def litellm_shadow(settings: RolloutSettings) -> Any:
    """LiteLLM proxy: the parent answers, the build gets a silent copy of every request."""
    silent = f"{settings.model}-shadow"
    return {
        "model_list": [
            _litellm_entry(settings.model, settings.baseline, {"silent_model": silent}),
            _litellm_entry(silent, settings.candidate, {}),
        ],
        "router_settings": {"num_retries": 1},
    }


def _litellm_entry(name: str, arm: Arm, extra: dict[str, Any]) -> dict[str, Any]:
    params = {"model": f"hosted_vllm/{arm.name}", "api_base": f"{arm.url}/v1", "api_key": "os.environ/MODEL_API_KEY"}
    return {"model_name": name, "litellm_params": {**params, **extra}, "model_info": {"id": arm.name}}


def http_route(settings: RolloutSettings) -> Any:
    """Gateway API: one route that splits the traffic by weight.

    Clients ask for the public name, so both arms must serve it as a second --served-model-name.
    """
    backends = [{"name": _service(settings, arm), "port": 8000, "weight": arm.weight} for arm in settings.arms]
    return _http_route(settings, "split", {"backendRefs": backends})


def http_route_mirror(settings: RolloutSettings) -> Any:
    """Gateway API: the parent answers; the build gets a percentage of copies, whose answers are dropped."""
    backend = {"name": _service(settings, settings.candidate), "port": 8000}
    mirror = {"backendRef": backend, "percent": settings.mirror_percent}
    rule = {
        "filters": [{"type": "RequestMirror", "requestMirror": mirror}],
        "backendRefs": [{"name": _service(settings, settings.baseline), "port": 8000}],
    }
    return _http_route(settings, "mirror", rule)


def _http_route(settings: RolloutSettings, kind: str, rule: dict[str, Any]) -> dict[str, Any]:
    # A long answer must not be cut: no timeout for the whole request.
    match = {"path": {"type": "PathPrefix", "value": "/v1"}}
    return {
        "apiVersion": "gateway.networking.k8s.io/v1",
        "kind": "HTTPRoute",
        "metadata": metadata(settings, kind),
        "spec": {
            "parentRefs": [{"name": settings.gateway}],
            "rules": [{"matches": [match], "timeouts": {"request": "0s"}, **rule}],
        },
    }


def kserve(settings: RolloutSettings) -> Any:
    """KServe: two LLMInferenceServices in one routing group with proportional weights."""
    return [_kserve_service(settings, arm) for arm in settings.arms]


def _kserve_service(settings: RolloutSettings, arm: Arm) -> dict[str, Any]:
    resources = {"limits": {"nvidia.com/gpu": str(settings.num_gpus)}}
    container = {"name": "main", "image": settings.image, "resources": resources}
    return {
        "apiVersion": "serving.kserve.io/v1alpha2",
        "kind": "LLMInferenceService",
        "metadata": metadata(settings, arm.role),
        "spec": {
            "model": {"name": settings.model, "uri": arm.uri},
            "replicas": 1,
            "router": {
                "route": {"group": object_name(settings.model), "weight": arm.weight},
                "gateway": {},
                "scheduler": {},
            },
            "template": {"containers": [container]},
        },
    }


def ray_serve(settings: RolloutSettings) -> Any:
    """Ray Serve LLM: both arms behind one OpenAI-compatible app, chosen by model name."""
    configs = []
    for arm in settings.arms:
        config: dict[str, Any] = {
            "model_loading_config": {"model_id": arm.name, "model_source": arm.uri},
            "deployment_config": {"autoscaling_config": {"min_replicas": 1, "max_replicas": 2}},
            "engine_kwargs": {
                "tensor_parallel_size": settings.num_gpus,
                "pipeline_parallel_size": settings.num_nodes,
            },
        }
        if settings.accelerator:
            config["accelerator_type"] = settings.accelerator
        configs.append(config)
    app = {
        "name": object_name(settings.model),
        "route_prefix": "/",
        "import_path": "ray.serve.llm:build_openai_app",
        "args": {"llm_configs": configs},
    }
    return {"applications": [app]}


def production_stack(settings: RolloutSettings) -> Any:
    """Helm values for vLLM's production stack; its router has no weights, so clients choose by model name."""
    repository, _, tag = settings.image.rpartition(":")
    specs = [
        {
            "name": arm.role,
            "repository": repository or settings.image,
            "tag": tag if repository else "latest",
            "modelURL": arm.uri,
            "replicaCount": 1,
            "requestCPU": 6,
            "requestMemory": "32Gi",
            "requestGPU": settings.num_gpus,
            "vllmConfig": {
                "tensorParallelSize": settings.num_gpus,
                "extraArgs": ["--served-model-name", arm.name, "--shutdown-timeout", "60"],
            },
        }
        for arm in settings.arms
    ]
    return {"servingEngineSpec": {"runtimeClassName": "", "modelSpec": specs}, "routerSpec": {"enableRouter": True}}


def vllm_multi_node(settings: RolloutSettings) -> str:
    """The command of every node for each arm; node 0 listens."""
    lines = [
        "#!/bin/sh",
        "# One line a node: HEAD_HOST is node 0's address, reachable from the others; only node 0 answers HTTP.",
        "# Run one arm at a time on the same nodes, or give each arm nodes of its own.",
    ]
    for arm in settings.arms:
        lines.append(f"\n# {arm.role}: {arm.name}")
        for node in range(settings.num_nodes):
            parts = [
                "vllm serve",
                shlex.quote(arm.uri),
                f"--served-model-name {shlex.quote(arm.name)} {shlex.quote(settings.model)}",
                f"--tensor-parallel-size {settings.num_gpus} --pipeline-parallel-size {settings.num_nodes}",
                "--shutdown-timeout 60",
            ]
            if settings.num_nodes > 1:
                parts.append(f'--nnodes {settings.num_nodes} --node-rank {node} --master-addr "$HEAD_HOST"')
                parts.append("--headless" if node else "--host 0.0.0.0 --port 8000")
            prefix = f"# on node {node}: " if node else ""
            lines.append(prefix + " ".join(parts))
    return "\n".join(lines) + "\n"


FILES: dict[str, Callable[[RolloutSettings], Any]] = {
    "litellm.yaml": litellm,
    "litellm-shadow.yaml": litellm_shadow,
    "httproute-split.yaml": http_route,
    "httproute-mirror.yaml": http_route_mirror,
    "kserve.yaml": kserve,
    "argo-analysis.yaml": argo_analysis,
    "ray-serve.yaml": ray_serve,
    "production-stack-values.yaml": production_stack,
    "vllm-multi-node.sh": vllm_multi_node,
}
"""File name -> what makes it; text is written as it is, objects as YAML."""


def render(settings: RolloutSettings, comparison: Comparison | None = None) -> dict[str, str]:
    """Return every file's text."""
    files = {}
    for name, make in FILES.items():
        made = argo_analysis(settings, comparison) if make is argo_analysis else make(settings)
        files[name] = made if isinstance(made, str) else _yaml(made, make.__doc__ or "")
    return files


def write_rollout(
    settings: RolloutSettings, output: Path, comparison: Comparison | None = None, *, force: bool = False
) -> list[Path]:
    """Write every file into `output`, which appears whole.

    Raises:
        Prune2ServeError: `output` exists without `force`, or cannot be written.
    """
    files = render(settings, comparison)
    with staged_directory(output, force=force) as staging:
        for name, text in files.items():
            (staging / name).write_text(text, encoding="utf-8")
    return [output / name for name in files]


def _yaml(made: Any, doc: str) -> str:
    about = "".join(f"# {line.strip()}\n" if line.strip() else "#\n" for line in doc.strip().splitlines())
    documents = made if isinstance(made, list) else [made]
    return about + "---\n".join(yaml.safe_dump(document, sort_keys=False, width=120) for document in documents)


def _service(settings: RolloutSettings, arm: Arm) -> str:
    return f"{object_name(settings.model)}-{arm.role}"


def read_comparison(path: Path) -> Comparison:
    """Read what `measure --json` printed.

    Raises:
        Prune2ServeError: the file is missing or is no comparison.
    """
    if not path.is_file():
        raise Prune2ServeError(f"no comparison at {path}: write one with prune2serve measure --json > {path}")
    text = path.read_text(encoding="utf-8")
    try:
        json.loads(text)
    except ValueError as error:
        raise Prune2ServeError(f"{path} is not JSON: {error}") from None
    return Comparison.from_json(text, origin=str(path))
