"""What the tests share: one small tokenizer, small random models of both architectures, one CPU thread."""

import os
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # the project is run from its folder, not installed

from plain_generation import CONTEXT  # noqa: E402

from byte_level_bpe import ByteLevelBPETokenizer  # noqa: E402
from cpu_level import CPU_LEVELS, possible_levels  # noqa: E402
from gpt_model import GPTConfig, GPTModel  # noqa: E402
from inference.kernels.linear_products import native_library  # noqa: E402

CORPUS = [
    "法国的首都是巴黎。",
    "意大利的首都是罗马。",
    "机器学习让计算机从数据中学习。",
    "The capital of France is Paris.",
    "The quick brown fox jumps over the lazy dog.",
    "Twelve plus thirty is forty-two.",
] * 4

# What takes longest, longest first: workers that take whole files then end at about the same time
LONGEST = (
    "test_readme", "test_distributed", "test_api_service", "test_training_loop", "test_rollouts", "test_alignment_sft",
    "test_engine", "test_linear_kernels", "test_quantizer", "test_decoder_step", "test_ppo", "test_pretrain_trainer",
    "test_alignment_on_ranks", "test_beam_search", "test_dpo", "test_lora_export", "test_sample_data",
    "test_bad_input", "test_distillation", "test_checkpoint", "test_reward_model",
)  # fmt: skip

TINY = dict(vocab_size=64, d_model=32, n_layers=2, n_heads=4, max_seq_len=32)
NO_COMPILER = "no compiler"

torch.set_num_threads(1)  # also for what is set up once for several tests


def shown_levels():
    """The processors that tests can be run as in this process, from the least: up to what CPU_LEVEL limits it to."""
    if native_library() is None:
        return []
    levels = possible_levels()
    return levels[: levels.index(os.environ.get("CPU_LEVEL") or levels[-1]) + 1] if levels else ["native"]


def stand_in_for(level, monkeypatch):
    """From now on the project's kernels are those of a processor of this level, or there are none."""
    if level == NO_COMPILER:
        monkeypatch.setenv("CC", "")
    elif level in CPU_LEVELS:
        monkeypatch.setenv("CPU_LEVEL", level)


@pytest.fixture(params=shown_levels())
def native_level(request, monkeypatch):
    """Each level of instructions in turn."""
    stand_in_for(request.param, monkeypatch)


@pytest.fixture(params=[*shown_levels(), NO_COMPILER])
def cpu_level(request, monkeypatch):
    """Each level of instructions in turn, and no compiler."""
    stand_in_for(request.param, monkeypatch)


def pytest_terminal_summary(terminalreporter):
    """What this machine, or CPU_LEVEL, does not let the tests show is said, not skipped in silence."""
    shown = ", ".join(shown_levels()) or "none, as nothing can be compiled"
    missing = ", ".join(name for name in CPU_LEVELS if name not in shown_levels()) or "none"
    torch_uses = torch.backends.cpu.get_cpu_capability()
    terminalreporter.write_line(
        f"kernels as on processors with: {shown}; not to be shown here: {missing}; PyTorch used {torch_uses}"
    )


def pytest_collection_modifyitems(items):
    """Put the files that take longest first, and skip what needs a GPU where there is none."""
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="no CUDA GPU here"))
    places = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path.stem, len(places)))


@pytest.fixture(autouse=True)
def one_thread():
    """Tiny matrices gain nothing from a second thread, and sums in a fixed order repeat; trainers set more."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def corpus():
    """Lines of Chinese and English."""
    return list(CORPUS)


@pytest.fixture(scope="session")
def tokenizer():
    """A byte-level BPE tokenizer of 320 tokens, trained on `corpus`."""
    trained = ByteLevelBPETokenizer(vocab_size=320)
    trained.train(CORPUS)
    return trained


@pytest.fixture(params=["gpt2", "modern"])
def architecture(request):
    """The name of each preset in turn."""
    return request.param


@pytest.fixture(scope="session")
def random_model():
    """A function (architecture, **sizes) → a small model in eval mode, the same weights for the same arguments.

    Unlike a freshly initialised model it has large weights, biases other than 0 and norms other than 1, so that
    forgetting any of them changes its logits.
    """

    def make(architecture="gpt2", seed=0, **sizes):
        if architecture == "modern":
            sizes = {"n_kv_heads": 2, **sizes}
        model = GPTModel.from_config(GPTConfig.for_architecture(architecture, **{**TINY, **sizes}))
        randomize(model, seed)
        return model.eval()

    return make


@pytest.fixture(params=["gpt2", "modern"])
def model(request, random_model):
    """A small random model of each preset in turn, with room for the prompts of plain_generation.py."""
    return random_model(request.param, max_seq_len=CONTEXT)


@pytest.fixture
def gpt2(random_model):
    """The first of them."""
    return random_model("gpt2", max_seq_len=CONTEXT)


def randomize(model, seed=0):
    """Give every parameter of any module random values of a size at which attention is neither flat nor one-hot."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            centre = 1.0 if "norm" in name and name.endswith("weight") else 0.0
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(centre + noise * (0.25 if parameter.ndim > 1 else 0.1))
