"""LoRA changes nothing until it has learned, and nothing but its adapters ever."""

import copy
import dataclasses

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

import gpt_model
from alignment.reward_model import RewardModel
from command_line import UserError, parse_config
from inference.kernels.int8_weights import Int8Linear, round_to_int8
from inference.quantizer import quantize_model_int8
from lora import (
    LoRAEmbedding,
    LoRALinear,
    LoRAOptions,
    adapters_disabled,
    apply_lora,
    attach_lora,
    detach_lora,
    lora_layers,
    lora_settings,
    lora_state,
    merge_lora,
    target_layers,
    trained_state,
    unmerge_lora,
)
from machine import autocast
from training.optimization import Updater, build_optimizers

RANK_4 = LoRAOptions(lora_rank=4)


def random_ids(*shape):
    return torch.randint(2, 64, shape, generator=torch.Generator().manual_seed(0))


def adapted(model, options=RANK_4, seed=0):
    """A copy of a model with adapters that are no longer zero."""
    model = copy.deepcopy(model)
    apply_lora(model, options, "base.pth")
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for value in lora_state(model).values():
            value.copy_(torch.randn(value.shape, generator=generator) * 0.2)
    return model


# -- what it computes --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rslora", [False, True])
def test_a_layer_computes_what_the_paper_says(rslora):
    """W x + b + α/R · B A x (α/√R with rsLoRA), by hand."""
    torch.manual_seed(0)
    linear, x = nn.Linear(6, 5), torch.randn(2, 3, 6)
    layer = LoRALinear(linear, LoRAOptions(lora_rank=4, lora_alpha=12.0, lora_rslora=rslora))
    nn.init.normal_(layer.lora_B)
    added = (x @ layer.lora_A.T @ layer.lora_B.T) * (12.0 / (2.0 if rslora else 4.0))
    torch.testing.assert_close(layer(x), F.linear(x, linear.weight, linear.bias) + added)


def test_a_layer_equals_that_of_peft(random_model):
    """The same numbers in and out of `peft`'s layer, rsLoRA and gradients included."""
    peft = pytest.importorskip("peft")
    for rslora in (False, True):
        torch.manual_seed(0)
        module, x = nn.Sequential(nn.Linear(6, 5)), torch.randn(3, 6)
        ours = LoRALinear(copy.deepcopy(module[0]), LoRAOptions(lora_rank=4, lora_alpha=3.0, lora_rslora=rslora))
        nn.init.normal_(ours.lora_B)
        config = peft.LoraConfig(r=4, lora_alpha=3.0, use_rslora=rslora, target_modules=["0"])
        theirs = peft.get_peft_model(module, config).base_model.model[0]
        theirs.lora_A["default"].weight.data.copy_(ours.lora_A)
        theirs.lora_B["default"].weight.data.copy_(ours.lora_B)
        torch.testing.assert_close(ours(x), theirs(x))
        ours(x).square().sum().backward()
        theirs(x).square().sum().backward()
        torch.testing.assert_close(ours.lora_A.grad, theirs.lora_A["default"].weight.grad)
        torch.testing.assert_close(ours.lora_B.grad, theirs.lora_B["default"].weight.grad)


def test_at_the_start_nothing_changes_and_every_adapter_can_learn(architecture, random_model):
    """Bit for bit the base's logits; and each adapter has a way to move: B has a gradient, A is not zero."""
    model = random_model(architecture)
    ids = random_ids(2, 12)
    expected = model(ids)["logits"]
    model = copy.deepcopy(model)
    apply_lora(model, RANK_4, "base.pth")
    output = model(ids, labels=ids)
    assert torch.equal(output["logits"], expected)
    output["loss"].backward()
    for layer in lora_layers(model).values():
        assert layer.lora_B.grad.abs().max() > 0
        assert layer.lora_A.abs().max() > 0


def test_dropout_works_in_training_only():
    torch.manual_seed(0)
    layer = LoRALinear(nn.Linear(64, 8), LoRAOptions(lora_rank=4, lora_dropout=0.5))
    nn.init.normal_(layer.lora_B)
    x = torch.randn(1, 64)
    assert not torch.equal(layer(x), layer(x))
    layer.eval()
    assert torch.equal(layer(x), layer(x))


# -- which layers ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("targets", "names"),
    [
        ("attention", {"query_proj", "key_proj", "value_proj", "output_proj"}),
        ("mlp", {"up_proj", "gate_proj", "down_proj"}),
        ("all", {"query_proj", "key_proj", "value_proj", "output_proj", "up_proj", "gate_proj", "down_proj"}),
        ("query_proj, value_proj", {"query_proj", "value_proj"}),
        ("attention,up_proj", {"query_proj", "key_proj", "value_proj", "output_proj", "up_proj"}),
    ],
)
def test_layers_are_chosen_by_kind_or_by_name(targets, names, random_model):
    layers = target_layers(random_model("modern"), targets)
    assert {name.rpartition(".")[2] for name in layers} == names
    assert len(layers) == 2 * len(names)  # in both layers of the model


def test_one_layer_can_be_named_exactly(random_model):
    assert list(target_layers(random_model("gpt2"), "layers.1.attention.query_proj")) == [
        "layers.1.attention.query_proj"
    ]


@pytest.mark.parametrize("tied", [True, False])
def test_the_embedding_and_the_output_head(tied, random_model):
    """Tied they are one matrix W + s · B A, with one adapter; else each has its own. Merging adds it once."""
    base, ids = random_model("modern", tie_embeddings=tied), random_ids(2, 12)
    model = adapted(base, LoRAOptions(lora_rank=3, lora_alpha=2.0, lora_targets="embedding"))
    embedding, head = lora_layers(model).values()
    assert isinstance(embedding, LoRAEmbedding)
    assert len([p for p in model.parameters() if p.requires_grad]) == (2 if tied else 4)
    expected, by_hand = model(ids)["logits"], copy.deepcopy(base)
    with torch.no_grad():
        for ours, layer in {by_hand.token_embedding: embedding, by_hand.lm_head: head}.items():
            ours.weight = nn.Parameter(layer.base.weight + 2.0 / 3 * layer.lora_B @ layer.lora_A)
    assert tied == torch.equal(by_hand.token_embedding.weight, by_hand.lm_head.weight)
    torch.testing.assert_close(by_hand(ids)["logits"], expected, atol=2e-5, rtol=2e-5)
    assert (expected - base(ids)["logits"]).abs().max() > 0.1
    with adapters_disabled(model):
        assert torch.equal(model(ids)["logits"], base(ids)["logits"])
    for _ in range(2):
        merge_lora(model)
        merge_lora(model)
        torch.testing.assert_close(model(ids)["logits"], expected, atol=2e-5, rtol=2e-5)
        unmerge_lora(model)
        assert torch.equal(model(ids)["logits"], expected)
    backbone = RewardModel(copy.deepcopy(base)).backbone  # has no output head any more
    attach_lora(backbone, LoRAOptions(lora_rank=3, lora_targets="all,embedding"))
    assert isinstance(backbone.token_embedding, LoRAEmbedding)
    assert isinstance(backbone.lm_head, nn.Identity)


def test_a_head_with_an_adapter_needs_not_all_logits_at_once(random_model, monkeypatch):
    """The same loss and gradients in chunks of 5 tokens, as on a GPU, as from all logits."""
    usual = gpt_model.loss_of_any_head
    monkeypatch.setattr(gpt_model, "loss_of_any_head", lambda *args: usual(*args, 64 * 5))
    ids, found = random_ids(3, 12), []
    for keeps_logits in (True, False):
        model = adapted(random_model("modern"), LoRAOptions(lora_rank=3, lora_targets="all,embedding")).train()
        model.keeps_logits = keeps_logits
        output = model(ids, labels=ids.masked_fill(ids % 5 == 0, -100))
        assert (output["logits"] is None) != keeps_logits
        output["loss"].backward()
        found.append([output["loss"], *(p.grad for p in model.parameters() if p.requires_grad)])
    torch.testing.assert_close(found[0], found[1])


@pytest.mark.parametrize("targets", ["", "query", "lm_head", "attention,", "all,nothing"])
def test_a_name_that_is_no_layer_is_refused(targets, random_model):
    with pytest.raises(UserError, match="no linear layer of the model; give attention, mlp, all, embedding, or some"):
        target_layers(random_model("gpt2"), targets)


def test_settings_that_make_no_sense_are_refused():
    with pytest.raises(UserError) as error:
        parse_config(
            LoRAOptions,
            ["--lora_rank", "-1", "--lora_alpha", "0", "--lora_lr_scale", "nan", "--lora_dropout", "1"],
            description="",
        )
    for name in ("rank", "alpha", "lr_scale", "dropout"):
        assert f"--lora_{name} must be" in str(error.value)


def test_adapters_are_not_put_upon_adapters(random_model):
    model = adapted(random_model())
    with pytest.raises(ValueError, match="adapters already"):
        apply_lora(model, RANK_4, "base.pth")


# -- only adapters change ----------------------------------------------------------------------------------------------


def test_the_base_is_frozen_bit_for_bit_while_adapters_learn(architecture, random_model):
    base = random_model(architecture)
    before = {name: value.clone() for name, value in base.state_dict().items()}
    model = copy.deepcopy(base)
    apply_lora(model, RANK_4, "base.pth")
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert sum(p.numel() for p in trainable) == sum(value.numel() for value in lora_state(model).values())
    optimizer, ids = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1), random_ids(4, 12)
    losses = []
    for _ in range(20):
        loss = model(ids, labels=ids)["loss"]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    assert set(trained_state(model, model.state_dict())) == set(lora_state(model))
    detach_lora(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_adapters_have_adamw_without_decay_and_their_own_learning_rate(optimizer, random_model):
    """Beside them, a reward head keeps the rate and the decay of full training."""
    backbone = copy.deepcopy(random_model("modern"))
    apply_lora(backbone, LoRAOptions(lora_rank=4, lora_lr_scale=7.0), "base.pth")
    model = RewardModel(backbone)
    [adamw] = optimizers = build_optimizers(model, optimizer, lr=1e-3, weight_decay=0.1)
    assert isinstance(adamw, torch.optim.AdamW)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = {
        frozenset(names[id(parameter)].rpartition(".")[2] for parameter in group["params"]): group
        for group in adamw.param_groups
    }
    assert groups.keys() == {frozenset({"lora_A", "lora_B"}), frozenset({"weight"}), frozenset({"bias"})}
    adapters = groups[frozenset({"lora_A", "lora_B"})]
    assert len(adapters["params"]) == len(lora_state(model))
    assert (adapters["weight_decay"], groups[frozenset({"weight"})]["weight_decay"]) == (0.0, 0.1)
    Updater(model, optimizers, torch.float32, torch.device("cpu")).step(lr=1e-3)
    assert [groups[key]["lr"] for key in groups] == pytest.approx([1e-3, 1e-3, 7e-3])


def test_rank_zero_is_full_training(random_model):
    model = random_model()
    apply_lora(model, LoRAOptions(), "base.pth")
    assert not lora_layers(model)
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert lora_settings(model) is None
    assert trained_state(model, model.state_dict()).keys() == model.state_dict().keys()


def test_what_a_larger_module_brings_along_trains_beside_the_adapters(random_model):
    """A reward model over an adapted backbone: its score head is neither frozen nor forgotten."""
    backbone = copy.deepcopy(random_model("modern"))
    apply_lora(backbone, RANK_4, base="sft.pth")
    model = RewardModel(backbone)
    trained = set(trained_state(model, model.state_dict()))
    assert trained == set(lora_state(model)) | {"reward_head.weight", "reward_head.bias"}
    assert lora_settings(model) == {**vars(RANK_4), "base": "sft.pth"}


# -- off, merged, detached ---------------------------------------------------------------------------------------------


def test_disabled_adapters_leave_the_base(architecture, random_model):
    """The reference of PPO and DPO is the policy without adapters; they are back afterwards, even after an error."""
    base, ids = random_model(architecture), random_ids(2, 12)
    model = adapted(base)
    with_adapters = model(ids)["logits"]
    with adapters_disabled(model):
        assert torch.equal(model(ids)["logits"], base(ids)["logits"])
    assert torch.equal(model(ids)["logits"], with_adapters)
    with pytest.raises(KeyError), adapters_disabled(model):
        raise KeyError
    assert torch.equal(model(ids)["logits"], with_adapters)
    assert (with_adapters - base(ids)["logits"]).abs().max() > 0.1


@pytest.mark.parametrize("rslora", [False, True])
def test_merged_equals_unmerged_and_unmerging_is_exact(architecture, random_model, rslora):
    base, ids = random_model(architecture), random_ids(2, 12)
    model = adapted(base, LoRAOptions(lora_rank=3, lora_alpha=2.0, lora_rslora=rslora))
    expected = model(ids)["logits"]
    for _ in range(2):
        merge_lora(model)
        merge_lora(model)  # merging what is merged adds nothing
        torch.testing.assert_close(model(ids)["logits"], expected, atol=2e-5, rtol=2e-5)
        with pytest.raises(ValueError, match="unmerge_lora first"), adapters_disabled(model):
            pass
        unmerge_lora(model)
        assert torch.equal(model(ids)["logits"], expected)
    detach_lora(model)
    state = model.state_dict()
    assert all(torch.equal(state[name], value) for name, value in base.state_dict().items())


def test_merged_and_detached_it_is_a_plain_model(random_model):
    """The same modules and names as before, and the adapted model's logits."""
    base, ids = random_model("modern"), random_ids(2, 12)
    model = adapted(base)
    expected = model(ids)["logits"]
    merge_lora(model)
    detach_lora(model)
    assert model.state_dict().keys() == base.state_dict().keys()
    assert model.lm_head.weight is model.token_embedding.weight
    torch.testing.assert_close(model(ids)["logits"], expected, atol=2e-5, rtol=2e-5)


def test_adapters_work_beside_int8_weights(random_model):
    """Beside a quantized base they add what they add beside the original; merged they cannot be."""
    base, ids = random_model("modern"), random_ids(2, 12)
    full = adapted(base)
    quantized = quantize_model_int8(base)
    attach_lora(quantized, RANK_4)
    quantized.load_state_dict(lora_state(full), strict=False)
    with torch.no_grad():
        expected, logits = full(ids)["logits"], quantized(ids)["logits"]
        assert (logits - expected).norm() < 0.05 * expected.norm()
        with adapters_disabled(quantized):
            assert (quantized(ids)["logits"] - expected).norm() > 0.2 * expected.norm()
    with pytest.raises(UserError, match="cannot be merged into a quantized model"):
        merge_lora(quantized)


# -- frozen weights of 8 bits ------------------------------------------------------------------------------------------

INT8 = LoRAOptions(lora_rank=4, frozen_weights="int8")


def rounded(model):
    """A copy in full precision of the model that adapters beside frozen INT8 weights see."""
    model = copy.deepcopy(model)
    round_to_int8(model)
    return model


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_gradients_beside_int8_are_those_beside_the_rounded_model(architecture, precision, random_model):
    """Of every adapter, and the logits; nothing else gets any."""
    base, ids, results = random_model(architecture), random_ids(2, 12), []
    for model in (adapted(base, INT8), adapted(rounded(base))):
        with autocast(torch.device("cpu"), precision):
            output = model(ids, labels=ids)
        output["loss"].backward()
        with_gradient = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        assert with_gradient.keys() == lora_state(model).keys()
        results.append({"logits": output["logits"].detach(), **with_gradient})
    near = dict(atol=1e-5, rtol=1e-5) if precision == torch.float32 else dict(atol=0.05, rtol=0.05)
    torch.testing.assert_close(*results, **near)


def test_frozen_int8_takes_a_quarter_and_no_expanded_copy_is_kept(random_model):
    """Not for the backward pass either: what autograd keeps of a layer are the integers, the scales and its input."""
    base = random_model("modern", d_model=64, vocab_size=72)
    model = copy.deepcopy(base)
    apply_lora(model, INT8, "base.pth")
    before = sum(layer.weight.nbytes for layer in target_layers(base, "all").values())
    held = [layer.base for layer in lora_layers(model).values()]
    assert sum(p.nbytes for layer in held for p in layer.parameters()) < 0.3 * before
    weights, kept = {layer.weight.shape for layer in held}, []

    def keep(tensor):
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = model(random_ids(2, 12), labels=random_ids(2, 12))["loss"]
    of_layers = [tensor for tensor in kept if {tensor.shape, tensor.shape[::-1]} & weights]
    assert len(of_layers) == len(held) - 3, "all but the first three, before which nothing learns"
    assert {tensor.dtype for tensor in of_layers} == {torch.int8}
    loss.backward()


def test_adapters_learn_beside_int8(random_model):
    """As well as beside full precision, and layers without adapters are held in INT8, too."""
    ends = []
    for options in (RANK_4, INT8):
        model, ids = copy.deepcopy(random_model("modern")), random_ids(4, 12)
        torch.manual_seed(0)
        apply_lora(model, dataclasses.replace(options, lora_targets="attention"), "base.pth")
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        for _ in range(20):
            loss = model(ids, labels=ids)["loss"]
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        ends.append(loss.item())
    assert all(isinstance(layer.feed_forward.up_proj, Int8Linear) for layer in model.layers)
    assert ends[1] == pytest.approx(ends[0], rel=0.03)


def test_frozen_weights_without_adapters_are_refused():
    with pytest.raises(UserError, match="--frozen_weights int8 is for LoRA; give --lora_rank, such as 16"):
        parse_config(LoRAOptions, ["--frozen_weights", "int8"], description="")
