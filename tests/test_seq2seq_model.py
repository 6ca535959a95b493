"""The encoder–decoder equals `torch.nn.Transformer`, and its batched search with caches one without either."""

from itertools import product
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from byte_level_bpe import IGNORED_LABEL
from inference.beam_search import BeamSettings, beam_search
from seq2seq_model import Attention, Seq2SeqConfig, Transformer

PAD, START, END = 1, 0, 2
SIZES = dict(src_vocab=23, tgt_vocab=19, d_model=24, num_heads=3, num_encoder_layers=2, num_decoder_layers=2, d_ff=40,
             max_seq_len=16)  # fmt: skip


def small_model(seed=0, **changes):
    torch.manual_seed(seed)
    model = Transformer(**{**SIZES, "dropout": 0.0, **changes}).eval()
    with torch.no_grad():  # biases and norms that are not what they begin with
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def random_batch(seed=0, sources=(7, 4, 1), targets=(5, 2, 6), tokens=(23, 19)):
    """Sources and targets of different lengths, padded on the right."""
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.stack([
            F.pad(torch.randint(3, n, (length,), generator=generator), (0, max(lengths) - length), value=PAD)
            for length in lengths
        ])
        for lengths, n in zip((sources, targets), tokens, strict=True)
    ]  # fmt: skip


def copied_to_torch(model):
    """`torch.nn.Transformer` with the same weights."""
    config = model.config
    activation = F.relu if config.activation == "relu" else lambda x: F.gelu(x, approximate="tanh")
    theirs = nn.Transformer(
        config.d_model, config.num_heads, config.num_encoder_layers, config.num_decoder_layers, config.d_ff, 0.0,
        activation, batch_first=True, norm_first=config.norm_first, layer_norm_eps=config.norm_eps,
    ).eval()  # fmt: skip

    def copy_attention(ours, other):
        projections = (ours.query_proj, ours.key_proj, ours.value_proj)
        other.in_proj_weight.copy_(torch.cat([part.weight for part in projections]))
        other.in_proj_bias.copy_(torch.cat([part.bias for part in projections]))
        other.out_proj.load_state_dict(ours.output_proj.state_dict())

    with torch.no_grad():
        for ours, other in zip(model.encoder, theirs.encoder.layers, strict=True):
            copy_attention(ours.attention, other.self_attn)
            norms = {"norm1": ours.attention_norm, "norm2": ours.feed_forward_norm}
            parts = {**norms, "linear1": ours.feed_forward.up_proj, "linear2": ours.feed_forward.down_proj}
            for name, part in parts.items():
                getattr(other, name).load_state_dict(part.state_dict())
        for ours, other in zip(model.decoder, theirs.decoder.layers, strict=True):
            copy_attention(ours.attention, other.self_attn)
            copy_attention(ours.cross_attention, other.multihead_attn)
            norms = {
                "norm1": ours.attention_norm, "norm2": ours.cross_attention_norm, "norm3": ours.feed_forward_norm,
            }  # fmt: skip
            parts = {**norms, "linear1": ours.feed_forward.up_proj, "linear2": ours.feed_forward.down_proj}
            for name, part in parts.items():
                getattr(other, name).load_state_dict(part.state_dict())
        theirs.encoder.norm.load_state_dict(model.encoder_norm.state_dict())
        theirs.decoder.norm.load_state_dict(model.decoder_norm.state_dict())
    return theirs


@pytest.mark.parametrize("position", ["sinusoidal", "learned"])
@pytest.mark.parametrize("activation", ["relu", "gelu"])
@pytest.mark.parametrize("norm_first", [True, False])
def test_outputs_and_gradients_are_those_of_torch(norm_first, activation, position):
    """Pre- and post-norm, both activations, with causal and padding masks; also what flows back into the embeddings."""
    model = small_model(norm_first=norm_first, activation=activation, position=position)
    theirs = copied_to_torch(model)
    src, tgt = random_batch()
    embedded = []
    for ids, table, positions in (
        (src, model.src_embedding, model.src_positions),
        (tgt, model.tgt_embedding, model.tgt_positions),
    ):
        scaled = table(ids) * SIZES["d_model"] ** 0.5
        embedded.append(positions.add_to(scaled, slice(0, ids.size(1))).detach().requires_grad_())
    causal = nn.Transformer.generate_square_subsequent_mask(tgt.size(1))
    hidden = theirs(
        *embedded, tgt_mask=causal, src_key_padding_mask=src == PAD, memory_key_padding_mask=src == PAD,
        tgt_is_causal=True,
    )  # fmt: skip
    expected = hidden @ model.tgt_embedding.weight.T
    logits = model(src, tgt)["logits"]
    real = tgt != PAD
    torch.testing.assert_close(logits[real], expected[real], atol=1e-5, rtol=1e-5)
    wanted = torch.randn(logits.shape, generator=torch.Generator().manual_seed(1))
    (logits * wanted)[real].sum().backward()
    (expected * wanted)[real].sum().backward()
    for ours, other in zip(model.decoder, theirs.decoder.layers, strict=True):
        pairs = [
            (ours.cross_attention.output_proj.weight, other.multihead_attn.out_proj.weight),
            (ours.feed_forward.up_proj.weight, other.linear1.weight),
            (ours.attention_norm.weight, other.norm1.weight),
        ]
        for mine, reference in pairs:
            torch.testing.assert_close(mine.grad, reference.grad, atol=1e-5, rtol=1e-4)
    mine = torch.cat([getattr(model.encoder[0].attention, f"{n}_proj").weight.grad for n in ("query", "key", "value")])
    torch.testing.assert_close(mine, theirs.encoder.layers[0].self_attn.in_proj_weight.grad, atol=1e-5, rtol=1e-4)


def test_attention_takes_any_three_inputs_and_shows_its_weights():
    """Equal to `nn.MultiheadAttention`, the weights of each head included."""
    torch.manual_seed(0)
    ours = Attention(24, 3).eval()
    theirs = nn.MultiheadAttention(24, 3, batch_first=True).eval()
    with torch.no_grad():
        theirs.in_proj_weight.copy_(torch.cat([ours.query_proj.weight, ours.key_proj.weight, ours.value_proj.weight]))
        theirs.in_proj_bias.copy_(torch.cat([ours.query_proj.bias, ours.key_proj.bias, ours.value_proj.bias]))
        theirs.out_proj.load_state_dict(ours.output_proj.state_dict())
    query, key, value = torch.randn(2, 5, 24), torch.randn(2, 7, 24), torch.randn(2, 7, 24)
    padding = torch.tensor([[False] * 7, [False] * 4 + [True] * 3])
    mask = ~padding[:, None, None]
    expected, weights = theirs(query, key, value, key_padding_mask=padding, average_attn_weights=False)
    torch.testing.assert_close(ours(query, key, value, mask), expected, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(ours.weights(query, key, mask), weights, atol=1e-6, rtol=1e-5)


def test_a_row_does_not_depend_on_the_padding_beside_it():
    model = small_model()
    src, tgt = random_batch()
    together = model(src, tgt)["logits"]
    for row, (n_source, n_target) in enumerate(zip((7, 4, 1), (5, 2, 6), strict=True)):
        alone = model(src[row : row + 1, :n_source], tgt[row : row + 1, :n_target])["logits"][0]
        torch.testing.assert_close(together[row, :n_target], alone, atol=1e-5, rtol=1e-5)


def test_label_smoothing_is_of_training_only():
    """The smoothed loss is (1 − ε) · nll + ε · the mean over the vocabulary."""
    model = small_model()
    model.label_smoothing = 0.1
    src, tgt = random_batch()
    labels = tgt.masked_fill(tgt == PAD, IGNORED_LABEL)
    measured = model(src, tgt, labels=labels)
    assert "nll" not in measured
    model.train()
    trained = model(src, tgt, labels=labels)
    log_probs = trained["logits"].log_softmax(-1)[labels != IGNORED_LABEL]
    expected = 0.9 * trained["nll"] - 0.1 * log_probs.mean()
    torch.testing.assert_close(trained["loss"], expected)
    torch.testing.assert_close(trained["nll"], measured["loss"])


def without_cache(model, source, num_beams, length_penalty, steps):
    """The project's search of decoder-only models, over a decoder that computes everything anew at each step."""

    class Cache(SimpleNamespace):
        def keep_rows(self, rows):
            self.ids = self.ids[rows]

    def hidden_states(new_ids, cache):
        cache.ids = new_ids if cache.ids is None else torch.cat((cache.ids, new_ids), dim=1)
        logits = model.decode(cache.ids, model.encode(source).repeat(len(cache.ids)))
        logits[:, :, PAD] = -torch.inf
        return logits

    adapter = SimpleNamespace(
        config=SimpleNamespace(max_seq_len=steps + 1), training=False, eval=lambda: None, train=lambda mode: None,
        device="cpu", lm_head=lambda hidden: hidden, hidden_states=hidden_states,
        new_cache=lambda rows, length: Cache(ids=None),
    )  # fmt: skip
    settings = BeamSettings(num_beams, length_penalty)
    return beam_search(adapter, [START], settings, max_gen_len=steps, end_token_ids={END})[0].token_ids


@pytest.mark.parametrize(("num_beams", "length_penalty"), [(1, 1.0), (2, 1.0), (4, 0.0), (4, 1.0), (3, 2.0)])
def test_a_batch_with_caches_finds_what_each_source_finds_without(num_beams, length_penalty):
    ended = set()
    for seed in range(4):
        model = small_model(seed)
        with torch.no_grad():
            model.lm_head.weight[END] *= 2.5  # so that some targets end
        src, _ = random_batch(seed)
        found = model.generate(src, START, END, max_gen_len=9, num_beams=num_beams, length_penalty=length_penalty)
        for row, n_source in enumerate((7, 4, 1)):
            expected = without_cache(model, src[row : row + 1, :n_source], num_beams, length_penalty, steps=9)
            assert found[row][found[row] != PAD].tolist() == expected
            ended.add(END in expected)
    assert ended == {True, False}


def test_a_wide_search_finds_the_best_of_all_targets():
    """Beside trying every target of at most 3 tokens."""
    model = small_model(tgt_vocab=6, seed=5)
    src, _ = random_batch()
    src = src[:1]
    tokens = [token for token in range(6) if token != PAD]
    candidates = [(*body, END) for n in range(3) for body in product([t for t in tokens if t != END], repeat=n)]
    candidates += list(product([t for t in tokens if t != END], repeat=3))

    def score(candidate):
        logits = model(src, torch.tensor([[START, *candidate[:-1]]]))["logits"][0]
        logits[:, PAD] = -torch.inf
        return float(logits.log_softmax(-1)[range(len(candidate)), list(candidate)].sum()) / len(candidate)

    with torch.no_grad():
        best = max(candidates, key=score)
    found = model.generate(src, START, END, max_gen_len=3, num_beams=16)[0]
    assert tuple(found.tolist())[: len(best)] == best


def test_one_vocabulary_has_one_table():
    shared = small_model(src_vocab=19, share_embeddings=True)
    assert shared.src_embedding.weight is shared.tgt_embedding.weight is shared.lm_head.weight
    apart = small_model(src_vocab=19, share_embeddings=False)
    assert apart.src_embedding.weight is not apart.tgt_embedding.weight
    assert not small_model().config.share_embeddings  # of two vocabularies, the switch means nothing


def test_what_does_not_fit_is_said():
    model = small_model()
    with pytest.raises(ValueError, match="17 tokens do not fit"):
        model(torch.full((1, 17), 3), torch.tensor([[START]]))
    with pytest.raises(ValueError, match="17 tokens do not fit"):
        model(torch.tensor([[3]]), torch.full((1, 17), 3))
    with pytest.raises(ValueError, match="multiple of num_heads"):
        Seq2SeqConfig(**{**SIZES, "d_model": 25})
