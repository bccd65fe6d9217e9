"""The manifest for Kubernetes: each field is one that its schema has, of the kind it says."""

from __future__ import annotations

import copy
import json
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from kubernetes.client import ApiClient
from torchx.runner import get_runner

from torchx_components import mdr

# Volcano's Job, batch.volcano.sh/v1alpha1, without what TorchX and we never say; pods are Kubernetes' own
POLICY = {"action": str, "event": str}
TASK = {"name": str, "replicas": int, "minAvailable": int, "maxRetry": int, "policies": [POLICY], "template": dict}
SPEC = {"schedulerName": str, "queue": str, "maxRetry": int, "plugins": {"svc": [str], "env": [str]}, "tasks": [TASK]}
JOB = {"apiVersion": str, "kind": str, "metadata": {"name": str}, "spec": SPEC}


def problems(content: Any, schema: Any, path: str = "") -> list[str]:
    """What a manifest says otherwise than the schema."""
    if isinstance(schema, dict) and isinstance(content, dict):
        unknown = [f"{path}.{name} is unknown" for name in content.keys() - schema.keys()]
        return unknown + [
            text
            for name in content.keys() & schema.keys()
            for text in problems(content[name], schema[name], f"{path}.{name}")
        ]
    if isinstance(schema, list) and isinstance(content, list):
        return [text for number, part in enumerate(content) for text in problems(part, schema[0], f"{path}[{number}]")]
    right = isinstance(schema, type) and type(content) is schema
    return [] if right else [f"{path} is {content!r}"]


def pod_problems(template: dict[str, Any]) -> list[str]:
    """The same for a pod, by the client's own models: they forget a field that they do not know."""
    client = ApiClient()
    try:
        pod = client.deserialize(SimpleNamespace(data=json.dumps(template)), "V1PodTemplateSpec")
    except ValueError as error:  # a field that must be there
        return [str(error)]
    return [] if client.sanitize_for_serialization(pod) == template else ["a field is unknown, or of another kind"]


@pytest.fixture(scope="module")
def manifest() -> dict[str, Any]:
    """What `torchx run -s kubernetes --dryrun` shows."""
    app = mdr.train(
        *("--method", "mlora", "--output_dir", "/shared/runs/mlora"),
        **{"j": "2x8", "gpu": 8, "cpu": 32, "memMB": 500000, "max_retries": 3, "image": "example.com/mdr:1"},
        mounts=["type=volume", "src=shared", "dst=/shared"],
        env={"MDR_CACHE": "/shared/cache"},
    )
    with get_runner() as runner, pytest.warns(UserWarning, match="configured with restarts: 3"):
        content: dict[str, Any] = yaml.safe_load(str(runner.dryrun(app, "kubernetes", {"queue": "default"}).request))
    return content


def test_the_manifest_keeps_to_its_schema(manifest: dict[str, Any]) -> None:
    assert problems(manifest, JOB) == []
    for task in manifest["spec"]["tasks"]:
        assert pod_problems(task["template"]) == []


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("spec.maxRetry", "3"),
        ("spec.retries", 3),
        ("spec.tasks.0.policies.0.events", "PodFailed"),
        ("spec.tasks.0.template.spec.terminationGraceSeconds", 60),
        ("spec.tasks.0.template.spec.terminationGracePeriodSeconds", "60"),
        ("spec.tasks.0.template.spec.containers.0.name", None),
        ("spec.tasks.0.template.spec.volumes.0.emptyDirectory", {}),
    ],
)
def test_what_breaks_the_schema_is_seen(manifest: dict[str, Any], path: str, value: Any) -> None:
    broken = copy.deepcopy(manifest)
    *above, last = path.split(".")
    place: Any = broken
    for name in above:
        place = place[int(name)] if name.isdecimal() else place[name]
    place[last] = value
    assert problems(broken, JOB) + pod_problems(broken["spec"]["tasks"][0]["template"])


def test_restarts_a_shared_folder_and_shared_memory_are_in_it(manifest: dict[str, Any]) -> None:
    spec = manifest["spec"]
    assert spec["maxRetry"] == 3 and [task["name"] for task in spec["tasks"]] == ["train-0", "train-1"]
    for task in spec["tasks"]:
        assert task["maxRetry"] == 3 and task["minAvailable"] == 1
        assert {(policy["event"], policy["action"]) for policy in task["policies"]} == {
            ("PodEvicted", "RestartJob"),
            ("PodFailed", "RestartJob"),
        }
        pod = task["template"]["spec"]
        assert pod["terminationGracePeriodSeconds"] == 60 and pod["restartPolicy"] == "Never"
        (container,) = pod["containers"]
        assert "--max-restarts 3" in container["command"][-1] and "--nnodes 2" in container["command"][-1]
        environment = {variable["name"]: variable["value"] for variable in container["env"]}
        assert environment["MDR_RESUME"] == "auto" and environment["MDR_CACHE"] == "/shared/cache"
        assert environment["TORCHX_JOB_ID"] == f"kubernetes://torchx/{manifest['metadata']['name']}"
        volumes = {volume["name"]: volume for volume in pod["volumes"]}
        mounted = {mount["mountPath"]: volumes[mount["name"]] for mount in container["volumeMounts"]}
        assert mounted["/dev/shm"]["emptyDir"] == {"medium": "Memory"}
        assert mounted["/shared"]["persistentVolumeClaim"] == {"claimName": "shared"}
