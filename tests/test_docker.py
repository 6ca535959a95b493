"""What docker/ says fits the code: packages, levels of instructions, metrics, settings; the tools accept its files."""

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
from served import running, save_random_model

from cpu_level import X86_LEVELS
from inference.service.settings import ServiceSettings

ROOT = Path(__file__).resolve().parent.parent
DOCKER = ROOT / "docker"


def text_of(name):
    return (DOCKER / name).read_text(encoding="utf-8")


def names_in(requirements):
    lines = re.findall(r"^[\w.-]+", requirements, re.MULTILINE)
    return {re.sub(r"[-_.]+", "-", line).lower() for line in lines}


def test_packages_of_the_image_have_versions():
    """Each of them is pinned in one of the two lists that pip takes as constraints."""
    pinned = (ROOT / "requirements.txt").read_text() + (ROOT / "requirements-dev.txt").read_text()
    assert names_in(text_of("packages.txt")) <= names_in(pinned)


def test_kernels_are_built_for_all_levels():
    (levels,) = re.findall(r'^ARG CPU_LEVELS="(.*)"$', text_of("Dockerfile"), re.MULTILINE)
    assert levels.split() == [level.name for level in X86_LEVELS]


def test_what_the_kernels_are_compiled_from_is_all_that_compiling_needs(tmp_path):
    """The build's first stage copies a few files before it compiles, so that other changes do not compile anew."""
    before, separator, _ = text_of("Dockerfile").partition("RUN python -m inference.kernels.prebuilt")
    assert separator
    for copied in re.findall(r"^COPY (.+)$", before, re.MULTILINE):
        *sources, to = copied.split()
        for source in (ROOT / name for name in sources):
            if source.is_dir():
                shutil.copytree(source, tmp_path / to)
            else:
                place = tmp_path / to / source.name
                place.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(source, place)
    command = [sys.executable, "-m", "inference.kernels.prebuilt", "--help"]
    environment = {**os.environ, "PYTHONPATH": ""}
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    for path in tmp_path.rglob("*.[ch]"):  # what they include came along, too
        included = re.findall(r'^#include "(.+)"', path.read_text(encoding="utf-8"), re.MULTILINE)
        assert [name for name in included if not (path.parent / name).is_file()] == []


def test_image_has_every_module_that_the_service_imports():
    """The list of what is copied, which names folders, against what a process has loaded."""
    code = "import sys, inference.api_service; print(*(getattr(m, '__file__', None) for m in sys.modules.values()))"
    loaded = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    ours = {Path(name).relative_to(ROOT) for name in loaded.split() if name.startswith(f"{ROOT}/")}
    folders = {path.parts[0] for path in ours if len(path.parts) > 1 and not path.parts[0].startswith(".")}
    assert folders <= set(re.findall(r"^!(\w+)$", (ROOT / ".dockerignore").read_text(), re.MULTILINE))


def test_settings_of_the_compose_file_are_settings():
    block = text_of("docker-compose.yaml").partition("environment:")[2].partition("init:")[0]
    names = set(re.findall(r"^    (\w+):", block, re.MULTILINE))
    others = {"NVIDIA_VISIBLE_DEVICES", "NVIDIA_DRIVER_CAPABILITIES", "CPU_LEVEL"}
    assert names - others <= {field.name.upper() for field in fields(ServiceSettings)}


def test_dockers_default_runtime_is_not_overridden():
    """Where that is NVIDIA's, the service has all GPUs; its base image is the one that the pages name."""
    compose = text_of("docker-compose.yaml")
    assert "  runtime: ${RUNTIME:-} " in compose
    (base,) = re.findall(r"BASE_IMAGE:-(nvidia/cuda:[\w.-]+)}", compose)
    assert base in text_of("Dockerfile") and base in (ROOT / "docs/serving.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("profile", ["", "balanced", "watched"])
def test_compose_accepts_the_file(profile):
    if shutil.which("docker-compose") is None:
        pytest.skip("docker-compose is not installed here")
    options = ["--profile", profile] if profile else []
    command = ["docker-compose", *options, "config", "--services"]
    done = subprocess.run(command, cwd=DOCKER, capture_output=True, text=True, check=True)
    expected = {"": {"gpt"}, "balanced": {"gpt", "replica", "balancer"}, "watched": {"gpt", "prometheus", "grafana"}}
    assert set(done.stdout.split()) >= expected[profile]


def test_nginx_accepts_its_configuration(tmp_path):
    nginx = shutil.which("nginx", path=f"{os.environ['PATH']}:/usr/sbin")
    if nginx is None:
        pytest.skip("nginx is not installed here")
    (tmp_path / "replicas.conf").write_text("server 127.0.0.1:8000 max_fails=1;")
    (tmp_path / "nginx.conf").write_text(text_of("nginx.conf").replace("/tmp/", f"{tmp_path}/"))
    subprocess.run([nginx, "-t", "-c", tmp_path / "nginx.conf"], check=True, capture_output=True)


def test_shell_script_is_one_that_sh_can_read():
    subprocess.run(["sh", "-n", DOCKER / "balance.sh"], check=True)


def test_dashboard_and_load_test_against_a_service(tmp_path):
    """Every metric that the dashboard asks for is there; fifty users' programme runs, streams included."""
    model = save_random_model(tmp_path / "sft_best.pth")
    with running(tmp_path / "log", "--model_path", str(model)) as server:
        load = [sys.executable, "-m", "locust", "-f", ROOT / "inference/load_test.py", "--headless", "--only-summary"]
        load += ["-u", "4", "-r", "4", "-t", "5s", "--host", server.url]
        done = subprocess.run(load, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stdout + done.stderr
        lines = set(re.findall(r"^stream +(\w.*?)  ", done.stderr, re.MULTILINE))
        assert {"time to first token", "between tokens"} <= lines
        there = server.get("/metrics")[1]
    asked = set(re.findall(r"\b(?:vllm|service):\w+", json.dumps(json.loads(text_of("grafana/service.json")))))
    assert len(asked) > 8
    assert [name for name in asked if not re.search(rf"^{name}[ {{]", there, re.MULTILINE)] == []
