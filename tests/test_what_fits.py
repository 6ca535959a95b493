"""What fits into a GPU's memory: the arithmetic is that of real layers and models, and the page's table is its."""

from pathlib import Path

import pytest
import torch

from alignment.dpo import DPOConfig
from alignment.ppo import PPOConfig
from alignment.sft import SFTConfig
from command_line import parse_config
from gpt_model import GPTConfig, GPTModel
from lora import LoRAOptions, attach_lora
from machine import autocast
from machine.what_fits import (
    AS_IT_IS,
    CARDS_GB,
    RESERVED,
    SIZES,
    Size,
    fine_tuning,
    first_that_fits,
    layer_bytes,
    main,
    table,
    training_bytes,
)
from training.memory_options import fit_options
from training.micro_batches import RESERVE

ROOT = Path(__file__).resolve().parent.parent


def config_of(size):
    sizes = dict(d_model=size.d_model, n_layers=size.n_layers, n_heads=size.n_heads, n_kv_heads=size.n_kv_heads)
    sizes |= dict(head_dim=size.head_dim, d_ff=size.d_ff, vocab_size=size.vocab_size, max_seq_len=64)
    return GPTConfig.for_architecture("modern" if size.is_gated else "gpt2", **sizes)


@pytest.mark.parametrize("size", SIZES, ids=lambda size: size.name)
def test_parameters_and_adapters_are_those_of_the_models(size):
    """All but norms, biases and positions, which are less than a hundredth."""
    with torch.device("meta"):
        model = GPTModel.from_config(config_of(size))
        assert model.num_parameters() == pytest.approx(size.parameters, rel=0.01)
        attach_lora(model, LoRAOptions(lora_rank=16))
    adapters = sum(weight.numel() for name, weight in model.named_parameters() if "lora_" in name)
    assert adapters == size.adapters


@pytest.mark.parametrize("is_gated", [False, True])
def test_a_layer_keeps_as_much_as_it_says(is_gated):
    """By the bytes of all that autograd keeps of a layer in bf16, weights aside. A CPU's RMSNorm is not fused: it keeps
    its output, too, and queries and keys in fp32."""
    size = Size("small", 64, 64, 1, 4, 2 if is_gated else 4, 16, 192, is_gated)
    model = GPTModel.from_config(config_of(size)).train()
    x, n_tokens, kept = torch.randn(8, 64, 64, requires_grad=True), 8 * 64, {}
    weights = {frozenset(parameter.shape) for parameter in model.parameters()}

    def keep(tensor):
        if frozenset(tensor.shape) not in weights:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    watched = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
    with watched, autocast(torch.device("cpu"), torch.bfloat16):
        result = model.layers[0](x, rotary=model.position_embedding.rotary(slice(0, 64)))
    assert result.shape == x.shape
    in_all = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    not_fused = (2 * 4 * 64 + (8 - 2) * 6 * 16) * is_gated
    assert in_all / n_tokens == pytest.approx(layer_bytes(size) + not_fused, rel=0.05)


def test_more_of_anything_needs_more_memory():
    size = SIZES[0]
    plain = training_bytes(size, 4, 1024, recompute=False)
    assert training_bytes(size, 8, 1024, recompute=False) > plain
    assert training_bytes(size, 4, 1024, recompute=True) < plain
    lora, beside_int8 = (training_bytes(size, 4, 1024, recompute=False, frozen=kind) for kind in ("fp32", "int8"))
    assert beside_int8 < lora < plain
    assert lora - beside_int8 == 5 * size.matrices - 6 * size.d_model * size.d_ff


# -- options that are chosen -------------------------------------------------------------------------------------------


def test_ways_that_change_nothing_of_what_is_learned_come_first():
    """And only options that nobody has set are changed."""
    needs = {(0, "fp32", False): 9, (0, "fp32", True): 7, (16, "fp32", False): 6, (16, "int8", False): 5,
             (16, "int8", True): 2, (16, "fp32", True): 5}  # fmt: skip

    def chosen(room, open_options=AS_IT_IS, **given):
        return first_that_fits(room, AS_IT_IS | given, open_options, lambda options: needs[tuple(options.values())])

    assert chosen(9) == {}
    assert chosen(7) == {"recompute_activations": True}
    assert chosen(6) == {"lora_rank": 16}
    assert chosen(5) == {"lora_rank": 16, "frozen_weights": "int8"}
    assert chosen(4) == {"lora_rank": 16, "frozen_weights": "int8", "recompute_activations": True}
    assert chosen(1) is None
    assert chosen(6, ["recompute_activations"]) is None
    assert chosen(5, ["frozen_weights", "recompute_activations"], lora_rank=16) == {"frozen_weights": "int8"}
    assert chosen(2, ["recompute_activations"], lora_rank=16, frozen_weights="int8") == {"recompute_activations": True}


@pytest.mark.parametrize("size", SIZES, ids=lambda size: size.name)
@pytest.mark.parametrize("card", CARDS_GB)
def test_the_trainers_choose_what_the_command_prints(size, card):
    """For each model and card, by the room that the page reckons with; and the printed options are known."""
    command = fine_tuning(size, card, 1024)
    config, limit = SFTConfig(max_seq_len=1024), (card - RESERVED) * 1e9 / (1 - RESERVE)
    said = fit_options(config, config_of(size), torch.device("cpu"), limit)
    if command == "–":
        assert "it may run out of memory; lower --max_seq_len" in said
        return
    printed = parse_config(SFTConfig, command.split()[4:], description="")
    assert printed.micro_batch_size >= 1
    names = list(AS_IT_IS)
    assert [getattr(config, name) for name in names] == [getattr(printed, name) for name in names]
    assert bool(said) == (printed.given != {"micro_batch_size"})
    assert all(f"--{name} " in said for name in printed.given - {"micro_batch_size"})


def test_what_the_user_gave_stays():
    size = SIZES[3]  # 1.7 billion parameters do not fit into 8 GB
    for given in ({"lora_rank": 8}, {"recompute_activations": True}):
        config = SFTConfig(max_seq_len=1024, **given)
        config.given = frozenset({"lora_rank"})
        fit_options(config, config_of(size), torch.device("cpu"), 8e9)
        assert all(getattr(config, name) == value for name, value in given.items())
    assert config.lora_rank == 0
    untouched = SFTConfig(max_seq_len=1024)
    assert fit_options(untouched, config_of(size), torch.device("cpu")) == "", "a CPU's memory is no such limit"
    assert untouched == SFTConfig(max_seq_len=1024)


def test_ppo_needs_more_than_sft():
    shape, device = config_of(SIZES[0]), torch.device("cpu")

    def least(kind):
        return next(gb for gb in range(40) if not fit_options(kind(max_seq_len=1024), shape, device, gb * 1e9))

    limits = [least(kind) for kind in (SFTConfig, DPOConfig, PPOConfig)]
    assert limits == sorted(limits) and len(set(limits)) == 3


@pytest.mark.parametrize("page", ["distributed.md", "distributed.zh-CN.md"])
def test_the_pages_table_is_the_commands(page):
    assert table(CARDS_GB, 1024) in (ROOT / "docs" / page).read_text(encoding="utf-8")


def test_one_card_of_another_size(capsys):
    main(["--memory_gb", "10", "--context", "2048"])
    said = capsys.readouterr().out
    assert "| model | | 10 GB |" in said
    assert "rows of 2048 tokens" in said
