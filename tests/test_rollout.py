"""Rollout files: consistent arms, shapes that the tools' own parsers take, thresholds from a comparison."""

import importlib.util
import re
import subprocess

import pytest
import yaml
from click.testing import CliRunner

from prune2serve.errors import Prune2ServeError
from prune2serve.records import Comparison, ComparisonRow
from prune2serve.serve import rollout
from prune2serve.serve.rollout import render, write_rollout
from prune2serve.serve.rollout_gates import threshold
from prune2serve.serve.rollout_settings import Arm, RolloutSettings, object_name, split_weight

BASE, CANDIDATE = "SmolLM2@base", "SmolLM2@pruned-22L"


def settings(**changes):
    base_weight, weight = split_weight(changes.pop("weight", 10))
    return RolloutSettings(
        model="SmolLM2",
        baseline=Arm("baseline", BASE, "hf://org/SmolLM2", "http://baseline:8000", base_weight),
        candidate=Arm("candidate", CANDIDATE, "pvc://models/pruned", "http://candidate:8000", weight),
        **changes,
    )


def loaded(name, **changes):
    return list(yaml.safe_load_all(render(settings(**changes))[name]))


def test_every_file_is_written_together_or_not_at_all(tmp_path):
    files = write_rollout(settings(), tmp_path / "out")
    assert {file.name for file in files} == set(rollout.FILES) == {file.name for file in (tmp_path / "out").iterdir()}
    with pytest.raises(Prune2ServeError, match="exists"):
        write_rollout(settings(), tmp_path / "out")
    write_rollout(settings(), tmp_path / "out", force=True)


def test_litellm_weighs_every_entry_and_mirrors_to_an_entry_that_exists():
    (split,) = loaded("litellm.yaml", weight=25)
    assert [entry["litellm_params"]["weight"] for entry in split["model_list"]] == [75, 25]
    assert {entry["model_name"] for entry in split["model_list"]} == {"SmolLM2"}
    (shadow,) = loaded("litellm-shadow.yaml")
    first, second = shadow["model_list"]
    assert first["litellm_params"]["silent_model"] == second["model_name"] != first["model_name"]
    assert first["litellm_params"]["model"].endswith(BASE)


@pytest.mark.skipif(importlib.util.find_spec("litellm") is None, reason="litellm is not installed")
@pytest.mark.parametrize("name", ["litellm.yaml", "litellm-shadow.yaml"])
def test_litellms_own_router_takes_the_files(name):
    import litellm

    (config,) = loaded(name)
    router = litellm.Router(model_list=config["model_list"], **config["router_settings"])
    assert "SmolLM2" in router.get_model_names()


@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="ray is not installed")
def test_rays_own_schema_takes_the_file():
    from ray.serve.schema import ServeDeploySchema

    (config,) = loaded("ray-serve.yaml", accelerator="H100", num_gpus=8, num_nodes=2)
    schema = ServeDeploySchema(**config)
    assert schema.applications[0].import_path == "ray.serve.llm:build_openai_app"


def test_ray_serves_both_arms_by_name():
    (config,) = loaded("ray-serve.yaml", num_gpus=4, num_nodes=2, accelerator="H100")
    first, second = config["applications"][0]["args"]["llm_configs"]
    assert first["model_loading_config"] == {"model_id": BASE, "model_source": "hf://org/SmolLM2"}
    assert second["model_loading_config"]["model_id"] == CANDIDATE
    assert second["engine_kwargs"] == {"tensor_parallel_size": 4, "pipeline_parallel_size": 2}


def test_the_gateway_routes_split_and_mirror():
    (split,) = loaded("httproute-split.yaml")
    backends = split["spec"]["rules"][0]["backendRefs"]
    assert [(backend["name"], backend["weight"]) for backend in backends] == [
        ("smollm2-baseline", 90),
        ("smollm2-candidate", 10),
    ]
    (mirror,) = loaded("httproute-mirror.yaml", mirror_percent=30)
    rule = mirror["spec"]["rules"][0]
    assert [backend["name"] for backend in rule["backendRefs"]] == ["smollm2-baseline"]
    assert rule["filters"][0]["requestMirror"] == {
        "backendRef": {"name": "smollm2-candidate", "port": 8000},
        "percent": 30,
    }


def test_kserves_services_share_a_group():
    services = loaded("kserve.yaml", weight=20)
    routes = [service["spec"]["router"]["route"] for service in services]
    assert [route["weight"] for route in routes] == [80, 20]
    assert {route["group"] for route in routes} == {"smollm2"}


def test_every_kubernetes_object_has_a_valid_and_distinct_name():
    files = ("httproute-split.yaml", "httproute-mirror.yaml", "kserve.yaml", "argo-analysis.yaml")
    objects = [document for name in files for document in loaded(name, namespace="prod")]
    names = [(made["kind"], made["metadata"]["name"]) for made in objects]
    assert len(set(names)) == len(names)
    for made in objects:
        assert re.fullmatch(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?", made["metadata"]["name"])
        assert made["metadata"]["namespace"] == "prod"


@pytest.mark.parametrize(
    ("text", "name"),
    [("HuggingFaceTB/SmolLM2-135M", "huggingfacetb-smollm2-135m"), ("--a__b@C--", "a-b-c"), ("模型", "model")],
)
def test_names_become_what_kubernetes_takes(text, name):
    assert object_name(text) == name


def comparison(*rows):
    return Comparison(baseline=BASE, candidate=CANDIDATE, rows=rows, ideal_ratio=None)


def row(metric, ratio, interval=None):
    return ComparisonRow(metric, "ms", 1.0, ratio, ratio, interval)


def test_thresholds_come_from_the_measured_interval_with_a_tenth_on_top():
    measured = comparison(
        row("ttft_p50", 0.7), row("ttft_p95", 0.8, (0.75, 0.9)), row("tpot_mean", 0.6), row("e2e_p95", 0.1)
    )
    assert threshold(measured, "ttft") == 0.99  # 0.9 * 1.1
    assert threshold(measured, "tpot") == 0.66  # no interval and no p95: 0.6 * 1.1
    assert threshold(comparison(row("e2e_p95", 0.1)), "ttft") == threshold(None, "ttft") == 1.1


def test_the_analysis_compares_the_arms_by_their_names_and_uses_the_thresholds():
    measured = comparison(row("ttft_p95", 0.8, (0.75, 0.9)))
    (template,) = yaml.safe_load_all(render(settings(), measured)["argo-analysis.yaml"])
    gates = {metric["name"]: metric for metric in template["spec"]["metrics"]}
    assert set(gates) == {"ttft-p95", "tpot-p95", "error-rate"}
    query = gates["ttft-p95"]["provider"]["prometheus"]["query"]
    assert query.index(CANDIDATE) < query.index(" / ") < query.index(BASE)
    assert "vllm:time_to_first_token_seconds_bucket" in query and query.count("(") == query.count(")")
    assert gates["ttft-p95"]["successCondition"].endswith("result[0] <= 0.99")
    assert gates["tpot-p95"]["successCondition"].endswith("result[0] <= 1.1")


def test_multi_node_commands_are_shell_and_name_every_node(tmp_path):
    text = render(settings(num_gpus=8, num_nodes=2))["vllm-multi-node.sh"]
    assert text.count("--node-rank 0") == text.count("--node-rank 1") == 2
    assert "--tensor-parallel-size 8 --pipeline-parallel-size 2" in text
    (tmp_path / "run.sh").write_text(text)
    subprocess.run(["sh", "-n", str(tmp_path / "run.sh")], check=True)


@pytest.mark.parametrize("weight", [0, 100, -5])
def test_a_weight_that_leaves_an_arm_without_traffic_is_refused(weight):
    with pytest.raises(Prune2ServeError, match=f"weight is {weight}, expected 1 to 99"):
        split_weight(weight)


def test_the_command_needs_a_build_and_a_real_comparison(tmp_path):
    from prune2serve.cli import group

    result = CliRunner().invoke(group, ["rollout", str(tmp_path)])
    assert isinstance(result.exception, Prune2ServeError) and "prune2serve.json" in str(result.exception)
    with pytest.raises(Prune2ServeError, match="no comparison at"):
        rollout.read_comparison(tmp_path / "none.json")
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(Prune2ServeError, match="is not JSON"):
        rollout.read_comparison(tmp_path / "bad.json")
