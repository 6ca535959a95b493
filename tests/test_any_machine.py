"""The project runs where it is not developed, on Windows and macOS; `python -m machine` says what a computer has."""

import os
import re
import stat
import sys
from pathlib import Path
from types import SimpleNamespace

import at_once
import pytest
import torch
from matplotlib import font_manager

from command_line import UserError
from machine import __main__ as page
from machine import resolve_device, usable_cores
from machine.__main__ import Driver, about_fonts, about_gpu, about_memory, about_packages, about_python

ROOT = Path(__file__).resolve().parent.parent

# What Windows does not have is taken away from the project; other libraries take this machine for what it is
LIKE_WINDOWS = """
import builtins, os, signal, sys
import fastapi, matplotlib.figure, nltk, numpy, psutil, rouge, tokenizers, torch, torch.utils.tensorboard, uvicorn
import torch.distributed.fsdp, torch.distributed.checkpoint.state_dict, torch.distributed.pipelining
import prometheus_client, sacrebleu
import_module = builtins.__import__

def import_what_windows_has(name, globals=None, *arguments, **settings):
    if name in ("fcntl", "grp", "pty", "pwd", "resource", "termios"):
        importer = (globals or {}).get("__file__", "")
        if importer.startswith(sys.argv[1]) and not importer.startswith(sys.prefix):  # libraries lie in .venv
            raise ModuleNotFoundError(name)
    return import_module(name, globals, *arguments, **settings)

builtins.__import__ = import_what_windows_has
for name in ("SIGHUP", "SIGKILL", "SIGUSR1", "SIGALRM", "pause"):
    delattr(signal, name)
for name in ("fork", "sched_getaffinity", "getuid", "sysconf", "uname"):
    delattr(os, name)
open_file = os.open

def open_no_folder(path, *arguments, **settings):
    if os.path.isdir(path):
        raise PermissionError(13, "Permission denied", path)
    return open_file(path, *arguments, **settings)

os.open = open_no_folder
type(psutil.Process().memory_info()).peak_wset = property(lambda memory: memory.rss)  # as psutil has it there
"""
TRAIN = """
import finetune, pretrain_trainer
from text.text_files import iter_documents
common = "--max_steps 2 --eval_interval 1 --num_threads 1 --device cpu --precision fp32 --batch_size 2".split()
sizes = "--d_model 16 --n_layers 1 --n_heads 2 --max_seq_len 64 --sample_tokens 4".split()
pretrain = [*common, *sizes, "--train_data_dir", "text.txt", "--val_data_dir", "text.txt"]
pretrain_trainer.main(pretrain)
pretrain_trainer.main([*pretrain, "--max_steps", "3", "--resume", "auto"])
pretrain_trainer.main(pretrain)
finetune.main(["--mode", "sft", "--data_path", "q.json", *common])
import importlib
from pathlib import Path
from tests.test_layers import MODULES
# api_demo runs at once; gevent, which the load test imports, changes modules of Python itself
skipped = "pipeline", "api_demo", "inference.load_test"
for name in MODULES:
    if name.split(".")[0] not in ("benchmarks", "data", "docs") and name not in skipped:
        importlib.import_module(name)
import pipeline
"""


def test_without_what_windows_lacks_it_imports_trains_and_continues(tmp_path, monkeypatch):
    """Real runs of two stages, resumed and repeated, in a process without locks, POSIX signals and folders to open."""
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text("\n".join(f"{n} 的平方是 {n * n}。" for n in range(200)), encoding="utf-8")
    records = ", ".join(f'{{"instruction": "问 {n}", "response": "答 {n}"}}' for n in range(40))
    Path("q.json").write_text(f"[{records}]", encoding="utf-8")
    printed = at_once.run_script(LIKE_WINDOWS + TRAIN, ROOT)
    assert "continuing from models" in printed and "step 2 of 3" in printed
    assert "starting anew; the earlier run is now in models/pretrain/earlier/1" in printed
    assert Path("models/sft/sft_best.pth").is_file()
    assert '"memory_mib": ' in Path("models/sft/metrics.jsonl").read_text()


def test_benchmarks_and_tools_need_no_such_module_either():
    """None of them is imported at the top of a file, where it would stop everything else of the file."""
    lacking = [f"{start} {name}" for name in ("fcntl", "resource", "pwd", "termios") for start in ("import", "from")]
    for path in [*ROOT.glob("*.py"), *ROOT.glob("[!.]*/**/*.py")]:
        if path.relative_to(ROOT).parts[0] not in ("tests", "models"):
            lines = path.read_text(encoding="utf-8").splitlines()
            assert not [line for line in lines if line.startswith(tuple(lacking))], path


def test_apples_gpu_is_taken_where_there_is_no_other(monkeypatch):
    """Here there is none, which the sentence says of the very device."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    with pytest.raises(UserError, match="the device 'mps' is not available here"):
        resolve_device("auto")


def test_a_container_uses_no_more_cores_than_it_was_given(tmp_path):
    """Threads beyond its share would wait for each other."""
    quota = tmp_path / "cpu.max"
    here = usable_cores(quota)
    assert here == len(os.sched_getaffinity(0))
    for text, cores in (("50000 100000", 1), ("max 100000", here), ("6400000 100000", here), ("", here)):
        quota.write_text(text)
        assert usable_cores(quota) == cores, text


# ---------------------------------------------------------------------------------------------------------------- page


def test_the_page_has_a_line_for_everything(capsys, monkeypatch, tmp_path):
    """It needs no model, and ends with what would help."""
    monkeypatch.chdir(tmp_path)
    page.main()
    lines = capsys.readouterr().out.splitlines()
    gap = lines.index("")
    names = ["system", "Python", "project", "PyTorch", "GPU", "processor", "cores", "memory", "disk", "training"]
    names += ["compiler", "kernels", "fonts", "packages", "optional", "variables"]
    assert [line.split()[0] for line in lines[:gap]] == names
    assert all(len(line) > 12 for line in lines[:gap])
    assert lines[gap + 1] in ("what would help", "nothing is lacking")
    assert len(lines) < 40, "one page"
    assert not list(tmp_path.iterdir())


@pytest.fixture
def nvidia_smi(tmp_path, monkeypatch):
    """A function that puts a program of that name, which says what the real one does, where it is found."""

    def install(driver, cuda):
        program = tmp_path / "nvidia-smi"
        program.write_text(f"""#!/bin/sh
if [ "$1" = --list-gpus ]; then echo "GPU 0: NVIDIA H100 80GB HBM3 (UUID: GPU-6f1c)"; exit; fi
echo "Thu Nov 26 05:10:06 2026"
echo "+-----------------------------------------------------------------------------------------+"
echo "| NVIDIA-SMI {driver}             Driver Version: {driver}     CUDA Version: {cuda}     |"
""")
        program.chmod(program.stat().st_mode | stat.S_IXUSR)
        monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
        return Driver.ask()

    return install


def test_the_driver_is_asked_by_its_own_program(nvidia_smi, monkeypatch, tmp_path):
    assert nvidia_smi("550.54.15", "12.4") == Driver(["NVIDIA H100 80GB HBM3"], "550.54.15", "12.4")
    monkeypatch.setenv("PATH", str(tmp_path / "nowhere"))
    assert Driver.ask() == Driver([])


H100 = Driver(["NVIDIA H100"], "550.54.15", "12.4")


@pytest.mark.parametrize(
    ("driver", "build", "said", "remedy"),
    [
        (Driver(), None, "none; no NVIDIA driver; PyTorch is built without CUDA", ""),
        (Driver(), "13.0", "none; no NVIDIA driver; PyTorch is built for CUDA 13.0", "install NVIDIA's driver"),
        (H100, None, "NVIDIA H100; driver 550.54.15 runs CUDA up to 12.4", "install the PyTorch build with CUDA"),
        (H100, "13.0", "NVIDIA H100", "driver is too old for this PyTorch: update it, or .* built for CUDA 12$"),
        (H100, "12.8", "NVIDIA H100", "is CUDA_VISIBLE_DEVICES empty"),
    ],
)
def test_a_gpu_that_does_not_work_comes_with_a_remedy(driver, build, said, remedy):
    finding = about_gpu(driver, build, works=False)
    assert said in finding.value
    assert re.search(remedy, finding.remedy) and bool(remedy) == bool(finding.remedy)


@pytest.mark.parametrize(("capability", "fits"), [((8, 9), True), ((9, 0), True), ((6, 1), False), ((7, 0), False)])
def test_a_gpu_of_a_generation_that_the_build_does_not_know(capability, fits, monkeypatch):
    """Kernels for 8.6 run on 8.9; none of those listed runs on a Pascal, or on a Volta."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["sm_75", "sm_86", "sm_90", "sm_120"])
    finding = about_gpu(H100, "12.8", works=True)
    assert (finding.remedy == "") == fits


def test_packages_are_compared_with_what_was_tested(tmp_path):
    """Missing ones, other versions; what is for another Python does not count."""
    requirements = tmp_path / "requirements.txt"
    requirements.write_text(
        f"torch=={torch.__version__.partition('+')[0]}  # the library\n\nnumpy==0.1\nno-such-package==1.0  # gone\n"
        'pandas==1.0; python_version < "3"\n'
    )
    finding = about_packages(requirements)
    assert finding.value.startswith("1 of 3 as in requirements.txt; numpy is ")
    assert finding.value.endswith(", tested is ==0.1; no-such-package is missing")
    assert finding.remedy == "pip install -r requirements.txt"


def test_a_python_that_is_too_old_is_named(monkeypatch):
    assert about_python().remedy == ""
    monkeypatch.setattr(page, "sys", SimpleNamespace(version_info=(3, 9, 2), executable=sys.executable))
    assert "install Python 3.10 to 3.14" in about_python().remedy


def test_fonts_are_tried_with_a_chinese_character(monkeypatch):
    """matplotlib's own have none."""
    own = [font for font in font_manager.fontManager.ttflist if "matplotlib" in font.fname]
    monkeypatch.setattr(font_manager.fontManager, "ttflist", own)
    finding = about_fonts()
    assert "none with Chinese characters" in finding.value and "fonts-noto-cjk" in finding.remedy
    monkeypatch.setattr(page, "CHINESE", ord("A"))
    assert re.fullmatch(".+, for Chinese in plots", about_fonts().value)


def test_a_containers_memory_is_what_it_may_have(tmp_path):
    limit = tmp_path / "memory.max"
    limit.write_text(str(3 << 29))
    assert about_memory(limit).value.endswith(", 1.5 for this container")
    limit.write_text("max")
    assert "container" not in about_memory(limit).value
