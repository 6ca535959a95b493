"""The model's two presets are GPT-2 and Qwen3 as `transformers` implements them: the same weights, the same numbers."""

import pytest
import torch

from alignment.transformers_names import architecture_of, in_transformers
from command_line import UserError
from gpt_model import IGNORED_LABEL

PAD = 1
CLOSE = dict(atol=2e-5, rtol=2e-5)


@pytest.fixture(autouse=True)
def transformers():
    """Not imported before it is needed: it changes `nn.Module`, which the compiled step notices."""
    return pytest.importorskip("transformers")


def random_ids(*shape, seed=0):
    """Token ids without the padding id."""
    return torch.randint(2, 64, shape, generator=torch.Generator().manual_seed(seed))


def test_a_model_that_transformers_does_not_have_is_refused(random_model):
    with pytest.raises(UserError, match="transformers has no such model; it has .* gpt2, modern, llama, qwen2 and moe"):
        architecture_of(random_model("gpt2", position="sinusoidal").config)


@pytest.mark.parametrize("tied", [True, False])
def test_logits_and_loss_equal_those_of_transformers(architecture, tied, random_model):
    model = random_model(architecture, tie_embeddings=tied)
    theirs = in_transformers(model)
    ids = random_ids(3, 20)
    labels = ids.masked_fill(torch.rand(ids.shape, generator=torch.Generator().manual_seed(1)) < 0.4, IGNORED_LABEL)
    with torch.no_grad():
        expected = theirs(ids, labels=labels)
        output = model(ids, labels=labels)
    assert expected.logits.std() > 0.5  # the weights are large enough for a difference to show
    torch.testing.assert_close(output["logits"], expected.logits, **CLOSE)
    torch.testing.assert_close(output["loss"], expected.loss, **CLOSE)


@pytest.mark.parametrize(
    "switches",
    [
        dict(n_kv_heads=1),
        dict(n_kv_heads=4),
        dict(head_dim=16),
        dict(head_dim=6, n_kv_heads=2, rope_theta=1e6),
        dict(d_ff=40),
    ],
)
def test_every_shape_of_grouped_attention_equals_qwen3(switches, random_model):
    model = random_model("modern", **switches)
    ids = random_ids(2, 16)
    with torch.no_grad():
        torch.testing.assert_close(model(ids)["logits"], in_transformers(model)(ids).logits, **CLOSE)


def test_left_padded_logits_equal_those_of_transformers(architecture, random_model):
    model = random_model(architecture)
    ids, mask = random_ids(2, 12), torch.ones(2, 12, dtype=torch.int64)
    ids[0, :5], mask[0, :5] = PAD, 0
    positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
    with torch.no_grad():
        expected = in_transformers(model)(ids, attention_mask=mask, position_ids=positions).logits
        logits = model(ids, attention_mask=mask)["logits"]
    torch.testing.assert_close(logits[mask.bool()], expected[mask.bool()], **CLOSE)


def test_gradients_equal_those_of_transformers(architecture, random_model):
    """The backward pass as well: the gradient of the (tied) embedding gathers every path through the model."""
    model = random_model(architecture)
    theirs = in_transformers(model)
    ids = random_ids(2, 12)
    model(ids, labels=ids)["loss"].backward()
    theirs(ids, labels=ids).loss.backward()
    expected = theirs.get_input_embeddings().weight.grad
    torch.testing.assert_close(model.token_embedding.weight.grad, expected, atol=1e-5, rtol=1e-4)


def test_greedy_generation_equals_that_of_transformers(architecture, random_model):
    model = random_model(architecture)
    prompt = random_ids(1, 5)
    settings = dict(max_new_tokens=20, do_sample=False, pad_token_id=PAD, eos_token_id=None)
    expected = in_transformers(model).generate(prompt, attention_mask=torch.ones_like(prompt), **settings)
    assert model.generate(prompt, max_gen_len=20, temperature=0).tolist() == expected.tolist()
