"""Log-probabilities: those of the plain computation, gradients included, without its memory."""

import math

import pytest
import torch

from alignment.log_probabilities import token_log_probs


def padded_batch(side, vocab_size=64):
    """Three rows of 9, 5 and 2 tokens, padded to 11 on the left or right, or on both sides."""
    torch.manual_seed(0)
    ids, mask = torch.full((3, 11), 1), torch.zeros(3, 11, dtype=torch.long)
    for row, n in enumerate((9, 5, 2)):
        start = {"left": 11 - n, "right": 0, "both": 1}[side]
        ids[row, start : start + n] = torch.randint(4, vocab_size, (n,))
        mask[row, start : start + n] = 1
    return ids, mask


def plain(model, ids, mask, temperature):
    """All logits at once: (B, T − 1) log-probabilities and entropies, 0 where a token or its predecessor is padding."""
    log_probs = (model(ids, mask)["logits"][:, :-1] / temperature).log_softmax(-1)
    real = mask[:, 1:] * mask[:, :-1]
    entropy = torch.distributions.Categorical(logits=log_probs.detach()).entropy()
    return log_probs.gather(2, ids[:, 1:, None]).squeeze(2) * real, entropy * real


@pytest.mark.parametrize("side", ["left", "right", "both"])
@pytest.mark.parametrize("chunk_size", [0, 1, 4])
def test_values_and_gradients_are_those_of_the_plain_computation(random_model, architecture, side, chunk_size):
    """Whatever the chunks and the padding; so are the entropies."""
    model, (ids, mask) = random_model(architecture), padded_batch(side)
    weights = torch.randn(3, 10)
    expected, entropy = plain(model, ids, mask, 0.7)
    (expected * weights).sum().backward()
    gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    got, got_entropy = token_log_probs(model, ids, mask, temperature=0.7, with_entropy=True, chunk_size=chunk_size)
    (got * weights).sum().backward()
    assert torch.allclose(got, expected, atol=1e-5)
    assert torch.allclose(got_entropy, entropy, atol=1e-5)
    assert not got_entropy.requires_grad
    for name, parameter in model.named_parameters():
        assert torch.allclose(parameter.grad, gradients[name], atol=1e-4), name


def test_only_what_is_asked_for_is_returned(random_model):
    """`first` leaves the prompt out; without padding no mask is needed; without being asked there is no entropy."""
    model, ids = random_model("gpt2"), torch.randint(4, 64, (2, 8))
    whole, entropy = token_log_probs(model, ids)
    answer, _ = token_log_probs(model, ids, torch.ones_like(ids), first=5)
    assert entropy is None
    assert whole.shape == (2, 7)
    assert torch.allclose(answer, whole[:, 4:], atol=1e-6)


def test_entropies_lie_between_nothing_and_the_vocabularys(random_model):
    """A high temperature makes all tokens alike: ln V nats."""
    model, ids = random_model("gpt2"), torch.randint(4, 64, (2, 8))
    _, hot = token_log_probs(model, ids, temperature=1e4, with_entropy=True)
    _, cold = token_log_probs(model, ids, temperature=1e-5, with_entropy=True)
    assert torch.allclose(hot, torch.full_like(hot, math.log(64)), atol=1e-3)
    assert cold.abs().max() < 0.1


def test_a_batch_without_a_single_token_gives_zeros(random_model):
    log_probs, entropy = token_log_probs(
        random_model("gpt2"), torch.ones(2, 4, dtype=torch.long), torch.zeros(2, 4, dtype=torch.long), with_entropy=True
    )
    assert log_probs.tolist() == entropy.tolist() == [[0.0] * 3] * 2


def memory_of(compute):
    """Elements that autograd keeps for the backward pass in all, and those of the largest tensor ever made."""
    kept = {}

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        largest = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            outputs = result if isinstance(result, tuple | list) else (result,)
            self.largest = max([self.largest, *(x.numel() for x in outputs if torch.is_tensor(x))])
            return result

    def keep(tensor):
        kept[tensor.data_ptr()] = tensor
        return tensor

    with Watch() as watch:
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = compute()
        in_all = sum(tensor.numel() for tensor in kept.values())
        loss.backward()
    return in_all, watch.largest


def test_no_tensor_of_the_size_of_all_logits_is_ever_kept_or_made(random_model):
    """With a vocabulary that dwarfs the model, the plain way keeps (B, T, V); this way not even all chunks together."""
    model = random_model("gpt2", vocab_size=4000, d_model=8, max_seq_len=64)
    ids = torch.randint(4, 4000, (16, 64))
    n_logits, chunk_size = 16 * 63 * 4000, 50
    kept, _ = memory_of(lambda: -plain(model, ids, torch.ones_like(ids), 1.0)[0].sum())
    assert kept > n_logits
    kept, largest = memory_of(lambda: -token_log_probs(model, ids, with_entropy=True, chunk_size=chunk_size)[0].sum())
    assert kept < n_logits / 4
    assert largest < n_logits / 10
