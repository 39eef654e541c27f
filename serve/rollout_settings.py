"""What every rollout file is made from: two arms and where they run."""

from __future__ import annotations

from dataclasses import dataclass

from prune2serve.errors import Prune2ServeError


@dataclass(frozen=True)
class Arm:
    """One of the two models."""

    role: str
    """`baseline` or `candidate`; names Kubernetes objects."""
    name: str
    """The served model name."""
    uri: str
    """Where the cluster finds the weights: `pvc://...`, `s3://...`, `hf://...`, or a path on every node."""
    url: str
    """Its endpoint, without /v1."""
    weight: int
    """Share of the traffic; the two add up to 100."""


@dataclass(frozen=True)
class RolloutSettings:
    """What the files have in common."""

    model: str
    """The public name that clients ask for."""
    baseline: Arm
    candidate: Arm
    namespace: str = "default"
    gateway: str = "gateway"
    image: str = "vllm/vllm-openai:v0.24.0"
    num_gpus: int = 1
    """A replica's, on one node."""
    num_nodes: int = 1
    accelerator: str | None = None
    """Ray's name for the GPU, such as H100."""
    prometheus: str = "http://prometheus.monitoring:9090"
    mirror_percent: int = 10

    @property
    def arms(self) -> tuple[Arm, Arm]:
        return self.baseline, self.candidate


def split_weight(percent: int) -> tuple[int, int]:
    """Return (baseline's, candidate's) share for a candidate's percentage.

    Raises:
        Prune2ServeError: not between 1 and 99.
    """
    if not 1 <= percent <= 99:
        raise Prune2ServeError(
            f"the candidate's weight is {percent}, expected 1 to 99: a rollout needs both arms, promote "
            "the build itself "
            "to give it everything"
        )
    return 100 - percent, percent


def object_name(text: str) -> str:
    """A name that Kubernetes takes: lower-case letters, digits and dashes, at most 50 characters."""
    kept = "".join(char if char.isascii() and char.isalnum() else "-" for char in text.lower())
    return "-".join(part for part in kept.split("-") if part)[:50].strip("-") or "model"


def metadata(settings: RolloutSettings, kind: str) -> dict[str, str]:
    """A Kubernetes object's name and namespace."""
    return {"name": f"{object_name(settings.model)}-{kind}", "namespace": settings.namespace}
