"""What fits into a GPU's memory: the arithmetic is that of real layers and models, and the page's table is its."""

from pathlib import Path

import pytest
import torch

from gpt_model import GPTConfig, GPTModel
from lora import LoRAOptions, attach_lora
from machine import autocast
from machine.what_fits import CARDS_GB, SIZES, Size, layer_bytes, main, table, training_bytes

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


@pytest.mark.parametrize("page", ["distributed.md", "distributed.zh-CN.md"])
def test_the_pages_table_is_the_commands(page):
    assert table(CARDS_GB, 1024) in (ROOT / "docs" / page).read_text(encoding="utf-8")


def test_one_card_of_another_size(capsys):
    main(["--memory_gb", "10", "--context", "2048"])
    said = capsys.readouterr().out
    assert "| model | | 10 GB |" in said
    assert "rows of 2048 tokens" in said
