"""The parts of the Transformer compute their formulas, whoever else implements them."""

import math

import pytest
import torch
import torch.nn as nn

from transformer_components import (
    FeedForwardNetwork,
    KVCache,
    MultiHeadAttention,
    TransformerDecoderLayer,
    apply_rotary,
    make_norm,
    rotary_angles,
    sinusoidal_positions,
)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def attention_by_hand(module, x, visible):
    """softmax(q kᵀ / √K) v, one query of one head at a time; `visible(query, key)` says who may look at whom."""
    batch, n_tokens, _ = x.shape
    width = module.head_dim
    query, key, value = module.query_proj(x), module.key_proj(x), module.value_proj(x)
    n_heads, n_kv_heads = query.size(-1) // width, key.size(-1) // width
    result = torch.zeros(batch, n_tokens, n_heads * width)
    for b in range(batch):
        for head in range(n_heads):
            shared = head // (n_heads // n_kv_heads)  # the key/value head that this query head uses
            own, group = slice(head * width, (head + 1) * width), slice(shared * width, (shared + 1) * width)
            for t in range(n_tokens):
                seen = [s for s in range(n_tokens) if visible(t, s)]
                scores = torch.stack([query[b, t, own] @ key[b, s, group] / math.sqrt(width) for s in seen])
                weights = scores.softmax(dim=0)
                result[b, t, own] = sum(w * value[b, s, group] for w, s in zip(weights, seen, strict=True))
    return module.output_proj(result)


# ---------------------------------------------------------------------------------------------------------- attention


@pytest.mark.parametrize("n_kv_heads", [4, 2, 1])
@pytest.mark.parametrize("head_dim", [None, 12])
def test_attention_is_softmax_of_scaled_products_over_the_past(n_kv_heads, head_dim):
    """Full, grouped and single key/value heads, with a head width of its own or not, against plain loops."""
    module = MultiHeadAttention(32, 4, n_kv_heads=n_kv_heads, head_dim=head_dim).eval()
    x = torch.randn(2, 5, 32)
    by_hand = attention_by_hand(module, x, lambda query, key: key <= query)
    torch.testing.assert_close(module(x), by_hand, atol=1e-5, rtol=1e-5)


def test_attention_looks_only_where_the_mask_allows():
    module = MultiHeadAttention(32, 4, n_kv_heads=2).eval()
    x = torch.randn(2, 6, 32)
    mask = torch.rand(6, 6) < 0.5
    mask.fill_diagonal_(True)
    by_hand = attention_by_hand(module, x, lambda query, key: mask[query, key])
    torch.testing.assert_close(module(x, mask), by_hand, atol=1e-5, rtol=1e-5)


def test_attention_agrees_with_torchs_own_multi_head_attention():
    """An independent implementation with the same weights gives the same output."""
    ours, theirs = MultiHeadAttention(32, 4).eval(), nn.MultiheadAttention(32, 4, batch_first=True).eval()
    with torch.no_grad():
        projections = (ours.query_proj, ours.key_proj, ours.value_proj)
        theirs.in_proj_weight.copy_(torch.cat([p.weight for p in projections]))
        theirs.in_proj_bias.copy_(torch.cat([nn.init.normal_(p.bias) for p in projections]))
        theirs.out_proj.weight.copy_(ours.output_proj.weight)
        theirs.out_proj.bias.copy_(nn.init.normal_(ours.output_proj.bias))
    x = torch.randn(3, 7, 32)
    future = nn.Transformer.generate_square_subsequent_mask(7)
    expected, _ = theirs(x, x, x, attn_mask=future, is_causal=True, need_weights=False)
    torch.testing.assert_close(ours(x), expected, atol=1e-5, rtol=1e-5)


def test_a_later_token_never_changes_an_earlier_output():
    module = MultiHeadAttention(32, 4, n_kv_heads=2, qk_norm=True, bias=False).eval()
    x = torch.randn(1, 8, 32)
    changed = x.clone()
    changed[:, 5:] = torch.randn(1, 3, 32)
    difference = (module(x) - module(changed)).abs().amax(dim=-1)[0]
    assert difference[:5].max() == 0
    assert difference[5:].min() > 0


def test_qk_norm_makes_attention_independent_of_the_size_of_queries_and_keys():
    module = MultiHeadAttention(32, 4, bias=False, qk_norm=True, norm_eps=1e-12).eval()
    x = torch.randn(2, 6, 32)
    before = module(x)
    with torch.no_grad():
        module.query_proj.weight *= 50
        module.key_proj.weight *= 0.02
    torch.testing.assert_close(module(x), before, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(("n_heads", "n_kv_heads"), [(5, None), (4, 3)])
def test_heads_that_do_not_divide_are_refused_by_name(n_heads, n_kv_heads):
    with pytest.raises(ValueError, match="must be a multiple of"):
        MultiHeadAttention(32, n_heads, n_kv_heads=n_kv_heads)


def test_attention_weights_are_dropped_in_training_only():
    module = MultiHeadAttention(32, 4, dropout=0.5)
    x = torch.randn(2, 6, 32)
    module.train()
    assert not torch.equal(module(x), module(x))
    module.eval()
    assert torch.equal(module(x), module(x))


# ---------------------------------------------------------------------------------------------------------- positions


@pytest.mark.parametrize("d_model", [8, 7])
def test_sinusoidal_positions_follow_the_papers_formula(d_model):
    """PE(p, 2i) = sin(p / 10000^(2i/d)), PE(p, 2i+1) = cos of the same, of any width."""
    table = sinusoidal_positions(40, d_model)
    for position in (0, 1, 17, 39):
        for column in range(d_model):
            angle = position / 10000 ** (2 * (column // 2) / d_model)
            expected = math.sin(angle) if column % 2 == 0 else math.cos(angle)
            assert table[position, column].item() == pytest.approx(expected, abs=1e-5)


def test_rotary_turns_each_pair_like_a_complex_number():
    """Component i and component i + K/2 are one complex number, multiplied with exp(i · position · θ^(−2i/K))."""
    width, length, theta = 8, 12, 500.0
    x = torch.randn(2, 3, length, width)
    rotated = apply_rotary(x, rotary_angles(length, width, theta))
    number = torch.complex(x[..., : width // 2], x[..., width // 2 :])
    frequency = theta ** (-torch.arange(width // 2) * 2 / width)
    turn = torch.exp(1j * torch.arange(length)[:, None] * frequency)
    expected = torch.cat(((number * turn).real, (number * turn).imag), dim=-1)
    torch.testing.assert_close(rotated, expected, atol=1e-5, rtol=1e-5)


def test_rotary_products_depend_on_the_distance_alone():
    table = rotary_angles(64, 16, 10000.0)
    query, key = torch.randn(16), torch.randn(16)

    def product(query_position, key_position):
        return apply_rotary(query, table[:, query_position]) @ apply_rotary(key, table[:, key_position])

    torch.testing.assert_close(product(9, 4), product(60, 55), atol=1e-4, rtol=1e-4)
    assert abs(product(9, 4) - product(9, 5)) > 1e-3


def test_rotary_takes_positions_of_its_own_for_each_row():
    table = rotary_angles(16, 8, 10000.0)
    x = torch.randn(2, 3, 4, 8)
    positions = torch.tensor([[0, 1, 2, 3], [7, 8, 9, 10]])
    together = apply_rotary(x, table[:, positions].unsqueeze(2))
    for row in range(2):
        torch.testing.assert_close(together[row], apply_rotary(x[row], table[:, positions[row]]))


# ----------------------------------------------------------------------------------------- norms, feed-forward, layer


@pytest.mark.parametrize("kind", ["layernorm", "rmsnorm"])
def test_norms_by_hand(kind):
    norm, x = make_norm(kind, 16, 1e-5), torch.randn(3, 16) * 4 + 2
    nn.init.normal_(norm.weight)
    centred = x - x.mean(dim=-1, keepdim=True) if kind == "layernorm" else x
    expected = centred / (centred.pow(2).mean(dim=-1, keepdim=True) + 1e-5).sqrt() * norm.weight
    torch.testing.assert_close(norm(x), expected, atol=1e-5, rtol=1e-5)


def test_gelu_network_by_hand():
    """Two layers around GPT-2's tanh approximation of GELU."""
    module, x = FeedForwardNetwork(8, 24), torch.randn(2, 3, 8)
    inner = x @ module.up_proj.weight.T + module.up_proj.bias
    gelu = 0.5 * inner * (1 + torch.tanh(math.sqrt(2 / math.pi) * (inner + 0.044715 * inner**3)))
    expected = gelu @ module.down_proj.weight.T + module.down_proj.bias
    torch.testing.assert_close(module(x), expected, atol=1e-6, rtol=1e-5)


def test_swiglu_network_by_hand():
    """down(silu(gate(x)) · up(x))."""
    module, x = FeedForwardNetwork(8, 24, activation="swiglu", bias=False), torch.randn(2, 3, 8)
    gate = x @ module.gate_proj.weight.T
    expected = (gate * torch.sigmoid(gate) * (x @ module.up_proj.weight.T)) @ module.down_proj.weight.T
    torch.testing.assert_close(module(x), expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(("norm", "activation"), [("layernorm", "gelu"), ("rmsnorm", "swiglu")])
def test_decoder_layer_adds_two_normed_branches_to_its_input(norm, activation):
    layer = TransformerDecoderLayer(16, 4, 32, norm=norm, activation=activation).eval()
    x = torch.randn(2, 5, 16)
    middle = x + layer.attention(layer.attention_norm(x))
    torch.testing.assert_close(layer(x), middle + layer.feed_forward(layer.feed_forward_norm(middle)))
    for branch in (layer.attention.output_proj, layer.feed_forward.down_proj):
        nn.init.zeros_(branch.weight)
        nn.init.zeros_(branch.bias)
    assert torch.equal(layer(x), x)  # the residual stream itself passes untouched


# -------------------------------------------------------------------------------------------------------------- cache


def test_cache_gives_back_everything_so_far_and_layers_do_not_mix():
    """Regression of trap 9, where one closure tied the cache of every layer to the last one."""
    cache = KVCache(n_layers=3, batch_size=2, n_kv_heads=1, max_len=6, head_dim=4)
    chunks = [torch.randn(3, 2, 2, 1, n, 4) for n in (3, 1, 2)]  # (layer, key or value, B, G, T, K)
    for number, chunk in enumerate(chunks, start=1):
        for layer in range(3):
            keys, values = cache.append(layer, chunk[layer, 0], chunk[layer, 1])
            so_far = torch.cat([earlier[layer] for earlier in chunks[:number]], dim=-2)
            assert torch.equal(keys, so_far[0])
            assert torch.equal(values, so_far[1])
        cache.advance(chunk.size(-2))
    assert cache.length == 6


def test_a_full_cache_says_so():
    cache = KVCache(1, 1, 1, 4, 8)
    cache.append(0, torch.ones(1, 1, 4, 8), torch.ones(1, 1, 4, 8))
    cache.advance(4)
    with pytest.raises(ValueError, match="the cache holds 4 positions, 5 are needed"):
        cache.append(0, torch.ones(1, 1, 1, 8), torch.ones(1, 1, 1, 8))


@pytest.mark.parametrize("rows", [torch.tensor([True, False, True]), torch.tensor([0, 2])])
def test_rows_that_ended_leave_the_cache(rows):
    cache = KVCache(2, 3, 1, 4, 8)
    cache.append(1, torch.arange(3.0).view(3, 1, 1, 1).expand(3, 1, 2, 8), torch.zeros(3, 1, 2, 8))
    cache.keep_rows(rows)
    assert cache.keys.shape == cache.values.shape == (2, 2, 1, 4, 8)
    assert cache.keys[1, :, 0, 0, 0].tolist() == [0.0, 2.0]


def test_memory_that_was_never_written_is_finite():
    """NaN in a masked cell leaks through a softmax: 0 · NaN is NaN."""
    cache = KVCache(2, 3, 1, 64, 8)
    assert cache.keys.eq(0).all()
    assert cache.values.eq(0).all()


@pytest.mark.parametrize("qk_norm", [False, True])
def test_attention_with_a_cache_equals_attention_over_the_whole(qk_norm):
    module = MultiHeadAttention(32, 4, n_kv_heads=2, qk_norm=qk_norm).eval()
    x, rotary = torch.randn(2, 7, 32), rotary_angles(7, 8, 10000.0)
    cache = KVCache(1, 2, 2, 7, 8)
    parts = []
    for t in range(7):
        parts.append(module(x[:, t : t + 1], rotary=rotary[:, t : t + 1], cache=cache))
        cache.advance(1)
    torch.testing.assert_close(torch.cat(parts, dim=1), module(x, rotary=rotary), atol=1e-5, rtol=1e-5)
