"""Do the container and Kubernetes files satisfy the schemas and linters of their tools?"""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from typer.main import get_command

import rlv3.cli
import worker.cli

DEPLOY = Path(__file__).resolve().parents[2] / "deploy"
COMPOSE = DEPLOY / "docker" / "compose.yaml"
MANIFESTS = sorted((DEPLOY / "kubernetes").glob("*.yaml"))
OF_OPERATORS = {"ServiceMonitor"}
"""Kinds that no cluster has by itself, and so no schema here."""


def run(*command: str) -> subprocess.CompletedProcess[str]:
    tool = str(Path(sys.executable).parent / command[0])
    return subprocess.run([tool, *command[1:]], capture_output=True, text=True, check=False)


def manifests() -> list[dict[str, Any]]:
    texts = (path.read_text("utf-8") for path in MANIFESTS)
    return [document for text in texts for document in yaml.safe_load_all(text)]


def of_kind(kind: str) -> dict[str, Any]:
    (found,) = [document for document in manifests() if document["kind"] == kind]
    return found


def test_hadolint_has_nothing_to_say() -> None:
    done = run("hadolint", str(DEPLOY / "docker" / "Dockerfile"))
    assert (done.returncode, done.stdout) == (0, "")


def test_compose_satisfies_its_specification() -> None:
    done = run("check-jsonschema", "--builtin-schema", "vendor.compose-spec", str(COMPOSE))
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("kind", [d["kind"] for d in manifests() if d["kind"] not in OF_OPERATORS])
def test_manifest_satisfies_the_schema_of_its_kind(kind: str) -> None:
    kubernetes_validate.validate(of_kind(kind), "1.31", strict=True)


def test_the_schema_would_notice() -> None:
    wrong = of_kind("StatefulSet")
    wrong["spec"]["template"]["spec"]["containers"][0]["livenesProbe"] = {}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(wrong, "1.31", strict=True)


def test_there_is_one_worker_at_a_time() -> None:
    spec = of_kind("StatefulSet")["spec"]
    assert spec["replicas"] == 1
    assert "updateStrategy" not in spec  # the default ends the old pod first


def test_containers_are_confined() -> None:
    pod = of_kind("StatefulSet")["spec"]["template"]["spec"]
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["automountServiceAccountToken"] is False
    for container in pod["containers"]:
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }
        assert {"cpu", "memory"} == set(container["resources"]["limits"])
    for service in yaml.safe_load(COMPOSE.read_text("utf-8"))["services"].values():
        assert service["read_only"] is True
        assert service["cap_drop"] == ["ALL"]
        assert service["security_opt"] == ["no-new-privileges:true"]


def test_probes_ask_the_port_that_the_http_process_opens() -> None:
    containers = of_kind("StatefulSet")["spec"]["template"]["spec"]["containers"]
    (api,) = [container for container in containers if container["name"] == "api"]
    port = api["ports"][0]
    assert f"0.0.0.0:{port['containerPort']}" in api["args"]
    for probe, path in (("readinessProbe", "/readyz"), ("livenessProbe", "/healthz")):
        assert api[probe]["httpGet"] == {"path": path, "port": port["name"]}
    service = of_kind("Service")
    assert service["spec"]["ports"][0]["targetPort"] == port["name"]
    monitor = of_kind("ServiceMonitor")
    assert monitor["apiVersion"] == "monitoring.coreos.com/v1"
    assert monitor["spec"]["endpoints"][0]["port"] == service["spec"]["ports"][0]["name"]
    assert monitor["spec"]["selector"]["matchLabels"] == service["metadata"]["labels"]
    policy = of_kind("NetworkPolicy")["spec"]
    assert policy["ingress"][0]["ports"][0]["port"] == port["containerPort"]
    assert policy["podSelector"]["matchLabels"] == service["spec"]["selector"]


def command_lines() -> list[tuple[str, list[str]]]:
    pod = of_kind("StatefulSet")["spec"]["template"]["spec"]
    services = yaml.safe_load(COMPOSE.read_text("utf-8"))["services"].values()
    found = [("rlv3-worker", container["args"]) for container in pod["containers"]]
    found += [("rlv3-worker", service["command"]) for service in services]
    for unit in sorted((DEPLOY / "systemd").glob("*.service")):
        (line,) = re.findall(r"^ExecStart=(.*)$", unit.read_text("utf-8"), re.MULTILINE)
        program, *words = shlex.split(line)
        found.append((Path(program).name, words))
    return found


@pytest.mark.parametrize(("program", "words"), command_lines())
def test_every_command_line_is_one_that_the_programs_take(program: str, words: list[str]) -> None:
    app = {"rlv3-worker": worker.cli.app, "rlv3": rlv3.cli.app}[program]
    command = get_command(app).commands[words[0]]  # type: ignore[attr-defined]
    command.make_context(words[0], list(words[1:]))
