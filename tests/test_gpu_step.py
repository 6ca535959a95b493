"""A GPU's step: the tokens of the CPU's engine, with one copy there and one copy back. Without a GPU the same code runs
on the CPU; what a CUDA graph does with it is shown by a stand-in that plays recorded operations again."""

import copy
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest
import torch
from plain_generation import CONTEXT, GREEDY, PROMPTS, alone, prompt, tokens_of
from test_speculation import knowing, speculating
from torch.utils._python_dispatch import TorchDispatchMode

from inference import gpu_step
from inference.engine import Engine
from inference.gpu_sampling import Choice, choose, numbers_of
from inference.gpu_step import PLAYED_BEFORE, GpuStep, download
from inference.kernels.stacked_experts import stack_experts
from inference.quantizer import prepare_for_inference
from inference.sampling import SamplingParams, TokenSampler, sample_batch
from inference.service.structured import json_form

DRAWN = [
    replace(SamplingParams(20, seed=seed, ignore_eos=True), **changes)
    for seed, changes in enumerate(
        [{}, {"temperature": 0}, {"top_k": 5}, {"top_p": 0.7}, {"top_k": 7, "top_p": 0.6, "temperature": 0.7},
         {"min_p": 0.1}, {"top_k": 64}, {"top_p": 0.2, "temperature": 3}]
    )
]  # fmt: skip
SPECIAL = [
    replace(DRAWN[0], repetition_penalty=1.3, frequency_penalty=0.2), replace(GREEDY, logprobs=3), DRAWN[3],
    replace(GREEDY, logit_bias={5: 3.0, 9: -2.0}, logprobs=0), replace(DRAWN[4], logprobs=2, banned_tokens=(7,)),
    replace(GREEDY, prompt_logprobs=2), replace(DRAWN[1], presence_penalty=0.5), replace(DRAWN[2], prompt_logprobs=0),
]  # fmt: skip


def with_stacked_experts(model):
    """The experts are as on a GPU; all other parts compute through PyTorch, which is what is counted and played."""
    prepared = prepare_for_inference(model)
    stack_experts(prepared)
    for layer, ready in zip(model.layers, prepared.layers, strict=True):
        ready.feed_forward.router = layer.feed_forward.router
        layer.feed_forward = ready.feed_forward
    return model


# -- the numbers -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [{}, {"max_running": 3, "prefill_chunk": 7}, {"cache_tokens": CONTEXT}, {"cache_dtype": torch.int8}],
)
def test_tokens_are_those_of_the_cpus_engine(model, settings):
    """In chunks, put back for want of memory, drawn in every way, with biases and log-probabilities."""
    cpu, gpu = Engine(model, None, **settings), Engine(model, None, **settings, gpu_step=True)
    tolerance = 1e-2 if "cache_dtype" in settings else 1e-4  # in INT8, a last digit may decide between two integers
    for params in (GREEDY, DRAWN, SPECIAL):
        expected, found = cpu.run(PROMPTS, params), gpu.run(PROMPTS, params)
        assert tokens_of(found) == tokens_of(expected)
        for ours, theirs in zip(found, expected, strict=True):
            for mine, right in ((ours.log_probs, theirs.log_probs), (ours.prompt_log_probs, theirs.prompt_log_probs)):
                assert (mine is None) == (right is None)
                for one, other in zip(mine or [], right or [], strict=True):
                    assert (one.token_id, list(one.likeliest)) == (other.token_id, list(other.likeliest))
                    numbers = [(each.log_prob or 0.0, *each.likeliest.values()) for each in (one, other)]
                    assert numbers[0] == pytest.approx(numbers[1], abs=tolerance)
    assert gpu.cache.n_used == 0


@pytest.mark.parametrize("weights", ["int8", "fp16"])
def test_small_weights_and_experts_give_the_cpus_tokens_too(random_model, weights):
    for model in (random_model("modern", max_seq_len=CONTEXT), random_model("moe", max_seq_len=CONTEXT)):
        small = prepare_for_inference(model, weights)
        assert tokens_of(Engine(small, None, gpu_step=True).run(PROMPTS, GREEDY)) == tokens_of(
            Engine(small, None).run(PROMPTS, GREEDY)
        )


def test_drafts_are_verified(gpt2):
    """A drafter that is often right changes no token."""
    expected = tokens_of(Engine(gpt2, None).run(PROMPTS, DRAWN))
    drafter = knowing(list(zip(PROMPTS, expected, strict=True)), mistake_every=3)
    engine = speculating(gpt2, drafter, gpu_step=True)
    assert tokens_of(engine.run(PROMPTS, DRAWN)) == expected
    assert engine.statistics().tokens_accepted > 0


def test_positions_that_depend_on_the_length(random_model):
    scaling = {"rope_type": "dynamic", "factor": 2.0, "original_max_position_embeddings": 32}
    model = random_model("modern", max_seq_len=CONTEXT, rope_scaling=scaling)
    found = Engine(model, None, gpu_step=True).run(PROMPTS, GREEDY)
    assert tokens_of(found) == tokens_of(Engine(model, None).run(PROMPTS, GREEDY))


def test_what_is_not_finite_fails_alone(gpt2):
    """A prompt whose embedding is not finite spoils neither its neighbours nor the cells that it had."""
    with torch.no_grad():
        gpt2.lm_head.weight = torch.nn.Parameter(gpt2.lm_head.weight.clone())
        gpt2.token_embedding.weight[9] = torch.nan
    engine = Engine(gpt2, None, gpu_step=True)
    good = [ids for ids in PROMPTS if 9 not in ids and len(ids) > 1][0]
    expected = engine.run([good], GREEDY)
    failing, fine = engine.submit([3, 9, 4], GREEDY), engine.submit(good, GREEDY)
    assert fine.result().token_ids == expected[0].token_ids
    with pytest.raises(Exception, match="not finite"):
        failing.result()
    assert tokens_of(engine.run([good] * 3, GREEDY)) == tokens_of(expected) * 3


@pytest.mark.parametrize("width", [50, 3000])
def test_rows_are_chosen_as_on_the_cpu(width):
    """Thousands of draws with all truncations at once, ties among the scores included."""
    generator = torch.Generator().manual_seed(0)
    params = [replace(each, top_k=min(each.top_k, width)) for each in DRAWN] + [SamplingParams(top_k=width, min_p=0.3)]
    for trial in range(60):
        scores = (torch.randn(len(params), width, generator=generator) * 3).round(decimals=trial % 3)
        both = [[TokenSampler(replace(each, seed=trial)) for each in params] for _ in range(2)]
        choice, arrays = Choice.of(both[0], width), numbers_of(both[0], 16, width)
        rows = torch.cat((scores, torch.zeros(16 - len(params), width)))
        ids, finite = choose(rows, {name: torch.from_numpy(array) for name, array in arrays.items()}, choice)
        assert ids[: len(params)].tolist() == sample_batch(scores, both[1]).token_ids and finite.all()


# -- nobody waits ------------------------------------------------------------------------------------------------------

TO_THE_HOST = "cpu", "numpy", "tolist", "item", "__int__", "__float__", "__bool__", "__index__", "__array__", "nonzero"


class Reads(TorchDispatchMode):
    """Counts operations whose result, or its size, is a number that the host has to know."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        if name in ("_local_scalar_dense", "nonzero", "item", "unique_dim", "_unique2", "bincount", "masked_select"):
            self.found.append(name)
        elif name.startswith("index") and any(  # a mask as an index asks how many places it has
            isinstance(index, torch.Tensor) and index.dtype == torch.bool for index in (args[1] or [])
        ):
            self.found.append(f"{name} of a mask")
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", ["greedy", "drawn", "special", "drafted", "formed", "experts"])
def test_a_step_copies_once_to_the_gpu_and_once_back(model, random_model, tokenizer, kind, monkeypatch):
    """Prompts, decoding, and both in one step: one look at a number of the GPU each, all numbers together. So it is
    with drafts, and with answers of a form, as that follows from tokens that are known."""
    params = {"greedy": GREEDY, "drawn": DRAWN, "special": SPECIAL}.get(kind, DRAWN)
    engine = Engine(model, None, gpu_step=True, prefill_chunk=64)
    if kind == "drafted":
        expected = tokens_of(Engine(model, None).run(PROMPTS, DRAWN))
        drafter = knowing(list(zip(PROMPTS, expected, strict=True)), mistake_every=3)
        engine = speculating(model, drafter, gpu_step=True, prefill_chunk=64)
    elif kind == "experts":
        mixture = with_stacked_experts(random_model("moe", max_seq_len=CONTEXT))
        engine = Engine(mixture, None, gpu_step=True, prefill_chunk=64)
    elif kind == "formed":
        talker = random_model("modern", max_seq_len=CONTEXT, vocab_size=tokenizer.vocab_size)
        engine = Engine(talker, tokenizer, gpu_step=True, prefill_chunk=64)
        params = [replace(each, form=json_form(tokenizer, {"type": "array"}), ignore_eos=False) for each in DRAWN]
    settings = params if isinstance(params, list) else [params] * len(PROMPTS)
    requests = [engine.submit(ids, each) for ids, each in zip(PROMPTS, settings, strict=True)]
    counts = dict.fromkeys(("up", "down", "looks"), 0)

    def counted(kind, function):
        def count(*arguments):
            counts[kind] += 1
            return function(*arguments)

        return count

    monkeypatch.setattr(gpu_step, "packed", counted("up", gpu_step.packed))
    monkeypatch.setattr(gpu_step, "download", counted("down", lambda tensor: really(tensor)))

    def really(tensor):  # what the one download does is not counted as a look
        with monkeypatch.context() as patch:
            for name, method in methods.items():
                patch.setattr(torch.Tensor, name, method)
            return download(tensor)

    methods = {name: getattr(torch.Tensor, name) for name in TO_THE_HOST}
    own = {id(engine.cache.table)}  # which never leaves the host

    def look(name):
        def method(tensor, *arguments, **settings):
            counts["looks"] += id(tensor) not in own
            return methods[name](tensor, *arguments, **settings)

        return method

    for name in TO_THE_HOST:
        monkeypatch.setattr(torch.Tensor, name, look(name))
    steps = 0
    with Reads() as reads:
        while engine.running or engine.waiting:
            engine.step()
            steps += 1
    assert counts["up"] == counts["down"] == steps > 5 and counts["looks"] == 0 and reads.found == []
    assert all(request.finished for request in requests)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("architecture", ["gpt2", "modern", "moe"])
def test_a_recorded_step_asks_for_no_number(random_model, architecture, dtype):
    """On tensors without numbers, where asking for one raises: all is computed where the model is."""
    model = random_model(architecture, max_seq_len=CONTEXT)
    if architecture == "moe":
        with_stacked_experts(model)
    vocab_size = model.config.vocab_size
    model = copy.deepcopy(model).to("meta", dtype)
    engine = Engine(model, None, gpu_step=True)
    engine.cache.begin_step([(engine.cache.open([1]), 1)])
    samplers = [TokenSampler(each) for each in DRAWN]
    arrays = engine.cache.singles(8) | numbers_of(samplers, 8, vocab_size) | {"ids": np.zeros(8, dtype=int)}
    numbers = {name: torch.from_numpy(array).to("meta") for name, array in arrays.items()}
    with torch.inference_mode():
        _, logits = engine.model_step.gpu_step._forward(numbers)
        ids, finite = choose(logits, numbers, Choice.of(samplers, vocab_size))
    assert logits.is_meta and logits.dtype == torch.float32 and engine.cache.keys.dtype == dtype
    assert ids.shape == finite.shape == (8,)
    with pytest.raises(RuntimeError, match="meta"):
        ids.tolist()


# -- graphs ------------------------------------------------------------------------------------------------------------


class StandIn(TorchDispatchMode):
    """A CUDA graph on the CPU: it notes every operation with the very tensors, and plays them again into these."""

    made = 0

    def __init__(self):
        super().__init__()
        self.operations = []
        StandIn.made += 1

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.operations.append((function, args, kwargs or {}, result))
        return result

    def replay(self):
        for function, args, kwargs, result in self.operations:
            again = function(*args, **kwargs)
            for old, new in zip(*([x] if isinstance(x, torch.Tensor) else x for x in (result, again)), strict=True):
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


@pytest.fixture
def graphs(monkeypatch):
    """Engines record with the stand-in."""

    @contextmanager
    def record(graph, **_):
        with graph:
            yield

    monkeypatch.setattr(torch.cuda, "CUDAGraph", StandIn)
    monkeypatch.setattr(torch.cuda, "graph", record)
    made = GpuStep.__init__

    def recording(step, model, cache, graphs=True):
        made(step, model, cache, graphs)
        step.records = step._graphs = graphs

    monkeypatch.setattr(GpuStep, "__init__", recording)
    monkeypatch.setattr(StandIn, "made", 0)


def test_played_steps_give_the_cpus_tokens(model, graphs):
    """In every way of choosing; there are few graphs, since steps are filled up to a few shapes."""
    cpu, gpu = Engine(model, None), Engine(model, None, gpu_step=True)
    for params in (GREEDY, DRAWN, SPECIAL, GREEDY):
        assert tokens_of(gpu.run(PROMPTS, params)) == tokens_of(cpu.run(PROMPTS, params))
    assert 3 <= StandIn.made <= 12
    made = StandIn.made
    gpu.run(PROMPTS, GREEDY)
    assert StandIn.made == made


def test_a_graph_is_played_only_while_the_model_is_the_one_that_was_recorded(gpt2, graphs, random_model):
    """Weights that change in their place count at once; where they move, or a part is another, graphs are made anew or
    not at all."""
    engine = Engine(gpt2, None, gpu_step=True)
    ids = prompt(5)

    def is_right():
        engine.forget()
        return engine.run([ids], GREEDY)[0].token_ids == alone(gpt2, ids, 20)

    assert is_right() and StandIn.made == 1 + PLAYED_BEFORE - 1
    with torch.no_grad():
        gpt2.layers[0].feed_forward.up_proj.weight.mul_(-1)
    assert is_right() and StandIn.made == 1
    gpt2.layers[1].feed_forward.up_proj = copy.deepcopy(gpt2.layers[0].feed_forward.up_proj)
    assert is_right() and StandIn.made == 2
    handle = gpt2.layers[0].register_forward_hook(lambda module, inputs, output: output * 1.5)
    assert is_right() and StandIn.made == 2 and not engine.model_step.gpu_step.records
    handle.remove()
    assert is_right() and StandIn.made == 3
    mixture = random_model("moe", max_seq_len=CONTEXT)
    experts = Engine(mixture, None, gpu_step=True)
    (expected,) = experts.run([ids], GREEDY)
    assert StandIn.made == 3 and not experts.model_step.gpu_step.records
    with_stacked_experts(mixture)
    experts.forget()
    assert experts.run([ids], GREEDY)[0].token_ids == expected.token_ids
    assert StandIn.made == 4 and experts.model_step.gpu_step.records
    Engine(gpt2, None, gpu_step=True, cuda_graphs=False).run([ids], GREEDY)
    assert StandIn.made == 4


# -- on a GPU ----------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("cuda_graphs", [True, False])
@pytest.mark.parametrize("cache_dtype", [None, torch.int8])
def test_a_gpu_gives_the_cpus_tokens(model, cuda_graphs, cache_dtype):
    """FP32 on both; sums in another order may turn a near tie, so nearly all answers are the same to the end."""
    on_gpu = copy.deepcopy(model).cuda()
    engine = Engine(on_gpu, None, cuda_graphs=cuda_graphs, cache_dtype=cache_dtype)
    for params in (GREEDY, DRAWN, SPECIAL):
        expected = tokens_of(Engine(model, None, cache_dtype=cache_dtype).run(PROMPTS, params))
        found = tokens_of(engine.run(PROMPTS, params))
        assert sum(one == other for one, other in zip(found, expected, strict=True)) >= len(PROMPTS) - 1
    assert bool(engine.model_step.gpu_step._recordings) == cuda_graphs


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_gpu_in_half_precision_plays_what_it_computes_from_python(model, dtype):
    """Graphs change no token; the first tokens are nearly always those of FP32."""
    half = copy.deepcopy(model).to("cuda", dtype)
    played, plain = (Engine(half, None, cuda_graphs=graphs) for graphs in (True, False))
    found = tokens_of(played.run(PROMPTS, GREEDY))
    assert found == tokens_of(plain.run(PROMPTS, GREEDY))
    firsts = [ids[0] == alone(model, prompt, 1)[0] for ids, prompt in zip(found, PROMPTS, strict=True)]
    assert sum(firsts) >= len(PROMPTS) - 1
