"""One optimiser step: groups, AdamW, Muon, schedules, accumulation, clipping and the skipping of non-finite steps."""

import itertools
import math
import os

import pytest
import torch
import torch.nn as nn

from byte_level_bpe import IGNORED_LABEL
from command_line import UserError
from machine import autocast, resolve_device, resolve_precision
from training.optimization import (
    SCHEDULES,
    Muon,
    Updater,
    build_optimizers,
    learning_rate_factor,
    newton_schulz,
    parameter_groups,
)

CPU = torch.device("cpu")


def random_ids(*shape, seed=0):
    return torch.randint(2, 64, shape, generator=torch.Generator().manual_seed(seed))


# ------------------------------------------------------------------------------------------------------------- groups


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("frozen", [(), ("embedding",), ("norm", "bias"), ("layers.0",)])
def test_each_trainable_parameter_is_in_exactly_one_group(architecture, tied, optimizer, frozen, random_model):
    """Of the groups and of the optimisers made from them; frozen parameters are in none."""
    model = random_model(architecture, tie_embeddings=tied)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not any(part in name for part in frozen))
    trainable = sorted(id(p) for p in model.parameters() if p.requires_grad)
    groups = parameter_groups(model, optimizer)
    assert sorted(id(p) for group in groups.values() for p in group) == trainable
    optimizers = build_optimizers(model, optimizer)
    optimised = [p for o in optimizers for group in o.param_groups for p in group["params"]]
    assert sorted(map(id, optimised)) == trainable


@pytest.mark.parametrize("tied", [True, False])
def test_what_is_decayed_and_what_is_orthogonalised(architecture, tied, random_model):
    """Vectors are not decayed; Muon takes the matrices inside the layers, never an embedding or the head."""
    model = random_model(architecture, tie_embeddings=tied)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = {key: {names[id(p)] for p in group} for key, group in parameter_groups(model, "muon").items()}
    assert groups["no_decay"] == {name for name, p in model.named_parameters() if p.ndim == 1}
    assert groups["muon"] == {name for name, p in model.named_parameters() if p.ndim == 2 and "layers." in name}
    assert "token_embedding.weight" in groups["decay"]
    assert ("lm_head.weight" in groups["decay"]) == (not tied)
    adamw = build_optimizers(model, "adamw", weight_decay=0.3)[0]
    for group in adamw.param_groups:
        assert all((p.ndim == 1) == (group["weight_decay"] == 0.0) for p in group["params"])


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("only", ["matrices of layers", "vectors"])
def test_a_model_that_is_mostly_frozen_still_has_its_optimisers(optimizer, only, random_model):
    """As when adapters alone are trained: no optimiser is left without parameters, none is missing."""
    model = random_model("gpt2")
    for name, p in model.named_parameters():
        p.requires_grad_((p.ndim == 1) if only == "vectors" else (p.ndim == 2 and "layers." in name))
    optimizers = build_optimizers(model, optimizer)
    model(random_ids(2, 8), labels=random_ids(2, 8))["loss"].backward()
    before = [p.clone() for p in model.parameters()]
    for each in optimizers:
        each.step()
    for p, old in zip(model.parameters(), before, strict=True):
        assert torch.equal(p, old) != p.requires_grad


# -------------------------------------------------------------------------------------------------------------- AdamW


def test_adamw_steps_equal_those_of_torch(architecture, random_model):
    """Ten steps of the fused optimiser against PyTorch's plain one with the decay groups written out."""
    ours, theirs = random_model(architecture), random_model(architecture)
    [fused] = build_optimizers(ours, "adamw", lr=3e-3, weight_decay=0.2, betas=(0.8, 0.9))
    plain = torch.optim.AdamW(
        [
            {"params": [p for p in theirs.parameters() if p.ndim > 1], "weight_decay": 0.2},
            {"params": [p for p in theirs.parameters() if p.ndim == 1], "weight_decay": 0.0},
        ],
        lr=3e-3,
        betas=(0.8, 0.9),
        eps=1e-8,
        foreach=False,
        fused=False,
    )
    generator = torch.Generator().manual_seed(0)
    for _ in range(10):
        for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
            p.grad = torch.randn(p.shape, generator=generator)
            q.grad = p.grad.clone()
        fused.step()
        plain.step()
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p, q, atol=1e-6, rtol=1e-5)


def test_adamw_by_hand(random_model):
    """Two steps of Loshchilov & Hutter's algorithm 2 on one matrix, written out."""
    model = random_model("gpt2")
    [optimizer] = build_optimizers(model, "adamw", lr=0.01, weight_decay=0.1, betas=(0.9, 0.95))
    weight = model.layers[0].feed_forward.up_proj.weight
    expected, first, second = weight.detach().double(), 0.0, 0.0
    for step in (1, 2):
        gradient = torch.randn(weight.shape, generator=torch.Generator().manual_seed(step))
        weight.grad = gradient.clone()
        optimizer.step()
        gradient = gradient.double()
        first, second = 0.9 * first + 0.1 * gradient, 0.95 * second + 0.05 * gradient**2
        unbiased, scale = first / (1 - 0.9**step), (second / (1 - 0.95**step)).sqrt() + 1e-8
        expected = expected - 0.01 * 0.1 * expected - 0.01 * unbiased / scale
    torch.testing.assert_close(weight.double(), expected, atol=1e-6, rtol=1e-6)


# --------------------------------------------------------------------------------------------------------------- Muon


@pytest.mark.parametrize("shape", [(32, 32), (16, 48), (48, 16), (3, 20, 32), (1, 7)])
def test_newton_schulz_brings_singular_values_near_1(shape):
    """And keeps the singular vectors: the result is close to U Vᵀ, tall, wide, square and in batches."""
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    result = newton_schulz(matrices)
    values = torch.linalg.svdvals(result)
    assert values.min() > 0.6
    assert values.max() < 1.25
    left, _, right = torch.linalg.svd(matrices, full_matrices=False)
    inside = left.mT @ result @ right.mT  # diagonal if the vectors are the same
    off_diagonal = inside - torch.diag_embed(inside.diagonal(dim1=-2, dim2=-1))
    assert off_diagonal.abs().max() < 1e-3


def test_newton_schulz_depends_neither_on_scale_nor_on_neighbours():
    matrices = torch.randn(3, 12, 20, generator=torch.Generator().manual_seed(0))
    together = newton_schulz(matrices)
    for matrix, result in zip(matrices, together, strict=True):
        torch.testing.assert_close(newton_schulz(1e4 * matrix), result, atol=1e-4, rtol=1e-3)
        torch.testing.assert_close(newton_schulz(matrix.mT).mT, result, atol=1e-4, rtol=1e-3)


def test_newton_schulz_of_a_zero_gradient_is_zero():
    assert newton_schulz(torch.zeros(4, 6)).eq(0).all()


def muon_by_hand(weight, gradients, lr, momentum, weight_decay):
    """Muon on one matrix as its author describes it, with Moonlight's scale, all in fp32."""
    buffer = torch.zeros_like(weight)
    for gradient in gradients:
        buffer = momentum * buffer + (1 - momentum) * gradient
        direction = momentum * buffer + (1 - momentum) * gradient  # Nesterov
        x = direction if direction.size(0) <= direction.size(1) else direction.T
        x = x / x.norm()
        for _ in range(5):
            a = x @ x.T
            x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
        x = x if direction.size(0) <= direction.size(1) else x.T
        weight = weight * (1 - lr * weight_decay) - lr * 0.2 * math.sqrt(max(weight.shape)) * x
    return weight


def matrices_and_gradients(shapes, n_steps):
    generator = torch.Generator().manual_seed(0)
    weights = [nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]
    gradients = [[torch.randn(shape, generator=generator) for shape in shapes] for _ in range(n_steps)]
    return weights, gradients


SHAPES = [(16, 16), (16, 40), (40, 16), (16, 40)]  # two of one shape: they are orthogonalised together


@pytest.mark.parametrize("n_bytes", [1 << 28, 0])
def test_muon_steps_equal_the_algorithm_in_fp32(n_bytes, monkeypatch):
    """However many matrices are orthogonalised together."""
    monkeypatch.setattr("training.optimization.MUON_BYTES", n_bytes)
    weights, gradients = matrices_and_gradients(SHAPES, n_steps=6)
    expected = [
        muon_by_hand(weight.detach().clone(), [step[i] for step in gradients], 0.02, 0.95, 0.1)
        for i, weight in enumerate(weights)
    ]
    optimizer = Muon(weights, lr=0.02, momentum=0.95, weight_decay=0.1)
    for step in gradients:
        for weight, gradient in zip(weights, step, strict=True):
            weight.grad = gradient.clone()
        optimizer.step()
    for weight, other in zip(weights, expected, strict=True):
        torch.testing.assert_close(weight.detach(), other, atol=2e-5, rtol=1e-4)


def test_muon_steps_equal_those_of_torch_up_to_its_bf16():
    """`torch.optim.Muon` iterates in bf16: its updates differ by the rounding, and by no more."""
    torch_muon = getattr(torch.optim, "Muon", None) or pytest.skip("this PyTorch has no Muon")
    ours, gradients = matrices_and_gradients(SHAPES, n_steps=6)
    theirs = [nn.Parameter(weight.detach().clone()) for weight in ours]
    before = [weight.detach().clone() for weight in ours]
    settings = dict(lr=0.02, momentum=0.95, weight_decay=0.1)
    optimizers = Muon(ours, **settings), torch_muon(theirs, adjust_lr_fn="match_rms_adamw", **settings)
    for step in gradients:
        for weights, optimizer in zip((ours, theirs), optimizers, strict=True):
            for weight, gradient in zip(weights, step, strict=True):
                weight.grad = gradient.clone()
            optimizer.step()
    for weight, other, old in zip(ours, theirs, before, strict=True):
        difference, moved = (weight - other).norm().item(), (weight - old).norm().item()
        assert difference < 0.03 * moved


def test_muon_takes_matrices_only_and_leaves_those_without_a_gradient():
    with pytest.raises(ValueError, match="matrices only"):
        Muon([nn.Parameter(torch.zeros(3))])
    first, second = nn.Parameter(torch.ones(4, 4)), nn.Parameter(torch.ones(4, 4))
    first.grad = torch.eye(4)
    Muon([first, second], lr=0.1).step()
    assert second.eq(1).all()
    assert not first.eq(1).all()


def test_muon_updates_have_adamws_size():
    """The root mean square of an update is about 0.2 · lr whatever the shape, so one learning rate serves both."""
    for shape in [(64, 64), (32, 256), (256, 32)]:
        weight = nn.Parameter(torch.zeros(shape))
        weight.grad = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        Muon([weight], lr=1.0, weight_decay=0.0).step()
        assert weight.pow(2).mean().sqrt().item() == pytest.approx(0.2, rel=0.15)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_small_model_learns_a_batch_by_heart(architecture, optimizer, random_model):
    """Learning, not only running: from worse than guessing to under 0.1 nats a token in 60 steps."""
    model = random_model(architecture).train()
    updater = Updater(model, build_optimizers(model, optimizer, lr=0.02, weight_decay=0.0), torch.float32, CPU)
    ids = random_ids(4, 16)
    for step in range(60):
        loss = model(ids, labels=ids)["loss"]
        updater.backward(loss)
        updater.step(0.02 * (1 - step / 60))
    assert loss.item() < 0.1


# ---------------------------------------------------------------------------------------------------------- schedules


POINTS = {  # of 100 steps, 10 of them warm-up, down to a tenth
    "cosine": {10: 1.0, 32.5: 0.1 + 0.9 * (1 + math.sqrt(0.5)) / 2, 55: 0.55, 100: 0.1, 150: 0.1},
    "wsd": {10: 1.0, 55: 1.0, 82: 1.0, 91: 0.55, 100: 0.1, 150: 0.1},
    "cosine_restarts": {10: 1.0, 25: 0.55, 39.999: 0.1, 40.001: 1.0, 55: 0.55, 85: 0.55, 100: 0.1, 150: 0.1},
    "constant": {10: 1.0, 55: 1.0, 100: 1.0, 150: 1.0},
    "noam": {9: 1.0, 39: 0.5, 89: 1 / 3},
}


@pytest.mark.parametrize(
    ("schedule", "step", "expected"), [(s, *point) for s in SCHEDULES for point in POINTS[s].items()]
)
def test_schedules_at_known_points(schedule, step, expected):
    assert learning_rate_factor(schedule, step, 100, 10) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("schedule", [name for name in SCHEDULES if name != "noam"])  # which has no end to fall to
@pytest.mark.parametrize(
    ("max_steps", "warmup", "floor"), [(100, 10, 0.1), (7, 0, 0.0), (1, 0, 0.1), (1000, 500, 0.3), (5, 5, 0.1)]
)
def test_schedules_warm_up_and_stay_in_their_range(schedule, max_steps, warmup, floor):
    """A straight line up to 1, never 0 in the first step, afterwards between the floor and 1."""
    factors = [learning_rate_factor(schedule, step, max_steps, warmup, floor) for step in range(max_steps + 1)]
    assert factors[:warmup] == pytest.approx([(step + 1) / warmup for step in range(warmup)])
    assert all(floor - 1e-9 <= factor <= 1 for factor in factors[warmup:])
    assert factors[0] > 0
    if max_steps > warmup:
        assert factors[warmup] == 1.0
        assert factors[-1] == pytest.approx(1.0 if schedule == "constant" else floor)
    if schedule in ("cosine", "wsd"):
        assert all(later <= earlier for earlier, later in itertools.pairwise(factors[warmup:]))


def test_restarts_restart():
    """Three falls and so two jumps back to the peak."""
    factors = [learning_rate_factor("cosine_restarts", step, 310, 10, 0.0, n_cycles=3) for step in range(310)]
    jumps = [step for step in range(11, 310) if factors[step] > factors[step - 1]]
    assert jumps == [110, 210]
    assert [factors[step] for step in jumps] == pytest.approx([1.0, 1.0])


@pytest.mark.parametrize(("first", "growth"), [(10, 1), (10, 2), (7, 3), (1, 1)])
def test_restarts_are_those_of_pytorch(first, growth):
    """T_0 and T_mult mean what they mean in torch.optim.lr_scheduler.CosineAnnealingWarmRestarts."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    theirs = torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(optimizer, first, growth, eta_min=0.1)
    for step in range(100):
        ours = learning_rate_factor("cosine_restarts", step, 100, 0, 0.1, first_cycle=first, growth=growth)
        assert ours == pytest.approx(theirs.get_last_lr()[0], abs=1e-9), step
        optimizer.step()
        theirs.step()


@pytest.mark.parametrize(("n_cycles", "growth"), [(1, 1.0), (3, 1.0), (3, 2.0), (4, 1.5), (7, 1.1)])
def test_cycles_that_grow_fill_the_run(n_cycles, growth):
    """As many as were asked for, each longer than the one before it, and the last one ends where the run does."""
    shape = (1010, 10, 0.0, n_cycles, 0, growth)
    factors = [learning_rate_factor("cosine_restarts", step, *shape) for step in range(1010)]
    jumps = [step for step in range(11, 1010) if factors[step] > factors[step - 1]]
    lengths = [later - earlier for earlier, later in itertools.pairwise([10, *jumps, 1010])]
    assert len(lengths) == n_cycles
    assert all(later == pytest.approx(earlier * growth, abs=2) for earlier, later in itertools.pairwise(lengths))
    assert factors[-1] < 0.01


# -------------------------------------------------------------------------------------------------------- the updater


def plain_updater(model, lr=0.1, **settings):
    """An updater around SGD, whose steps show the gradient as it is."""
    return Updater(model, [torch.optim.SGD(model.parameters(), lr=lr)], torch.float32, CPU, **settings)


def weights_of(model):
    return [p.detach().clone() for p in model.parameters()]


@pytest.mark.parametrize("pieces", [2, 3, 6])
def test_accumulated_pieces_are_one_big_batch(architecture, pieces, random_model):
    """Weighted by their labels, of which each piece has another number."""
    ids = random_ids(6, 12)
    labels = ids.clone()
    for row in range(6):
        labels[row, : 1 + row] = IGNORED_LABEL
    results = []
    for n in (1, pieces):
        model = random_model(architecture)
        updater = plain_updater(model)
        total = labels[:, 1:].ne(IGNORED_LABEL).sum()
        for some_ids, some_labels in zip(ids.chunk(n), labels.chunk(n), strict=True):
            loss = model(some_ids, labels=some_labels)["loss"]
            updater.backward(loss * some_labels[:, 1:].ne(IGNORED_LABEL).sum() / total)
        results.append((updater.step(0.1), weights_of(model)))
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-5)
    for whole, accumulated in zip(results[0][1], results[1][1], strict=True):
        torch.testing.assert_close(accumulated, whole, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(("max_norm", "moved"), [(0.5, 0.5), (1e9, 5.0), (0.0, 5.0)])
def test_gradients_are_clipped_to_a_global_norm(max_norm, moved):
    """3-4-5 over two parameters; the norm before clipping is returned; 0 turns clipping off."""
    model = nn.ParameterList([torch.zeros(1), torch.zeros(1)])
    updater = plain_updater(model, max_grad_norm=max_norm)
    updater.backward(3 * model[0].sum() + 4 * model[1].sum())
    assert updater.step(1.0) == pytest.approx(5.0)
    assert [p.item() for p in model] == pytest.approx([-0.6 * moved, -0.8 * moved], rel=1e-5)


def test_gradients_are_cleared_and_the_learning_rate_reaches_every_group(random_model):
    model = random_model("modern")
    optimizers = build_optimizers(model, "muon", lr=1.0)
    updater = Updater(model, optimizers, torch.float32, CPU)
    updater.backward(model(random_ids(2, 8), labels=random_ids(2, 8))["loss"])
    updater.step(0.0125)
    assert all(p.grad is None for p in model.parameters())
    assert {group["lr"] for optimizer in optimizers for group in optimizer.param_groups} == {0.0125}


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize(
    ("bad", "where"), [(math.nan, "gradient"), (math.inf, "gradient"), (math.nan, "loss"), (-math.inf, "loss")]
)
def test_a_step_that_is_not_finite_is_skipped(optimizer, bad, where, random_model):
    """Parameters and moments keep their values to the last bit, the skip is counted, the next step counts anew."""
    model = random_model("gpt2")
    updater = Updater(model, build_optimizers(model, optimizer), torch.float32, CPU)
    ids = random_ids(2, 8)

    def take_step(spoil):
        updater.backward(model(ids, labels=ids)["loss"])
        if spoil and where == "gradient":
            model.layers[1].attention.key_proj.weight.grad[3, 4] = bad
        updater.step(1e-3, bad if spoil and where == "loss" else 1.0)

    take_step(spoil=False)
    before = weights_of(model)
    moments = [torch.clone(v) for o in updater.optimizers for s in o.state.values() for v in s.values()]
    take_step(spoil=True)
    assert all(torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))
    now = [v for o in updater.optimizers for s in o.state.values() for v in s.values()]
    assert all(torch.equal(value, old) for value, old in zip(now, moments, strict=True))
    assert (updater.skipped, updater.skipped_in_a_row) == (1, 1)
    take_step(spoil=False)
    assert (updater.skipped, updater.skipped_in_a_row) == (1, 0)
    assert all(p.isfinite().all() for p in model.parameters())
    assert not torch.equal(model.token_embedding.weight, before[0])


def test_a_run_that_diverged_ends_with_advice():
    """After `max_skipped` in a row, not after as many in all."""
    model = nn.Linear(2, 1)
    updater = plain_updater(model, max_skipped=3)
    for bad in (True, True, False, True, True):
        updater.backward(model(torch.ones(1, 2)).sum() * (math.nan if bad else 1.0))
        updater.step(0.1)
    updater.backward(model(torch.ones(1, 2)).sum() * math.nan)
    with pytest.raises(UserError, match="3 steps in a row; lower --lr"):
        updater.step(0.1)
    assert updater.skipped == 5
    assert all(p.isfinite().all() for p in model.parameters())


def test_the_fp16_scaler_changes_no_step_and_survives_overflow(random_model):
    """Scaled and unscaled again, a step is the plain one; an overflow skips the step and halves the scale."""
    ids, results = random_ids(2, 8), []
    for precision in (torch.float32, torch.float16):
        model = random_model("gpt2")
        updater = Updater(model, [torch.optim.SGD(model.parameters(), lr=0.1)], precision, CPU)
        updater.backward(model(ids, labels=ids)["loss"])
        results.append((updater.step(0.1), weights_of(model)))
    assert results[1][0] == pytest.approx(results[0][0], rel=1e-5)
    for scaled, plain in zip(results[1][1], results[0][1], strict=True):
        torch.testing.assert_close(scaled, plain, atol=1e-6, rtol=1e-5)

    scale, before = updater.scaler.get_scale(), weights_of(model)
    updater.backward(model(ids, labels=ids)["loss"] * 1e38)
    updater.step(0.1)
    assert updater.skipped == 1
    assert updater.scaler.get_scale() == scale / 2
    assert all(torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))


def test_an_updater_takes_up_its_state():
    model = nn.Linear(2, 1)
    updaters = [
        Updater(model, [torch.optim.SGD(model.parameters(), lr=0.1)], torch.float16, CPU, max_skipped=3)
        for _ in range(2)
    ]
    updaters[0].backward(model(torch.ones(1, 2)).sum() * math.nan)
    updaters[0].step(0.1)
    updaters[1].load_state_dict(updaters[0].state_dict())
    assert updaters[1].state_dict() == updaters[0].state_dict()
    assert (updaters[1].skipped, updaters[1].skipped_in_a_row) == (1, 1)
    assert updaters[1].scaler.get_scale() == 32768.0


# ------------------------------------------------------------------------------------------------ device and precision


@pytest.mark.parametrize(
    ("capability", "expected"),
    [((7, 0), torch.float16), ((7, 5), torch.float16), ((8, 0), torch.bfloat16), ((9, 0), torch.bfloat16)],
)
def test_a_gpu_computes_in_bf16_where_it_has_it(capability, expected, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    assert resolve_precision("auto", torch.device("cuda")) == expected


@pytest.mark.parametrize(("amx", "expected"), [(True, torch.bfloat16), (False, torch.float32)])
def test_a_cpu_computes_in_bf16_only_with_matrix_units(amx, expected, monkeypatch):
    monkeypatch.delenv("CPU_LEVEL", raising=False)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    assert resolve_precision("auto", CPU) == expected


def test_a_cpu_that_stands_in_for_a_lesser_one_has_no_matrix_units(native_level, monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    is_lesser = os.environ.get("CPU_LEVEL", "amx") != "amx"
    assert resolve_precision("auto", CPU) == (torch.float32 if is_lesser else torch.bfloat16)


def test_a_precision_that_was_asked_for_is_taken_or_refused():
    assert resolve_precision("bf16", CPU) == torch.bfloat16
    assert resolve_precision("fp32", torch.device("cuda")) == torch.float32
    assert resolve_precision("fp16", torch.device("cuda")) == torch.float16
    with pytest.raises(UserError, match="--precision fp16 needs a GPU; on a CPU use fp32 or bf16"):
        resolve_precision("fp16", CPU)


def test_autocast_lowers_products_and_keeps_parameters_and_loss(random_model):
    model, ids = random_model("modern"), random_ids(2, 8)
    with autocast(CPU, torch.bfloat16):
        output = model(ids, labels=ids)
    assert (output["logits"].dtype, output["loss"].dtype) == (torch.bfloat16, torch.float32)
    assert output["loss"].item() == pytest.approx(model(ids, labels=ids)["loss"].item(), rel=0.02)
    output["loss"].backward()
    assert all(p.grad.dtype == torch.float32 for p in model.parameters())
    with autocast(CPU, torch.float32):
        assert model(ids)["logits"].dtype == torch.float32


@pytest.mark.parametrize("name", ["cuda:97", "graphics card", ""])
def test_a_device_that_is_not_there_is_a_mistake_with_a_remedy(name):
    with pytest.raises(UserError, match="is not available here; use --device cpu or auto"):
        resolve_device(name)


def test_the_device_that_is_there():
    assert resolve_device("cpu") == CPU
    assert torch.ones(1, device=resolve_device("auto")).item() == 1
