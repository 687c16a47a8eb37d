"""What is shipped to run elsewhere: Dockerfiles, the KubeRay job, the `ray up` cluster, and the
commands in texts. Nothing is built or started here; tests/integration/test_docker.py builds.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

from splatshard.jobs.__main__ import JOBS, main
from splatshard.jobs.convert import ConvertOptions, parse_options

ROOT = Path(__file__).resolve().parents[2]
DOCKERFILES = ("docker/Dockerfile", "docker/Dockerfile.cpu")
TEXTS = (*DOCKERFILES, "docker/cluster.yaml", "docs/running.md")
PINS = dict(
    line.split("==")
    for line in (ROOT / "constraints.txt").read_text().splitlines()
    if not line.startswith("#")
)


def instructions(name: str) -> list[list[str]]:
    """The instructions of a Dockerfile, each as its words."""
    text = re.sub(r"^\s*#.*\n", "", (ROOT / name).read_text(), flags=re.M).replace("\\\n", " ")
    return [line.split() for line in text.splitlines() if line.strip()]


def in_shell(command: str) -> list[str]:
    """The words of `command` after a shell that expands braces, which is what reads them."""
    done = subprocess.run(
        ["bash", "-c", f"printf '%s\\0' {command}"], capture_output=True, text=True, check=True
    )
    return done.stdout.rstrip("\0").split("\0")


def converts(command: str) -> ConvertOptions:
    words = in_shell(command)
    assert words[:3] == ["python", "-m", "splatshard.jobs.convert"]
    return parse_options(words[3:])


# Images


@pytest.mark.parametrize("name", DOCKERFILES)
def test_hadolint(name: str) -> None:
    hadolint = Path(sys.executable).with_name("hadolint")
    done = subprocess.run([hadolint, "--no-color", ROOT / name], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "")


@pytest.mark.parametrize("name", DOCKERFILES)
def test_image_runs_as_another_than_root(name: str) -> None:
    lines = instructions(name)
    assert [words[1] for words in lines if words[0] == "USER"] == ["1000"]
    assert lines[-3][0] == "USER"  # nothing but WORKDIR and CMD after it
    assert [w for words in lines for w in words if "USAGE" in w] == ["RAY_USAGE_STATS_ENABLED=0"]


@pytest.mark.parametrize("name", DOCKERFILES)
def test_image_gets_all_of_the_package_and_nothing_else(name: str) -> None:
    """The builder sees what .dockerignore lets through; all of that is copied."""
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    allowed = {line[1:].rstrip("/") for line in lines if line.startswith("!")}
    copies = [words for words in instructions(name) if words[0] == "COPY"]
    copied = [path for words in copies if "--from=build" not in words for path in words[1:-1]]
    assert sorted(copied) == sorted(allowed)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert project["tool"]["setuptools"]["packages"]["find"]["include"] == ["splatshard*"]
    links = {path.name for path in (ROOT / "splatshard").iterdir() if path.is_symlink()}
    assert {"splatshard/__init__.py", *links} <= allowed
    assert all((ROOT / path).exists() for path in allowed)


def test_pins_can_be_installed_from_any_index() -> None:
    """`pip freeze` writes torch==2.13.0+cpu, which only PyTorch's own index has."""
    assert not {name: pin for name, pin in PINS.items() if "+" in pin}


# KubeRay


@pytest.fixture(scope="module")
def rayjob() -> dict[str, Any]:
    return yaml.safe_load((ROOT / "jobs/rayjob.yaml").read_text())


def pods(rayjob: dict[str, Any]) -> list[dict[str, Any]]:
    cluster = rayjob["spec"]["rayClusterSpec"]
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    return [group["template"]["spec"] for group in groups]


def test_rayjob_runs_the_conversion_and_resumes(rayjob: dict[str, Any]) -> None:
    assert (rayjob["apiVersion"], rayjob["kind"]) == ("ray.io/v1", "RayJob")
    spec = rayjob["spec"]
    options = converts(spec["entrypoint"])
    assert options.src == "s3://in/{00000000..00001287}.tar"
    assert options.dst.startswith("s3://")
    assert options.config.backend == "triton"
    workers = spec["rayClusterSpec"]["workerGroupSpecs"]
    assert options.workers == sum(group["maxReplicas"] for group in workers)
    assert spec["backoffLimit"] > 0
    assert spec["shutdownAfterJobFinishes"]
    assert spec["submissionMode"] == "K8sJobMode"
    assert "jobId" not in spec  # a reused one would be refused


def test_rayjob_matches_the_image(rayjob: dict[str, Any]) -> None:
    cluster = rayjob["spec"]["rayClusterSpec"]
    assert cluster["rayVersion"] == PINS["ray"]
    for pod in pods(rayjob):
        assert pod["securityContext"]["runAsNonRoot"]
        assert pod["securityContext"]["runAsUser"] == 1000
        (container,) = pod["containers"]
        assert container["image"].endswith("splatshard:gpu")
        assert container["securityContext"]["allowPrivilegeEscalation"] is False
        assert container["envFrom"] == [{"secretRef": {"name": "splatshard-s3"}}]
        assert "env" not in container  # no secret in the file
        assert "metrics" in [port["name"] for port in container["ports"]]


def test_rayjob_keeps_work_off_the_head_and_gives_each_worker_a_gpu(rayjob: dict[str, Any]) -> None:
    cluster = rayjob["spec"]["rayClusterSpec"]
    assert cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    head, worker = (pod["containers"][0]["resources"] for pod in pods(rayjob))
    assert "nvidia.com/gpu" not in head["limits"]
    assert worker["limits"]["nvidia.com/gpu"] == "1"
    assert int(worker["requests"]["cpu"]) >= 12
    for resources in (head, worker):
        assert resources["requests"]["memory"] == resources["limits"]["memory"]
    pod = pods(rayjob)[1]
    assert pod["containers"][0]["lifecycle"]["preStop"]["exec"]["command"] == ["ray", "stop"]
    assert "nvidia.com/gpu" in [toleration["key"] for toleration in pod["tolerations"]]


# ray up


def test_cluster_passes_rays_own_check() -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    given = yaml.safe_load((ROOT / "docker/cluster.yaml").read_text())
    config = prepare_config(given)
    validate_config(config)
    worker = config["available_node_types"]["worker"]
    assert worker["node_config"]["InstanceMarketOptions"]["MarketType"] == "spot"
    assert config["available_node_types"]["head"]["resources"] == {"CPU": 0}
    assert config["available_node_types"]["head"]["max_workers"] == 0
    assert worker["min_workers"] == worker["max_workers"] == config["max_workers"]
    mounted = config["file_mounts"]
    assert set(mounted) == {f"~/splatshard/{path}" for path in mounted.values()}
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    allowed = {ln[1:].rstrip("/").removesuffix("/__init__.py") for ln in lines if ln[:1] == "!"}
    assert set(mounted.values()) == allowed


# Commands in texts


def commands(name: str) -> list[str]:
    """The calls of jobs in indented lines and comments, continued lines joined."""
    text = re.sub(r"^# ?", "", (ROOT / name).read_text(), flags=re.M)
    text = re.sub(r"\s*\\\n\s*", " ", text)
    job = r"(?:splatshard [a-z-]+|python -m (?:splatshard\.)?jobs\.convert)"
    return re.findall(rf"^ {{2,}}(?:\S.*\s)?({job} [^#\n]+)", text, re.M)


@pytest.mark.parametrize("name", TEXTS)
def test_commands_in_texts_have_jobs_and_flags(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    found = commands(name)
    assert found
    for command in found:
        words = re.sub(r"^python -m (splatshard\.)?jobs\.", "splatshard ", command)
        _, job, *arguments = in_shell(words)
        assert job in JOBS, command
        assert main([job, "--help"]) == 0
        help_text = capsys.readouterr().out
        flags = [word.partition("=")[0] for word in arguments if word.startswith("--")]
        assert not [f for f in flags if not re.search(rf"{f}(?![\w-])", help_text)], command
        if job == "convert":
            parse_options(arguments)


def test_make_names_every_file_with_tests_for_a_gpu() -> None:
    """`make test-gpu` must collect on machines where other files cannot even be imported."""
    text = (ROOT / "Makefile").read_text().replace("\\\n", " ")
    named = re.search(r"^GPU_TESTS := (.*)$", text, re.M)
    assert named is not None
    files = sorted((ROOT / "tests").rglob("test_*.py"))
    marked = [f for f in files if re.search(r"\bmark\.gpu\b", f.read_text())]
    assert named[1].split() == [str(f.relative_to(ROOT)) for f in marked]
