"""The model computes the same whatever the padding, the batch or the cache; see also test_transformers_parity.py."""

import math

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

from gpt_model import IGNORED_LABEL, GPTConfig, GPTModel, next_token_loss, visible_keys
from inference.engine import Engine
from inference.sampling import SamplingParams
from transformer_components import POSITIONS, Positions, sinusoidal_positions

PAD = 1
CLOSE = dict(atol=2e-5, rtol=2e-5)


def random_ids(*shape, vocab_size=64, seed=0):
    """Token ids without the padding id."""
    return torch.randint(2, vocab_size, shape, generator=torch.Generator().manual_seed(seed))


# --------------------------------------------------------------------------------------------------------------- loss


def test_loss_of_three_tokens_by_hand(architecture, random_model):
    """Each token is predicted from those before it; the first has nothing before it and the last predicts nothing."""
    model = random_model(architecture)
    ids = torch.tensor([[5, 9, 33]])
    output = model(ids, labels=ids)
    logits = output["logits"][0].double()
    of_second = logits[0].exp().sum().log() - logits[0, 9]
    of_third = logits[1].exp().sum().log() - logits[1, 33]
    assert output["loss"].item() == pytest.approx(((of_second + of_third) / 2).item(), rel=1e-5)


def test_ignored_labels_count_for_nothing(architecture, random_model):
    """−100 takes a token out of the sum and out of the mean."""
    model = random_model(architecture)
    ids = random_ids(2, 8)
    labels = torch.full_like(ids, IGNORED_LABEL)
    labels[0, 3], labels[1, 6], labels[1, 0] = ids[0, 3], ids[1, 6], ids[1, 0]  # the last has nothing before it
    output = model(ids, labels=labels)
    log_probs = output["logits"].log_softmax(dim=-1)
    expected = -(log_probs[0, 2, ids[0, 3]] + log_probs[1, 5, ids[1, 6]]) / 2
    torch.testing.assert_close(output["loss"], expected, **CLOSE)


@pytest.mark.parametrize("length", [1, 6])
def test_a_batch_without_any_label_has_loss_0_and_finite_gradients(architecture, length, random_model):
    model = random_model(architecture)
    ids = random_ids(2, length)
    loss = model(ids, labels=torch.full_like(ids, IGNORED_LABEL))["loss"]
    loss.backward()
    assert loss.item() == 0
    assert all(p.grad.eq(0).all() for p in model.parameters() if p.grad is not None)


def test_a_fresh_model_knows_nothing(architecture):
    """Its loss is that of guessing, ln V: the initialisation neither prefers tokens nor is out of scale."""
    torch.manual_seed(0)
    model = GPTModel.from_config(
        GPTConfig.for_architecture(architecture, vocab_size=500, d_model=64, n_layers=4, n_heads=4)
    )
    ids = random_ids(8, 64, vocab_size=500)
    assert model(ids, labels=ids)["loss"].item() == pytest.approx(math.log(500), abs=0.15)


def test_loss_is_computed_in_fp32_from_bf16_logits():
    logits, labels = torch.randn(2, 5, 50, generator=torch.Generator().manual_seed(0)).bfloat16(), random_ids(2, 5)
    labels = labels.clamp(max=49)
    expected = F.cross_entropy(logits[:, :-1].float().flatten(0, 1), labels[:, 1:].flatten())
    assert next_token_loss(logits, labels).item() == pytest.approx(expected.item(), rel=1e-6)


# -------------------------------------------------------------------------------------- causality, padding, the cache


ARCHITECTURES = [("gpt2", {}), ("modern", {}), ("gpt2", {"position": "sinusoidal"}), ("modern", {"n_kv_heads": 4}),
                 ("moe", {})]  # fmt: skip
IDS = ["gpt2", "modern", "sinusoidal", "mha", "moe"]
every_kind = pytest.mark.parametrize(("kind", "switches"), ARCHITECTURES, ids=IDS)


@every_kind
@torch.no_grad()
def test_a_later_token_never_changes_earlier_logits(kind, switches, random_model):
    model = random_model(kind, **switches)
    ids = random_ids(2, 12)
    before = model(ids)["logits"]
    for changed_at in (1, 6, 11):
        other = ids.clone()
        other[:, changed_at:] = random_ids(2, 12 - changed_at, seed=5)
        after = model(other)["logits"]
        torch.testing.assert_close(after[:, :changed_at], before[:, :changed_at], **CLOSE)
        assert not torch.allclose(after[:, changed_at:], before[:, changed_at:], atol=1e-2)


@every_kind
@pytest.mark.parametrize("chunks", [[1] * 24, [24], [10] + [1] * 14, [7, 1, 9, 7], [1, 22, 1]])
@torch.no_grad()
def test_cached_equals_uncached(kind, switches, chunks, random_model):
    """Token by token, in chunks and mixed. Regression of trap 9: positions went back to 0 for every new token, and the
    causal mask hid the history."""
    model = random_model(kind, **switches)
    ids = random_ids(2, 24)
    cache = model.new_cache(2, 24)
    cache.keys.fill_(math.nan)  # whatever stands in cells that were not written yet is never read
    cache.values.fill_(math.nan)
    parts = [model(part, cache=cache)["logits"] for part in ids.split(chunks, dim=1)]
    torch.testing.assert_close(torch.cat(parts, dim=1), model(ids)["logits"], **CLOSE)
    assert cache.length == 24


@every_kind
@pytest.mark.parametrize("chunks", [[1] * 14, [9, 1, 4], [5, 5, 4]])
@torch.no_grad()
def test_a_left_padded_batch_with_a_cache_equals_each_row_alone(kind, switches, chunks, random_model):
    """Rows of 14, 9 and 1 tokens side by side: padding takes no position and is not looked at, at any step."""
    model = random_model(kind, **switches)
    rows = [random_ids(1, n, seed=n) for n in (14, 9, 1)]
    ids = torch.cat([F.pad(row, (14 - row.size(1), 0), value=PAD) for row in rows])
    mask = torch.cat([F.pad(torch.ones_like(row), (14 - row.size(1), 0)) for row in rows])
    cache, done, parts = model.new_cache(3, 14), 0, []
    for part in ids.split(chunks, dim=1):
        done += part.size(1)
        parts.append(model(part, attention_mask=mask[:, :done], cache=cache)["logits"])
    together = torch.cat(parts, dim=1)
    for row, logits in zip(rows, together, strict=True):
        torch.testing.assert_close(logits[14 - row.size(1) :], model(row)["logits"][0], **CLOSE)


@every_kind
@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_padding_on_either_side_changes_nothing(kind, switches, side, random_model):
    """Neither its amount nor which ids stand in it."""
    model = random_model(kind, **switches)
    ids = random_ids(2, 9)
    alone = model(ids, labels=ids)
    for n_padding, filler in ((1, PAD), (6, 40)):
        padding = (n_padding, 0) if side == "left" else (0, n_padding)
        mask = F.pad(torch.ones_like(ids), padding)
        labels = F.pad(ids, padding, value=IGNORED_LABEL)
        if side == "left":
            labels[:, n_padding] = IGNORED_LABEL  # otherwise the first token would be predicted from padding
        padded = model(F.pad(ids, padding, value=filler), attention_mask=mask, labels=labels)
        torch.testing.assert_close(padded["logits"][mask.bool()], alone["logits"].flatten(0, 1), **CLOSE)
        torch.testing.assert_close(padded["loss"], alone["loss"], **CLOSE)


@torch.no_grad()
def test_a_mask_may_be_of_any_kind_of_number(architecture, random_model):
    model = random_model(architecture)
    ids, mask = random_ids(2, 9), torch.ones(2, 9, dtype=torch.int64)
    mask[1, :4] = 0
    expected = model(ids, attention_mask=mask)["logits"]
    for dtype in (torch.bool, torch.float32, torch.bfloat16):
        assert torch.equal(model(ids, attention_mask=mask.to(dtype))["logits"], expected)


@pytest.mark.parametrize("past", [0, 3])
def test_every_token_sees_itself_the_past_and_no_padding(past):
    """At least itself, padding too: some attention kernels answer an empty row of the mask with NaN."""
    real = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0], [0, 0, 0, 0, 0, 0]])
    visible = visible_keys(6 - past, past, real, real.device)
    for row in range(3):
        for query in range(past, 6):
            expected = [key == query or (key < query and bool(real[row, key])) for key in range(6)]
            assert visible[row, 0, query - past].tolist() == expected


def test_a_row_of_nothing_but_padding_leaks_no_nan(architecture, random_model):
    """Its logits are finite, the other rows' logits and all gradients are what they are without it."""
    model = random_model(architecture)
    ids = random_ids(1, 7)
    model(ids, labels=ids)["loss"].backward()
    alone = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    both = torch.cat([ids, torch.full_like(ids, PAD)])
    mask = torch.tensor([[1], [0]]).expand(2, 7)
    output = model(both, attention_mask=mask, labels=both.masked_fill(mask == 0, IGNORED_LABEL))
    output["loss"].backward()
    assert output["logits"].isfinite().all()
    torch.testing.assert_close(output["logits"][:1], model(ids)["logits"], **CLOSE)
    for parameter, expected in zip(model.parameters(), alone, strict=True):
        torch.testing.assert_close(parameter.grad, expected, atol=1e-5, rtol=1e-4)


def test_too_many_tokens_are_refused_by_number(architecture, random_model):
    model = random_model(architecture)
    model(random_ids(1, 32))
    with pytest.raises(ValueError, match="33 tokens do not fit into max_seq_len 32"):
        model(random_ids(1, 33))
    cache = model.new_cache(1, 64)
    model(random_ids(1, 30), cache=cache)
    with pytest.raises(ValueError, match="33 tokens do not fit into max_seq_len 32"):
        model(random_ids(1, 3), cache=cache)


# --------------------------------------------------------------------------------------------------------- generation


@torch.no_grad()
def greedy_without_cache(model, ids, n_tokens, eos_token_id=None):
    """The plainest loop: the whole text through the model for every new token."""
    ids = list(ids)
    for _ in range(n_tokens):
        ids.append(model(torch.tensor([ids]))["logits"][0, -1].argmax().item())
        if ids[-1] == eos_token_id:
            break
    return ids


def test_greedy_generation_equals_the_plainest_loop(architecture, random_model):
    model = random_model(architecture)
    produced = set()
    for seed in range(4):
        prompt = random_ids(1, 6, seed=seed)
        expected = greedy_without_cache(model, prompt[0].tolist(), 20)
        assert model.generate(prompt, max_gen_len=20, temperature=0)[0].tolist() == expected
        produced.update(expected[6:])
    assert len(produced) > 10  # not one token over and over, which would hide mistakes


def test_a_batch_generates_what_each_row_generates_alone(architecture, random_model):
    """Regression of trap 3 (a batch of one only). Left-padded prompts, and rows that end at different times."""
    model = random_model(architecture, max_seq_len=64)
    rows = [random_ids(n, seed=n).tolist() for n in (3, 11, 7, 1, 9)]
    free = [greedy_without_cache(model, row, 24)[len(row) :] for row in rows]
    # The token whose first appearances lie furthest apart serves as </s>, so that the rows end at different steps
    ends = {token: [row.index(token) if token in row else 24 for row in free] for token in set(sum(free, []))}
    eos = max(ends, key=lambda token: len(set(ends[token])))
    assert len(set(ends[eos])) >= 3

    batch = torch.tensor([[PAD] * (11 - len(row)) + row for row in rows])
    output = model.generate(batch, max_gen_len=24, temperature=0, eos_token_id=eos)
    for row, produced in zip(rows, output[:, 11:].tolist(), strict=True):
        alone = greedy_without_cache(model, row, 24, eos)[len(row) :]
        assert produced == alone + [PAD] * (len(produced) - len(alone))


def test_generation_stops_when_every_row_has_ended(architecture, random_model):
    """No step is spent on rows that are done: the output ends with the longest answer."""
    model = random_model(architecture)
    prompt = random_ids(1, 4)
    answer = model.generate(prompt, max_gen_len=20, temperature=0)[0, 4:].tolist()
    eos = answer[5]
    stopped = model.generate(prompt, max_gen_len=20, temperature=0, eos_token_id=eos)[0, 4:].tolist()
    assert stopped == answer[: answer.index(eos) + 1]


@pytest.mark.parametrize(
    ("prompt_len", "max_gen_len", "expected"), [(5, 0, 5), (5, 3, 8), (20, 100, 32), (31, 9, 32), (32, 9, 32)]
)
def test_generation_respects_both_limits(architecture, prompt_len, max_gen_len, expected, random_model):
    """Never more than max_gen_len new tokens, never more than max_seq_len in all; the prompt comes back unchanged."""
    model = random_model(architecture)
    prompt = random_ids(2, prompt_len)
    output = model.generate(prompt, max_gen_len=max_gen_len, temperature=0)
    assert output.shape == (2, expected)
    assert torch.equal(output[:, :prompt_len], prompt)


def test_padding_uses_up_no_context(architecture, random_model):
    """A short prompt in a batch that is padded beyond max_seq_len still has its whole context."""
    model = random_model(architecture)
    prompt = random_ids(1, 4)
    padded = F.pad(prompt, (40, 0), value=PAD)
    output = model.generate(padded, max_gen_len=100, temperature=0)
    assert output[0, 40:].tolist() == greedy_without_cache(model, prompt[0].tolist(), 28)


@pytest.mark.parametrize("length", [0, 33])
def test_a_prompt_that_cannot_be_continued_is_refused(architecture, length, random_model):
    with pytest.raises(ValueError, match="a prompt must have 1 to 32 tokens"):
        random_model(architecture).generate(random_ids(1, length))


def test_top_k_1_is_greedy(architecture, random_model):
    model = random_model(architecture)
    prompt = random_ids(3, 5)
    greedy = model.generate(prompt, max_gen_len=15, temperature=0)
    assert torch.equal(model.generate(prompt, max_gen_len=15, top_k=1), greedy)
    assert torch.equal(model.generate(prompt, max_gen_len=15, temperature=1e-4), greedy)


def test_a_seeded_generator_repeats_its_sample(architecture, random_model):
    model = random_model(architecture)
    prompt = random_ids(3, 5)

    def sample(seed):
        return model.generate(prompt, max_gen_len=15, top_k=20, generator=torch.Generator().manual_seed(seed))

    assert torch.equal(sample(1), sample(1))
    assert not torch.equal(sample(1), sample(2))


def test_generation_leaves_the_model_as_it_was(architecture, random_model):
    """In training mode it generates without dropout and returns to training, and no gradient is recorded."""
    model = random_model(architecture, dropout=0.5)
    prompt = random_ids(2, 5)
    expected = model.generate(prompt, max_gen_len=10, temperature=0)
    model.train()
    assert torch.equal(model.generate(prompt, max_gen_len=10, temperature=0), expected)
    assert model.training
    with pytest.raises(ValueError, match="a prompt must have"):
        model.generate(random_ids(1, 99))
    assert model.training
    model.eval()


# ----------------------------------------------------------------------------- training, initialisation, configuration


def test_sinusoidal_model_is_the_learned_one_with_the_papers_table(random_model):
    fixed = random_model("gpt2", position="sinusoidal")
    learned = random_model("gpt2")
    learned.load_state_dict(
        {**fixed.state_dict(), "position_embedding.weight": sinusoidal_positions(32, 32)}, strict=True
    )
    ids = random_ids(2, 32)
    torch.testing.assert_close(fixed(ids)["logits"], learned(ids)["logits"])


LAYER = {  # its parts in the order of their weights, by which checkpoints and other programs know them
    "gpt2": "attention_norm attention.query_proj attention.key_proj attention.value_proj attention.output_proj "
    "feed_forward_norm feed_forward.up_proj feed_forward.down_proj",
    "modern": "attention_norm attention.query_proj attention.key_proj attention.value_proj attention.output_proj "
    "attention.query_norm attention.key_norm feed_forward_norm feed_forward.up_proj feed_forward.gate_proj "
    "feed_forward.down_proj",
}


@pytest.mark.parametrize("position", POSITIONS)
def test_names_and_order_of_weights_are_those_of_all_checkpoints(architecture, position, random_model):
    """Tables are computed, not stored; learned positions stand behind the tokens, in both architectures."""
    model = random_model(architecture, n_layers=1, position=position)
    parts = [f"layers.0.{part}" for part in LAYER[architecture].split()] + ["final_norm"]
    kinds = ("weight", "bias") if architecture == "gpt2" else ("weight",)
    expected = ["token_embedding.weight", *(["position_embedding.weight"] if position == "learned" else [])]
    expected += [f"{part}.{kind}" for part in parts for kind in kinds]
    assert list(model.state_dict()) == [*expected, "lm_head.weight"]
    assert [name for name, _ in model.named_parameters()] == expected  # the head is tied


@pytest.mark.parametrize("position", POSITIONS)
def test_a_model_without_memory_has_its_tables_all_the_same(position, random_model):
    """As it is made to be filled from a file."""
    model = random_model("modern", position=position)
    with torch.device("meta"):
        empty = GPTModel.from_config(model.config)
    empty.load_state_dict(model.state_dict(), assign=True)
    ids = random_ids(2, 16)
    assert torch.equal(empty(ids)["logits"], model(ids)["logits"])


def test_a_kind_of_positions_is_one_class(monkeypatch, random_model):
    """Added from outside, it trains, generates with a cache and left padding, and is served."""

    class Scaled(Positions):
        def __init__(self, config):
            super().__init__()
            self.scale = nn.Parameter(torch.linspace(0.5, 1.5, config.max_seq_len))

        def add_to(self, x, here):
            return x * self.scale[here].unsqueeze(-1)

    monkeypatch.setitem(POSITIONS, "scaled", Scaled)
    model = random_model("gpt2", position="scaled")
    assert list(model.state_dict())[1] == "position_embedding.scale"
    ids = random_ids(1, 6)
    model(ids, labels=ids)["loss"].backward()
    assert model.position_embedding.scale.grad[:5].abs().min() > 0  # the last token predicts nothing
    padded = torch.cat((torch.full((1, 3), PAD), ids), dim=1)
    texts = [model.generate(prompt, 8, temperature=0)[:, prompt.size(1) :] for prompt in (ids, padded)]
    assert torch.equal(*texts)
    (answer,) = Engine(model, None).run([ids[0].tolist()], SamplingParams(8, temperature=0))
    assert answer.token_ids == texts[0][0].tolist()


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_recomputing_activations_gives_identical_gradients(architecture, dropout, random_model):
    """Bit for bit, and with the same dropout in the second forward pass; with a padding mask as well."""
    model = random_model(architecture, dropout=dropout, seed=1).train()
    ids, mask = random_ids(2, 16), torch.ones(2, 16, dtype=torch.int64)
    mask[0, :4] = 0
    gradients, passes = [], []
    model.layers[0].register_forward_pre_hook(lambda layer, x: passes.append(recompute))
    for recompute in (False, True):
        model.recompute_activations = recompute
        model.zero_grad()
        torch.manual_seed(7)
        model(ids, attention_mask=mask, labels=ids)["loss"].backward()
        gradients.append([p.grad for p in model.parameters()])
    assert all(torch.equal(first, second) for first, second in zip(*gradients, strict=True))
    assert passes == [False, True, True]  # the second forward pass of a layer is what saves its memory


def test_recomputing_leaves_a_cache_alone(architecture, random_model):
    model = random_model(architecture).train()
    ids = random_ids(1, 8)
    model.recompute_activations = True
    with torch.no_grad():
        cache = model.new_cache(1, 8)
        parts = [model(part, cache=cache)["logits"] for part in ids.split(4, dim=1)]
        torch.testing.assert_close(torch.cat(parts, dim=1), model(ids)["logits"], **CLOSE)


def test_initialisation_is_gpt2s(architecture):
    """N(0, 0.02²); what writes into the residual stream is smaller by √(2 · layers); biases are 0, norms are 1."""
    torch.manual_seed(0)
    model = GPTModel.from_config(
        GPTConfig.for_architecture(architecture, vocab_size=300, d_model=128, n_layers=8, n_heads=4, max_seq_len=64)
    )
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            expected = 0.0 if name.endswith("bias") else 1.0
            assert parameter.eq(expected).all(), name
        else:
            into_residual = name.endswith(("output_proj.weight", "down_proj.weight"))
            assert parameter.std().item() == pytest.approx(0.02 / (4 if into_residual else 1), rel=0.05), name


def test_tied_weights_are_one_and_count_once():
    """GPT-2's smallest size has the 124,439,808 parameters that its paper's authors released."""
    with torch.device("meta"):
        gpt2 = GPTModel(50257)
        untied = GPTModel(50257, tie_embeddings=False)
    assert gpt2.lm_head.weight is gpt2.token_embedding.weight
    assert gpt2.num_parameters() == 124_439_808
    assert untied.num_parameters() == 124_439_808 + 50257 * 768


def test_the_positional_arguments_of_the_public_constructor():
    """GPTModel(vocab_size, d_model, n_layers, n_heads, d_ff, max_seq_len, dropout, pad_token_id)."""
    config = GPTModel(100, 16, 1, 2, 40, 12, 0.1, 3).config
    assert (config.vocab_size, config.d_model, config.n_layers, config.n_heads) == (100, 16, 1, 2)
    assert (config.d_ff, config.max_seq_len, config.dropout, config.pad_token_id) == (40, 12, 0.1, 3)


def test_feed_forward_width_follows_from_the_architecture():
    assert GPTConfig.for_architecture("gpt2", vocab_size=10, d_model=768).d_ff == 3072
    assert GPTConfig.for_architecture("modern", vocab_size=10, d_model=768).d_ff == 2048
    assert GPTConfig.for_architecture("modern", vocab_size=10, d_model=100, n_heads=10).d_ff == 288  # 266.7 → 9 · 32


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        (dict(d_model=30, n_heads=4), "d_model 30 must be a multiple of n_heads 4"),
        (dict(n_heads=4, n_kv_heads=3), "n_heads 4 must be a multiple of n_kv_heads 3"),
        (dict(position="rotary", head_dim=7), "rotary positions need an even head_dim, not 7"),
        (dict(dropout=1.0), "dropout must be at least 0 and below 1, not 1.0"),
        (dict(pad_token_id=64), "pad_token_id 64 is outside the vocabulary of 64"),
        (dict(norm="batchnorm"), "norm must be one of layernorm, rmsnorm, not 'batchnorm'"),
        (dict(n_layers=0), "n_layers must be at least 1"),
        (dict(n_heads=0), "n_heads must be at least 1"),
        (dict(d_model=-8), "d_model must be at least 1"),
    ],
)
def test_a_wrong_configuration_says_what_is_wrong(settings, complaint):
    with pytest.raises(ValueError, match=complaint):
        GPTConfig(**{**dict(vocab_size=64, d_model=32, n_layers=2, n_heads=4, max_seq_len=32), **settings})


def test_every_mistake_of_a_configuration_is_named_at_once():
    with pytest.raises(ValueError, match="n_layers .*; dropout .*; activation "):
        GPTConfig(64, d_model=32, n_layers=0, n_heads=4, dropout=-1, activation="relu")
    with pytest.raises(ValueError, match="even head_dim, not 7; .*n_kv_heads 3; pad_token_id 99"):
        GPTConfig(64, d_model=28, n_heads=4, n_kv_heads=3, pad_token_id=99, position="rotary")
