"""The image's recipe and the examples of its use, held to the code as far as that goes without Docker or a cluster."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from flashserve.cli import build_parser

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "Dockerfile").read_text()
STEPS = [
    (words[0], words[1])
    for line in re.sub(r"\\\n", "", re.sub(r"^#.*\n", "", TEXT, flags=re.MULTILINE)).splitlines()
    if len(words := line.split(maxsplit=1)) == 2
]


def commands(value: Any) -> Iterator[list[str]]:
    """Every list in a document that begins as a command of ours."""
    if isinstance(value, list) and value[:1] == ["flashserve"]:
        yield value
    for item in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from commands(item)


def documents(name: str) -> list[Any]:
    return list(yaml.safe_load_all((ROOT / "deploy" / name).read_text()))


def test_the_image_is_made_of_what_there_is() -> None:
    assert {step for step, _ in STEPS} == {"FROM", "RUN", "COPY", "EXPOSE", "CMD", "ARG", "ENV"}
    copied = [source for step, rest in STEPS if step == "COPY" for source in rest.split()[:-1]]
    assert [source for source in copied if not (ROOT / source).exists()] == []
    packages = re.search(r"^packages = (\[.*\])$", (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert packages is not None
    assert {name.split("/")[0] for name in json.loads(packages[1])} <= set(copied)


@pytest.mark.skipif(sys.version_info < (3, 11), reason="the image's Python reads TOML itself")
def test_the_image_installs_what_server_and_gateway_need() -> None:
    (program,) = re.findall(r"python3 -c '(.*?)'", runs())
    program = program.replace("/tmp/pyproject.toml", str(ROOT / "pyproject.toml"))
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    names = [re.split(r"[\[<>=]", line)[0] for line in done.stdout.splitlines()]
    assert {"tritonclient", "httpx", "torch", "tokenizers", "fastapi", "uvicorn", "openai", "orjson", "redis"} <= set(
        names
    )
    assert {"nvidia-pytriton", "numpy", "flashserve", "pytest"}.isdisjoint(names), done.stderr


def runs() -> str:
    return "\n".join(rest for step, rest in STEPS if step == "RUN")


def test_the_image_starts_a_gateway_on_a_port_that_it_names() -> None:
    command = json.loads(dict(STEPS)["CMD"])
    parsed = build_parser().parse_args(command[1:])
    assert not parsed.no_gateway and parsed.host == "0.0.0.0"
    ports = {parsed.http_port, parsed.grpc_port, parsed.metrics_port, parsed.gateway_port}
    assert set(map(int, dict(STEPS)["EXPOSE"].split())) == ports
    assert any(rest.endswith(f" {parsed.model_repository}/smollm2") for step, rest in STEPS if step == "COPY")


@pytest.mark.parametrize("name", ["compose.yml", "kubernetes.yml"])
def test_the_examples_name_servers_and_a_gateway_in_front(name: str) -> None:
    found = [build_parser().parse_args(command[1:]) for command in commands(documents(name))]
    gateways = [parsed for parsed in found if hasattr(parsed, "triton")]
    servers = [parsed for parsed in found if not hasattr(parsed, "triton")]
    assert len(gateways) == 1 and servers and all(parsed.no_gateway and parsed.host == "0.0.0.0" for parsed in servers)
    (gateway,) = gateways
    assert gateway.host == "0.0.0.0" and gateway.port == 9000
    hosts = [address.removesuffix(f":{servers[0].grpc_port}") for address in gateway.triton]
    assert [f"{host}:{servers[0].metrics_port}" for host in hosts] == gateway.triton_metrics


def test_composes_gateway_reaches_its_services() -> None:
    (document,) = documents("compose.yml")
    (gateway,) = commands(document["services"]["gateway"])
    places = [
        word.split("=")[1].removeprefix("redis://") for word in gateway if word.startswith(("--triton", "--redis"))
    ]
    hosts = {place.split(":")[0] for place in places}
    assert hosts == set(document["services"]) - {"gateway"} == set(document["services"]["gateway"]["depends_on"])


def test_kubernetes_names_belong_together() -> None:
    kinds = {(item["kind"], item["metadata"]["name"]): item["spec"] for item in documents("kubernetes.yml")}
    servers = kinds["StatefulSet", "flashserve-server"]
    names = [f"flashserve-server-{number}.{servers['serviceName']}" for number in range(servers["replicas"])]
    (command,) = commands(kinds["Deployment", "flashserve-gateway"])
    assert [word.split("=")[1] for word in command if word.startswith("--triton=")] == [f"{n}:8001" for n in names]
    labels = {name: spec["template"]["metadata"]["labels"] for (kind, name), spec in kinds.items() if kind != "Service"}
    for (kind, name), spec in kinds.items():
        if kind == "Service":
            assert spec["selector"] in labels.values(), name
        else:
            assert spec["selector"]["matchLabels"] == labels[name]
