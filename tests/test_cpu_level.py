"""Standing in for a lesser processor: one variable limits the kernels and PyTorch alike, or is refused."""

import os
import subprocess
import sys

import pytest
from conftest import ROOT, shown_levels

from cpu_level import CPU_LEVELS, cpu_level, possible_levels

PROGRAM = "import cpu_level, torch; torch.ones(9).exp(); print(torch.backends.cpu.get_cpu_capability())"


X86_LEVELS = [level for level in shown_levels() if "ATEN_CPU_CAPABILITY" in CPU_LEVELS[level].libraries]


def run(level):
    environment = {**os.environ, "CPU_LEVEL": level}
    return subprocess.run([sys.executable, "-c", PROGRAM], cwd=ROOT, env=environment, capture_output=True, text=True)


@pytest.mark.parametrize("level", X86_LEVELS)
def test_torch_keeps_to_the_level(level):
    assert run(level).stdout.strip().lower() == CPU_LEVELS[level].libraries["ATEN_CPU_CAPABILITY"]


@pytest.mark.parametrize("level", ["avx1024", "neon" if "sse2" in possible_levels() else "avx2"])
def test_a_level_that_the_processor_lacks_is_refused(level):
    """Before any work; the sentence lists those that it has."""
    result = run(level)
    assert result.returncode == 2 and result.stdout == ""
    assert result.stderr.count("\n") == 1
    assert f"CPU_LEVEL={level}" in result.stderr and ", ".join(possible_levels()) in result.stderr


def test_an_empty_variable_limits_nothing(monkeypatch):
    monkeypatch.setenv("CPU_LEVEL", "")
    assert cpu_level() is None
