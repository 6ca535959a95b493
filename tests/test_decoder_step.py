"""The compiled forward pass computes what the model computes, and is used only where it does."""

import copy
import math

import pytest
import torch
import torch.nn as nn

from gpt_model import ARCHITECTURES, GPTConfig, GPTModel
from inference.engine import Engine
from inference.kernels import decoder_step
from inference.kernels.decoder_step import DecoderStep
from inference.kernels.linear_products import DTYPES
from inference.kernels.paged_attention import BLOCK_SIZE
from inference.paged_cache import PagedCache
from inference.quantizer import prepare_for_inference
from inference.sampling import SamplingParams
from lora import LoRAOptions, attach_lora

VOCAB = 211
GREEDY = SamplingParams(12, temperature=0)
needs_compiler = pytest.mark.skipif(decoder_step.load_native(decoder_step.SOURCE) is None, reason="no C compiler")


def random_model(architecture="gpt2", **changes):
    """Random norms and biases, and weights so large that every part of the model shows in its logits."""
    torch.manual_seed(0)
    sizes = dict(vocab_size=VOCAB, max_seq_len=96, d_model=64, n_layers=3, n_heads=4)
    config = GPTConfig(**{**ARCHITECTURES[architecture], **sizes, **changes})
    model = GPTModel.from_config(config).eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.add_(torch.randn_like(parameter), alpha=0.1 if parameter.ndim == 1 else 0.05)
    return model


def largest_difference(model, cache_dtype=torch.float32, steps=((3, 1, 32), (1, 1, 1), (5, 1, 2), (1, 1, 1))):
    """Between the hidden states and logits of both ways, relative, over steps of several sequences; each way has a
    cache of its own."""
    worst = 0.0
    generator = torch.Generator().manual_seed(1)
    caches = [PagedCache(model.config, 400, 3, cache_dtype, reuse_prefixes=False) for _ in range(2)]
    sequences = [[cache.open([0] * 60) for _ in range(3)] for cache in caches]
    step = DecoderStep.of(model, caches[0].native)
    for sizes in steps:
        ids = torch.randint(VOCAB, (sum(sizes),), generator=generator)
        order = sorted(range(3), key=lambda index: sizes[index])
        for cache, own in zip(caches, sequences, strict=True):
            cache.begin_step([(own[index], sizes[index]) for index in order])
        last = [0, len(ids) - 1]
        hidden, logits = step(ids.tolist(), caches[0].slots, caches[0].positions, last)
        expected = model.hidden_states_at(ids[None], torch.tensor([caches[1].positions]), cache=caches[1])[0]
        for found, right in ((hidden, expected), (logits, model.lm_head(expected[last]))):
            assert found.shape == right.shape
            worst = max(worst, ((found - right).norm() / right.norm()).item())
        for cache, own in zip(caches, sequences, strict=True):
            for index, size in enumerate(sizes):
                cache.stored(own[index], [], size)
    return worst


# -- the numbers -------------------------------------------------------------------------------------------------------


@needs_compiler
@pytest.mark.parametrize("weights", [None, *DTYPES])
@pytest.mark.parametrize("architecture", ["gpt2", "modern", "moe"])
def test_it_is_the_models_forward_pass(architecture, weights, native_level):
    """All presets and all kinds of weights: single tokens and pieces of prompts, several requests at once."""
    model = random_model(architecture)
    if weights:
        model = prepare_for_inference(model, weights)
    # Where inputs are rounded to 8 bits, a last digit can decide between two of these
    assert largest_difference(model) < (0.02 if weights in ("int8_dynamic", "int4") else 2e-6)


@needs_compiler
@pytest.mark.parametrize(
    "changes",
    [
        dict(position="sinusoidal"),
        dict(d_model=60, n_heads=6, d_ff=101),  # sizes that fill no vector
        dict(d_model=36, n_heads=2, head_dim=10, n_kv_heads=1, d_ff=7),
        dict(position="rotary", norm="rmsnorm", qk_norm=True, n_kv_heads=2, d_model=52, head_dim=6),
        dict(norm="rmsnorm", bias=False, tie_embeddings=False),
        dict(activation="swiglu", position="rotary", qk_norm=True, rope_theta=500.0),
        dict(n_layers=1, norm_eps=0.5),
        dict(n_experts=5, experts_per_token=3, d_ff=21),
        dict(activation="swiglu", bias=False, n_experts=3, experts_per_token=1, d_model=44, d_ff=9),
    ],
    ids=lambda changes: " ".join(f"{name}={value}" for name, value in changes.items()),
)
@pytest.mark.parametrize("weights", ["fp32", "int8"])
def test_every_switch_of_the_architecture(changes, weights, native_level):
    assert largest_difference(prepare_for_inference(random_model(**changes), weights)) < 2e-6


@needs_compiler
def test_it_reads_and_writes_an_int8_cache(native_level):
    assert largest_difference(random_model("modern"), torch.int8) < 1e-5


@needs_compiler
def test_threads_change_nothing(monkeypatch, native_level):
    """To the last bit: each number is summed up by one thread."""
    monkeypatch.setattr(decoder_step, "WORTH_THREADS", 0)
    model, results = prepare_for_inference(random_model("modern"), "int8"), []
    for n_threads in (1, 2, 3):
        torch.set_num_threads(n_threads)
        cache = PagedCache(model.config, 400, 3)
        cache.begin_step([(cache.open([0] * 9), 9)])
        step = DecoderStep.of(model, cache.native)
        results.append(step(list(range(9)), cache.slots, cache.positions, [8])[1])
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


@needs_compiler
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("weights", ["fp32", "int8"])
@pytest.mark.parametrize("cache_dtype", [torch.float32, torch.int8])
@pytest.mark.parametrize("place", ["feed_forward_norm", "attention.key_proj", "attention.value_proj"])
def test_numbers_that_are_not_finite_stay_visible(place, cache_dtype, weights, bad, native_level):
    """An engine that could not see them would answer nonsense; as integers they would be some number."""
    model = prepare_for_inference(random_model(), weights)
    model.layers[1].get_submodule(place).bias.data[5] = bad
    cache = PagedCache(model.config, 400, 3, cache_dtype)
    cache.begin_step([(cache.open([0]), 1)])
    hidden, logits = DecoderStep.of(model, cache.native)([7], cache.slots, cache.positions, [0])
    assert not hidden.sum().isfinite() and not logits.isfinite().any()


@needs_compiler
@pytest.mark.parametrize("n_tokens", [1, 2, 5])
def test_the_inner_layer_has_room_for_whole_blocks(n_tokens):
    """C goes over it block by block, whatever its width; what else it has is as large as its numbers."""
    for n_experts in (0, 3):
        model = random_model(d_model=36, n_heads=2, d_ff=7, n_experts=n_experts)
        step = DecoderStep.of(model, PagedCache(model.config, 96, 1).native)
        step._make_room(n_tokens)
        sizes = [len(room) // 4 for room in step.rooms]
        inner = -(-n_tokens * 7 // BLOCK_SIZE) * BLOCK_SIZE
        of_one = n_tokens * 36 if n_experts else 0
        rows = 2 * n_experts * (1 + n_tokens)  # of eight bytes each
        assert sizes == [n_tokens * 36] * 6 + [inner] * 2 + [0, n_tokens * n_experts, of_one, of_one, rows]


# -- where it is used --------------------------------------------------------------------------------------------------


@needs_compiler
def test_the_engine_uses_it_for_prompts_and_single_tokens(monkeypatch):
    model, n_tokens = random_model(), []
    usual = DecoderStep.__call__
    monkeypatch.setattr(DecoderStep, "__call__", lambda *step: n_tokens.append(len(step[1])) or usual(*step))
    Engine(model, None).run([[5] * 60, [6] * 3], GREEDY)
    assert n_tokens == [63] + [2] * 11


@needs_compiler
def test_weights_may_change_in_place_move_and_gain_adapters():
    """Between two requests; the engine takes what is there."""
    model = random_model(tie_embeddings=False)
    engine = Engine(model, None, reuse_prefixes=False)

    def answers():
        found = engine.run([[1, 2, 3]], GREEDY)[0].token_ids
        assert found == Engine(copy.deepcopy(model), None).run([[1, 2, 3]], GREEDY)[0].token_ids
        return found

    before = answers()
    model.lm_head.weight.mul_(-1)
    assert answers() != before
    model.lm_head.weight.data = -model.lm_head.weight.data  # elsewhere in memory
    assert answers() == before
    model.lm_head.weight = nn.Parameter(-model.lm_head.weight)
    assert answers() != before
    attach_lora(model, LoRAOptions(lora_rank=2))
    for name, parameter in model.named_parameters():
        if "lora" in name:
            parameter.data.normal_(std=0.5)
    answers()
    assert DecoderStep.of(model, engine.cache.native) is None


@needs_compiler
def test_weights_that_move_under_a_running_request_are_not_pulled_away_from_it():
    """Their old memory stays until a new request comes."""
    model = random_model()
    expected = Engine(model, None).run([[1, 2, 3]], GREEDY)[0].token_ids
    engine = Engine(model, None)
    request = engine.submit([1, 2, 3], GREEDY)
    for _ in range(3):
        engine.step()
    model.double().float()
    torch.full((1 << 20,), math.nan)  # takes memory that has become free
    assert request.result().token_ids == expected


@needs_compiler
@pytest.mark.parametrize("kind", ["half precision", "mixed types", "one norm in half precision", "a hook"])
def test_what_it_does_not_know_goes_through_pytorch(kind):
    model = random_model()
    if kind == "half precision":
        model = model.bfloat16()
    elif kind == "mixed types":
        model.layers[0].feed_forward.up_proj.bfloat16()
    elif kind == "one norm in half precision":
        model.layers[2].attention_norm.bfloat16()
    else:
        model.layers[1].register_forward_hook(lambda layer, inputs, output: output * 2)
    assert DecoderStep.of(model, PagedCache(model.config, 96, 1).native) is None


def test_step_by_step_through_pytorch_the_answers_are_the_same(monkeypatch):
    model = random_model("modern")
    prompts = [[1, 2, 3], [9] * 20]
    expected = [answer.token_ids for answer in Engine(model, None).run(prompts, GREEDY)]
    monkeypatch.setattr(decoder_step, "load_native", lambda source: None)
    assert [answer.token_ids for answer in Engine(model, None).run(prompts, GREEDY)] == expected
