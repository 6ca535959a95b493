"""Experts in training as a GPU computes them, at once: equal to one after another, and no count is waited for."""

import pytest
import torch
import torch.nn as nn
from test_gpu_step import TO_THE_HOST, Reads
from torch._dynamo.testing import CompileCounter

import machine
import transformer_components
from gpt_model import GPTConfig, GPTModel
from inference.kernels import expert_products
from inference.kernels.expert_products import arrange, counts_of, has_grouped_product
from lora import LoRAOptions, adapters_disabled, apply_lora
from training.expert_use import ExpertUse
from transformer_components import MixtureOfExperts, auxiliary_losses

ONE, WAYS = "one after another", ("blocks", "grouped")
SIZES = dict(vocab_size=64, d_model=32, n_layers=2, n_heads=4, n_kv_heads=2, max_seq_len=64, d_ff=24, n_experts=4)


@pytest.fixture
def computing(monkeypatch):
    """A function (way): from now on experts compute as a GPU does, in one of the `WAYS`, or one after another."""

    def choose(way):
        monkeypatch.setattr(transformer_components, "reads_wait", lambda device: way != ONE)
        monkeypatch.setattr(transformer_components, "has_grouped_product", lambda *_: way == "grouped")

    return choose


def make_model(**fields):
    torch.manual_seed(0)
    return GPTModel.from_config(GPTConfig.for_architecture("moe", **{**SIZES, **fields})).train()


def learned(model, inputs, dtype=torch.float32):
    """All that a layer, or a model, and its inputs learn from: outputs, losses of the router, and every gradient."""
    model.zero_grad()
    inputs = inputs.detach().clone().requires_grad_(inputs.is_floating_point())
    with auxiliary_losses() as losses, machine.autocast(torch.device("cpu"), dtype):
        outputs = model(inputs)
    outputs = outputs if torch.is_tensor(outputs) else outputs["logits"]
    (outputs.float().square().mean() + sum(losses)).backward()
    gradients = {name: each.grad for name, each in model.named_parameters() if each.requires_grad}
    gradients |= {"inputs": inputs.grad} if inputs.requires_grad else {}
    return {"outputs": outputs.detach(), "losses": torch.stack(losses).detach(), **gradients}


def assert_alike(ours, theirs, dtype=torch.float32):
    """Nothing lacks a gradient, and numbers are as near as the largest of their tensor is rounded."""
    for name, expected in theirs.items():
        tolerance = (1e-5 if dtype == torch.float32 else 0.04) * float(expected.abs().max()) + 1e-7
        torch.testing.assert_close(ours[name], expected, rtol=0, atol=tolerance, msg=f"{{}} in {name}".format)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("experts_per_token", [1, 2])
@pytest.mark.parametrize("fields", [{"activation": "swiglu"}, {"activation": "gelu", "mlp_bias": True}])
def test_experts_at_once_learn_what_they_learn_one_after_another(fields, experts_per_token, dtype, way, computing):
    """From fewer choices than experts to many more, and one expert that nothing chooses."""
    torch.manual_seed(2)
    layer = MixtureOfExperts(16, n_experts=5, experts_per_token=experts_per_token, d_ff=24, **fields)
    layer.router.weight.data[3] = -10.0
    use = ExpertUse(layer)
    for n_tokens in (1, 9, 150):
        results, figures, inputs = [], [], torch.randn(1, n_tokens, 16).abs()
        for this in (ONE, way):
            computing(this)
            results.append(learned(layer, inputs, dtype))
            figures.append(use.figures())
        assert_alike(*reversed(results), dtype)
        assert figures[0] == figures[1] and figures[0]["experts_least_used"] == 0
        assert not results[1]["experts.3.down_proj.weight"].any()


@pytest.mark.parametrize("way", WAYS)
def test_evaluations_and_recomputed_activations_are_the_same(way, computing):
    model, ids = make_model(), torch.randint(4, 64, (3, 30))
    computing(ONE)
    expected = learned(model, ids)
    computing(way)
    model.recompute_activations = True
    assert_alike(learned(model, ids), expected)
    model.eval()
    with torch.no_grad():
        torch.testing.assert_close(model(ids)["logits"], expected["outputs"], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("frozen", ["fp32", "int8"])
@pytest.mark.parametrize("targets", ["all", "attention"])
def test_adapters_beside_experts_learn_the_same(targets, frozen, way, computing, monkeypatch):
    """Also where frozen experts have none and pass gradients on, and with adapters disabled."""
    model, ids, results = make_model(), torch.randint(4, 64, (3, 30)), []
    apply_lora(model, LoRAOptions(lora_rank=8, frozen_weights=frozen, lora_targets=targets), "base.pth")
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.05 * torch.randn_like(parameter)
    monkeypatch.setattr(MixtureOfExperts, "_one_after_another", counted := Counted(MixtureOfExperts._one_after_another))
    for this in (ONE, way):
        computing(this)
        results.append(learned(model, ids))
        with torch.no_grad(), adapters_disabled(model):
            results[-1]["disabled"] = model(ids)["logits"]
    assert_alike(*reversed(results))
    assert counted.n == 2 * len(model.layers)


class Counted:
    """A method that counts its calls."""

    def __init__(self, method):
        self.method, self.n = method, 0

    def __get__(self, instance, owner):
        def call(*arguments):
            self.n += 1
            return self.method(instance, *arguments)

        return call


@pytest.mark.parametrize("way", WAYS)
def test_nobody_waits_for_a_number(way, computing, monkeypatch):
    """Forwards, computed again and backwards; one after another, a layer asks for its counts each time."""
    model, ids, asked = make_model(), torch.randint(4, 64, (3, 30)), []
    model.recompute_activations = True
    for name in TO_THE_HOST:
        usual = getattr(torch.Tensor, name)
        monkeypatch.setattr(torch.Tensor, name, lambda *a, name=name, usual=usual: asked.append(name) or usual(*a))
    for this, expected in ((way, []), (ONE, ["tolist"] * 2 * len(model.layers))):
        computing(this)
        with Reads() as reads:
            model(ids)["logits"].mean().backward()
        assert reads.found == [] and asked == expected


def test_a_look_at_the_use_of_experts_waits_once(monkeypatch):
    """For all layers, and only when it is logged."""
    model, copies = make_model().to("meta"), []
    use = ExpertUse(model)
    model(torch.zeros(3, 30, dtype=torch.int64, device="meta"))
    monkeypatch.setattr(torch.Tensor, "cpu", lambda tensor: copies.append(tensor) or torch.ones(tensor.shape))
    assert use.figures() == {"experts_least_used": 1.0, "experts_most_used": 1.0}
    assert len(copies) == 1 and all(layer.n_chosen.is_meta for layer in use.layers)


def test_a_model_with_experts_is_compiled_once(computing):
    """As one piece, for all lengths, also when counting begins anew."""
    torch._dynamo.reset()
    counter, model = CompileCounter(), make_model()
    batches = [torch.randint(4, 64, (3, length)) for length in (20, 31, 8)]
    computing("blocks")
    expected, use = [learned(model, ids) for ids in batches], ExpertUse(model)
    model.compile(backend=counter, dynamic=True, fullgraph=True)
    for ids, theirs in zip(batches, expected, strict=True):
        assert_alike(learned(model, ids), theirs)
        assert use.figures()
    assert counter.frame_count == 1


def chosen_by(kind, n_rows, n_experts):
    """Experts of rows: drawn, all the same, or as unlike as fills most blocks."""
    drawn = torch.randint(n_experts, (n_rows,))
    few = torch.arange(n_rows).clamp(max=n_experts - 1)
    return {"drawn": drawn, "one": torch.full_like(drawn, n_experts - 1), "few": few[torch.randperm(n_rows)]}[kind]


@pytest.mark.parametrize("kind", ["drawn", "one", "few"])
@pytest.mark.parametrize(("n_rows", "n_experts"), [(9, 8), (100, 7), (1000, 8), (2049, 8), (640, 128)])
def test_blocks_are_of_one_expert_and_few(kind, n_rows, n_experts):
    """Each row comes to a place of its own in a block of its expert and back; so with groups."""
    expert, rows = chosen_by(kind, n_rows, n_experts), torch.arange(1.0, n_rows + 1).unsqueeze(1)
    blocks = arrange(expert, n_experts, grouped=False)
    n_blocks, size = blocks.shape
    assert n_blocks < 2 * n_experts and n_blocks * size < 2 * n_rows + 16 * n_experts
    lying = blocks.lay(rows)
    assert lying.shape == (n_blocks, size, 1) and lying.count_nonzero() == n_rows
    assert torch.equal(blocks.expert[blocks.place // size], expert)
    assert torch.equal(blocks.lift(lying), rows)
    groups = arrange(expert, n_experts, grouped=True)
    assert torch.equal(groups.expert, expert.sort().values) and torch.equal(groups.lift(groups.lay(rows)), rows)
    assert torch.equal(groups.ends, counts_of(expert, n_experts).cumsum(0)) and groups.ends.dtype == torch.int32


@pytest.mark.parametrize("way", WAYS)
def test_no_copy_of_weights_is_kept(way, computing):
    """What waits for the backward pass is weights themselves and what a token's way through them leaves."""
    layer, kept = MixtureOfExperts(64, n_experts=8, experts_per_token=2, d_ff=64, activation="swiglu"), {}
    own = {parameter.data_ptr() for parameter in layer.parameters()}
    computing(way)

    def keep(tensor):
        kept[tensor.data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), auxiliary_losses():
        layer(torch.randn(1, 16, 64))
    assert max(size for place, size in kept.items() if place not in own) < 8 * 64 * 64 * 4  # bytes of one weight
    assert {parameter.data_ptr() for parameter in layer.experts.parameters()} <= kept.keys()


def test_an_expert_without_rows_has_no_gradient_whatever_the_kernel_leaves(computing, monkeypatch):
    """That of some GPUs writes nothing there, or anything."""
    layer, usual = MixtureOfExperts(16, n_experts=5, experts_per_token=2, d_ff=24), torch.nn.functional.grouped_mm
    layer.router.weight.data[3] = -10.0
    inputs, left = torch.randn(1, 40, 16).abs(), []

    def grouped_mm(x, weight, offs):
        result = usual(x, weight, offs=offs)
        if result.ndim == 3:
            is_empty = offs.diff(prepend=offs.new_zeros(1)) == 0
            left.append(int(is_empty.sum()))
            result[is_empty] = torch.nan
        return result

    computing(ONE)
    expected = learned(layer, inputs)
    computing("grouped")
    monkeypatch.setattr(torch.nn.functional, "grouped_mm", grouped_mm)
    assert_alike(learned(layer, inputs), expected)
    assert left == [1, 1]


def test_what_cannot_be_computed_at_once_is_computed_one_after_another(computing, monkeypatch):
    """Hooks are called, whatever they hang on; other classes and unlike experts compute as they do themselves."""
    monkeypatch.setattr(MixtureOfExperts, "_one_after_another", counted := Counted(MixtureOfExperts._one_after_another))
    computing("blocks")
    changes = (
        lambda experts: None,
        lambda experts: experts[1].up_proj.register_forward_hook(lambda *_: None),
        lambda experts: experts[0].register_full_backward_hook(lambda *_: None),
        lambda experts: nn.utils.parametrizations.weight_norm(experts[2].gate_proj),
        lambda experts: setattr(experts[2].down_proj, "forward", experts[2].down_proj.forward),
        lambda experts: setattr(experts[0], "down_proj", type("Other", (nn.Linear,), {})(24, 16, bias=False)),
        lambda experts: setattr(experts[0], "dropout", nn.Dropout(0.5)),
        lambda experts: setattr(experts[0], "down_proj", nn.Linear(24, 16)),
    )
    for n, change in enumerate(changes):
        layer = MixtureOfExperts(16, n_experts=3, experts_per_token=2, d_ff=24, activation="swiglu", bias=False)
        change(layer.experts)
        layer(torch.randn(2, 40, 16))
        assert counted.n == n


def test_a_few_tokens_copy_no_weights(computing, monkeypatch):
    """What is decoded while a model does not train goes through the chosen experts alone."""
    monkeypatch.setattr(MixtureOfExperts, "_at_once", counted := Counted(MixtureOfExperts._at_once))
    computing("blocks")
    layer = MixtureOfExperts(16, n_experts=4, experts_per_token=2, d_ff=24).eval()
    for n_tokens, at_once in ((1, 0), (31, 0), (32, 1)):
        layer(torch.randn(1, n_tokens, 16))
        assert counted.n == at_once
    layer.train()(torch.randn(1, 1, 16))
    assert counted.n == 2


def test_the_grouped_product_is_for_bf16_and_the_gpus_that_have_it(monkeypatch):
    """Elsewhere PyTorch would wait for the groups' ends."""
    cuda = torch.device("cuda")
    for capability, has_it in (((8, 0), False), ((9, 0), True), ((10, 3), True), ((12, 0), False)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, it=capability: it)
        assert has_grouped_product(cuda, torch.bfloat16, 8, 64, 96) == has_it
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert not has_grouped_product(torch.device("cpu"), torch.bfloat16, 8, 64)
    assert not has_grouped_product(cuda, torch.float16, 8, 64)
    assert not has_grouped_product(cuda, torch.bfloat16, 8, 64, 12)
    assert not has_grouped_product(cuda, torch.bfloat16, 1024, 64)


def test_the_grouped_product_is_called_as_it_wants_to_be():
    """Types, strides and shapes, forwards and backwards, on PyTorch's meta device, which checks them as a GPU does."""
    x = torch.empty(40, 16, dtype=torch.bfloat16, device="meta", requires_grad=True)
    weights = [torch.empty(24, 16, device="meta", requires_grad=True) for _ in range(3)]
    biases = [torch.empty(24, device="meta", requires_grad=True) for _ in range(3)]
    rows = arrange(torch.zeros(40, dtype=torch.int64, device="meta"), 3, grouped=True)
    expert_products.multiply(rows.lay(x), rows, weights, biases).sum().backward()
    assert x.grad.shape == x.shape
    assert all(each.grad.shape == each.shape and each.grad.dtype == torch.float32 for each in (*weights, *biases))
