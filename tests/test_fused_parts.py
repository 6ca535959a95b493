"""What training computes by C code on a CPU is what PyTorch computes, gradients included; the rest stays PyTorch's."""

import pytest
import torch

import transformer_components
from gpt_model import GPTModel, loss_in_chunks, next_token_loss
from machine.native_code import load_native, why_not
from training.fused_parts import SOURCE, fused_parts
from transformer_components import GPTConfig, PartKernels, rotary_angles

pytestmark = [
    pytest.mark.skipif(load_native(SOURCE) is None, reason=f"not compiled: {why_not(SOURCE)}"),
    pytest.mark.usefixtures("native_level"),
]


def results(compute, *inputs):
    """The output and the gradients of all inputs, for a fixed gradient of the output."""
    inputs = [tensor.detach().clone().requires_grad_(tensor.is_floating_point()) for tensor in inputs]
    output = compute(*inputs)
    of_output = torch.randn(output.shape, generator=torch.Generator().manual_seed(1))
    return output, *torch.autograd.grad(output, [x for x in inputs if x.requires_grad], of_output)


def assert_same(name, *inputs, rtol=2e-6, atol=2e-6):
    """The compiled part gives PyTorch's results, and did so itself."""
    expected = results(lambda *given: getattr(PartKernels(), name)(*given), *inputs)
    with fused_parts():
        got = results(lambda *given: getattr(transformer_components.kernels, name)(*given), *inputs)
    assert got[0].grad_fn is not None
    for ours, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=rtol, atol=atol)


@pytest.mark.parametrize("shape", [(2, 5, 64), (1, 3, 7), (3, 1, 33), (64, 16, 48)])
def test_swiglu(shape):
    """Also where the numbers do not fill whole vectors, and where gates are so large that exponentials overflow."""
    torch.manual_seed(0)
    gate, up = torch.randn(shape), torch.randn(shape)
    gate.view(-1)[:4] = torch.tensor([-1e4, 1e4, -95.0, 95.0])
    assert_same("swiglu", gate, up)


@pytest.mark.parametrize("shape", [(2, 5, 64), (1, 3, 7), (40, 48), (3, 7, 2, 17)])
def test_rms_norm(shape):
    torch.manual_seed(0)
    compute = lambda x, weight: transformer_components.kernels.rms_norm(x, weight, 1e-6)  # noqa: E731
    inputs = 3 * torch.randn(shape), torch.randn(shape[-1])
    expected = results(compute, *inputs)
    with fused_parts():
        got = results(compute, *inputs)
        assert "_RMSNorm" in type(got[0].grad_fn).__name__
    for ours, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=5e-6, atol=5e-6)


@pytest.mark.parametrize("own_positions", [False, True])
def test_rotation_of_heads(own_positions):
    """Of heads as attention has them, a transposed view; positions that all rows share, or each its own."""
    torch.manual_seed(0)
    x = torch.randn(3, 6, 4, 10).transpose(1, 2)  # (B, heads, T, K)
    angles = rotary_angles(20, 10, 1e4)  # (2, 20, K)
    # (2, B, 1, T, K), or (2, T, K), which is no contiguous memory
    rotary = angles[:, torch.randint(20, (3, 6))].unsqueeze(2) if own_positions else angles[:, 4:10]
    expected = results(lambda x: PartKernels().rotate(x, rotary), x)
    with fused_parts():
        got = results(lambda x: transformer_components.kernels.rotate(x, rotary), x)
    for ours, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("n_heads", "n_kv_heads"), [(4, 4), (6, 2), (3, 1)])
@pytest.mark.parametrize(("length", "width"), [(1, 16), (6, 48), (37, 32), (128, 16), (65, 80)])
def test_causal_attention(length, width, n_heads, n_kv_heads):
    """Of heads as attention has them, transposed views, with lengths that fill neither tiles nor vectors."""
    torch.manual_seed(0)
    sizes = ((2, length, heads, width) for heads in (n_heads, n_kv_heads, n_kv_heads))
    query, key, value = (torch.randn(size).transpose(1, 2) for size in sizes)  # (B, heads, T, K)
    assert_same("causal_attention", query, key, value, rtol=1e-5, atol=1e-5)
    query[0, 0, -1] *= 100  # weights of 0 and 1; the gradients of keys are as large as this query
    assert_same("causal_attention", query, key, value, rtol=1e-4, atol=1e-3)
    with fused_parts():
        weighed = results(transformer_components.kernels.causal_attention, query, key, value)[0]
    assert weighed.transpose(1, 2).is_contiguous()  # so that the output layer need not copy it


@pytest.mark.parametrize("change", ["long", "narrow", "masked heads", "past"])
def test_attention_that_it_does_not_know_is_pytorchs(change):
    """Longer texts, heads that do not fill vectors, copies of views, and queries with a past."""
    length, width = 513 if change == "long" else 20, 12 if change == "narrow" else 16
    query, key, value = torch.randn(3, 1, 2, length, width)
    if change != "masked heads":
        query, key, value = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (query, key, value))
    if change == "past":
        query = query[:, :, -5:].transpose(1, 2).contiguous().transpose(1, 2)
    with fused_parts():
        got = transformer_components.kernels.causal_attention(query, key, value)
    assert torch.equal(got, PartKernels().causal_attention(query, key, value))


def test_attention_passes_on_what_is_not_finite():
    """So that a step with it is skipped; other heads are not touched."""
    torch.manual_seed(0)
    query, key, value = torch.randn(3, 1, 20, 2, 16).transpose(2, 3)
    for tensor, number in ((query, torch.nan), (key, torch.nan), (value, torch.nan), (value, torch.inf)):
        changed = tensor.clone(memory_format=torch.preserve_format)
        changed[0, 0, 11, 3] = number
        inputs = [changed if x is tensor else x for x in (query, key, value)]
        with fused_parts():
            got = transformer_components.kernels.causal_attention(*inputs)
        assert not got[0, 0, 11:].isfinite().all()
        assert got[0, 1].isfinite().all()


@pytest.mark.parametrize(("vocab_size", "at_once"), [(50, 0), (16, 64), (7, 7), (1000, 5000)])
def test_cross_entropy_in_chunks(vocab_size, at_once):
    """The loss and its gradients are those of PyTorch's cross-entropy, ignored labels and extreme logits included."""
    torch.manual_seed(0)
    hidden, weight = 6 * torch.randn(2, 9, 12), 3 * torch.randn(vocab_size, 12)
    labels = torch.randint(vocab_size, (2, 9))
    labels[0, 3:6] = -100
    hidden, weight = hidden.requires_grad_(), weight.requires_grad_()
    expected = next_token_loss(hidden @ weight.T, labels)
    of_expected = torch.autograd.grad(expected, (hidden, weight))
    with fused_parts():
        loss = loss_in_chunks(hidden, weight, labels, at_once)
        of_loss = torch.autograd.grad(loss, (hidden, weight))
    torch.testing.assert_close(loss, expected, rtol=2e-6, atol=1e-6)
    for ours, theirs in zip(of_loss, of_expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("architecture", ["gpt2", "modern", "moe"])
def test_a_model_has_the_loss_and_the_gradients_of_pytorch(architecture):
    """Within 1e-6 of the largest of each, of whole models; and the compiled parts were asked."""
    torch.manual_seed(0)
    config = GPTConfig.for_architecture(
        architecture, vocab_size=100, d_model=48, n_layers=2, n_heads=4, n_kv_heads=2, max_seq_len=32
    )
    model = GPTModel.from_config(config).train()
    model.keeps_logits = False
    batch = {"input_ids": (ids := torch.randint(100, (3, 24))), "labels": ids}

    def of_a_step():
        model.zero_grad()
        loss = model(**batch)["loss"]
        loss.backward()
        return {"loss": loss.detach(), **{name: parameter.grad.clone() for name, parameter in model.named_parameters()}}

    expected = of_a_step()
    with fused_parts():
        got = of_a_step()
    for name, theirs in expected.items():
        torch.testing.assert_close(got[name], theirs, rtol=0, atol=1e-6 * max(1.0, float(theirs.abs().max())), msg=name)


def test_the_number_of_threads_changes_nothing():
    """Sums over rows are made in fixed parts."""
    x, weight = torch.randn(200, 32, requires_grad=True), torch.randn(32, requires_grad=True)
    before, gradients = torch.get_num_threads(), []
    try:
        for n_threads in (1, 2, 3):
            torch.set_num_threads(n_threads)
            with fused_parts():
                normed = transformer_components.kernels.rms_norm(x, weight, 1e-6)
                heads = normed.view(2, 50, 2, 32).transpose(1, 2)
                attended = transformer_components.kernels.causal_attention(heads, heads[:, :1], heads[:, 1:])
                attended = attended + transformer_components.kernels.causal_attention(heads, heads, heads)
                gradients.append(torch.autograd.grad(attended.square().sum(), (x, weight)))
    finally:
        torch.set_num_threads(before)
    for others in gradients[1:]:
        assert all(torch.equal(*pair) for pair in zip(others, gradients[0], strict=True))


@pytest.mark.parametrize("change", ["double", "half", "strided"])
def test_what_it_does_not_know_is_pytorchs(change):
    """Other types and layouts give exactly what they gave."""
    x, weight = torch.randn(4, 16), torch.randn(16)
    if change == "strided":
        x = torch.randn(16, 4).T
    else:
        x, weight = (tensor.to(getattr(torch, change)) for tensor in (x, weight))
    usual = PartKernels()
    with fused_parts():
        kernels = transformer_components.kernels
        assert torch.equal(kernels.rms_norm(x, weight, 1e-6), usual.rms_norm(x, weight, 1e-6))
        assert torch.equal(kernels.swiglu(x, x), usual.swiglu(x, x))


def test_outside_of_training_pytorch_computes():
    with fused_parts() as compiled:
        assert compiled and type(transformer_components.kernels) is not PartKernels
    assert type(transformer_components.kernels) is PartKernels
