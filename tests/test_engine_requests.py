"""The engine towards those who use it: where answers end, streams, bad requests, failures, threads."""

import math
import threading
import time
from functools import partial

import pytest
import torch
from plain_generation import CONTEXT, GREEDY, PROMPTS, alone, prompt, tokens_of

from command_line import UserError
from gpt_model import GPTConfig
from inference.engine import Engine, RequestFailed
from inference.model_step import default_cache_tokens
from inference.sampling import SamplingParams


@pytest.fixture
def talker(random_model, tokenizer):
    """A model with the tokenizer's vocabulary, whose tokens are text."""
    return random_model("gpt2", max_seq_len=CONTEXT, vocab_size=len(tokenizer))


# -- where an answer ends ----------------------------------------------------------------------------------------------


def test_the_contexts_end(model):
    """An answer stops where the context is full, whatever `max_gen_len` says."""
    (generation,) = Engine(model, None).run([prompt(100)], SamplingParams(500, temperature=0, ignore_eos=True))
    assert generation.finish_reason == "length"
    assert len(generation.token_ids) == CONTEXT - 100


def test_sliding_over_the_contexts_end(model):
    """The older half of a full context is forgotten and the rest stands at new positions, as in a loop by hand."""
    context, expected = prompt(100), []
    for _ in range(150):
        if len(context) >= CONTEXT:
            context = context[-CONTEXT // 2 :]
        expected += alone(model, context, 1)
        context = context + expected[-1:]
    params = SamplingParams(150, temperature=0, ignore_eos=True, overflow="slide")
    engine = Engine(model, None)
    assert engine.run([prompt(100)], params)[0].token_ids == expected
    assert engine.cache.n_used == 0
    assert len(engine.run([prompt(CONTEXT + 7)], params)[0].token_ids) == 150


def test_stop_tokens_and_the_end_token(talker, tokenizer):
    """A stop token ends the answer and does not show; `</s>` does so unless it is to be ignored."""
    (free,) = Engine(talker, tokenizer).run(["hello"], SamplingParams(20, temperature=0))
    stop = free.token_ids[5]
    (stopped,) = Engine(talker, tokenizer).run(["hello"], SamplingParams(20, temperature=0, stop_token_ids=(stop,)))
    end = free.token_ids.index(stop)
    assert stopped.token_ids == free.token_ids[: end + 1] and stopped.ended and stopped.finish_reason == "stop"
    assert stopped.text == tokenizer.decode(free.token_ids[:end])
    bias = {tokenizer.eos_token_id: 1e9}
    (ended,) = Engine(talker, tokenizer).run(["hello"], SamplingParams(20, temperature=0, logit_bias=bias))
    assert ended.token_ids == [tokenizer.eos_token_id] and ended.ended and ended.text == ""
    forced = SamplingParams(20, temperature=0, logit_bias=bias, ignore_eos=True)
    assert len(Engine(talker, tokenizer).run(["hello"], forced)[0].token_ids) == 20


@pytest.mark.parametrize("streamed", [True, False])
def test_a_stop_string_is_never_shown(talker, tokenizer, streamed):
    """Not even in part; what comes before it is all there."""
    engine = Engine(talker, tokenizer)
    (free,) = engine.run(["hello"], SamplingParams(30, temperature=0, ignore_eos=True))
    stop = free.text[8:13]
    params = SamplingParams(30, temperature=0, ignore_eos=True, stop=(stop,))
    if streamed:
        request = engine.submit("hello", params)
        text = "".join(request.stream())
        assert request.result().text == text
    else:
        (generation,) = engine.run(["hello"], params)
        text = generation.text
        assert generation.finish_reason == "stop" and len(generation.token_ids) < 30
    assert text == free.text[: free.text.index(stop)]


def test_streams_add_up_to_the_answer(talker, tokenizer):
    """Pieces are text at once, whole characters; together they are the decoded tokens."""
    params = SamplingParams(40, temperature=0, ignore_eos=True)
    engine = Engine(talker, tokenizer)
    (expected,) = engine.run(["法国"], params)
    request = engine.submit("法国", params)
    first = next(stream := request.stream())
    assert first and not request.finished
    pieces = [first, *stream]
    assert "".join(pieces) == request.result().text == expected.text == tokenizer.decode(expected.token_ids)
    assert len(pieces) > 5


def test_leaving_a_stream_cancels_its_request(talker, tokenizer):
    engine = Engine(talker, tokenizer)
    request = engine.submit("hello", SamplingParams(100, temperature=0, ignore_eos=True))
    stream = request.stream()
    next(stream)
    stream.close()
    engine.step()
    assert request.result().finish_reason == "cancelled"


def test_a_listener_hears_every_piece_and_the_end(talker, tokenizer):
    heard = []
    engine = Engine(talker, tokenizer)
    request = engine.submit("hello", SamplingParams(20, temperature=0), on_piece=heard.append)
    text = request.result().text
    assert heard[-1] is None and "".join(heard[:-1]) == text

    def failing(piece):
        raise ValueError("the listener is broken")

    failed, other = engine.submit("hello", GREEDY, on_piece=failing), engine.submit("hello", GREEDY)
    assert other.result().finish_reason == "length"
    assert failed.result().finish_reason == "cancelled"


def test_log_probabilities_of_the_answer(model):
    """One entry a token, equal to the model's own within 1e-4."""
    ids = prompt(12)
    (generation,) = Engine(model, None).run([ids], SamplingParams(10, seed=1, logprobs=3, ignore_eos=True))
    with torch.no_grad():
        logits = model(torch.tensor([ids + generation.token_ids]))["logits"][0, 11:-1]
    expected = logits.log_softmax(dim=-1)
    assert len(generation.log_probs) == 10
    for row, entry in zip(expected, generation.log_probs, strict=True):
        assert math.isclose(entry.log_prob, float(row[entry.token_id]), abs_tol=1e-4)
        assert list(entry.likeliest) == row.topk(3).indices.tolist()


def test_unset_seeds_come_from_torchs_generator(gpt2):
    params = SamplingParams(20, ignore_eos=True)
    engine = Engine(gpt2, None)

    def sampled(seed):
        torch.manual_seed(seed)
        return tokens_of(engine.run([prompt(5)] * 4, params))

    first, again, other = sampled(1), sampled(1), sampled(2)
    assert first == again != other
    assert len({tuple(ids) for ids in first}) == 4


def test_running_leaves_the_models_mode_alone(gpt2):
    gpt2.train()
    Engine(gpt2, None).run([prompt(5)], GREEDY)
    assert gpt2.training


# -- failures ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "bad, params, sentence",
    [
        ("", SamplingParams(), "the prompt is empty"),
        ([], SamplingParams(), "the prompt is empty"),
        (prompt(CONTEXT), SamplingParams(), "128 tokens and the model's context only 128.*shorten it"),
        (prompt(CONTEXT + 50), SamplingParams(), "178 tokens"),
        ([5, 10_000], SamplingParams(), "outside the model's vocabulary"),
        ([5, -1], SamplingParams(), "outside the model's vocabulary"),
        ("hi", SamplingParams(0), "max_gen_len must be"),
        ("hi", SamplingParams(temperature=math.nan), "temperature must be"),
        ("hi", SamplingParams(top_k=10_000), "top_k must be"),
        ("hi", SamplingParams(stop=("",)), "stop must be"),
    ],
)
def test_bad_requests_are_refused_in_a_sentence_and_the_engine_lives_on(talker, tokenizer, bad, params, sentence):
    engine = Engine(talker, tokenizer)
    with pytest.raises(UserError, match=sentence):
        engine.submit(bad, params)
    assert engine.submit("hello", SamplingParams(5)).result().token_ids


def test_a_full_prompt_leaves_room_for_one_token(gpt2):
    assert len(Engine(gpt2, None).run([prompt(CONTEXT - 1)], GREEDY)[0].token_ids) == 1


def test_impossible_settings_are_refused(gpt2):
    for settings in ({"max_running": 0}, {"prefill_chunk": 0}, {"cache_tokens": CONTEXT - 1}):
        with pytest.raises(UserError, match=next(iter(settings))):
            Engine(gpt2, None, **settings)
    for seconds in (0, -1, math.nan):
        with pytest.raises(UserError, match="deadline_s must be above 0"):
            Engine(gpt2, None).submit([5], GREEDY, deadline_s=seconds)
    with pytest.raises(UserError, match="token ids only"):
        Engine(gpt2, None).submit("text")


@pytest.mark.parametrize("length", [4, 60])
def test_a_request_that_gives_nan_fails_alone(model, length):
    """One poisoned token: its request fails with a sentence, beside others and as a chunk of a prompt; nobody else
    notices, and no NaN stays behind in the cache."""
    with torch.no_grad():
        model.token_embedding.weight[9] = math.nan
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.nan_to_num())  # no longer tied
    engine = Engine(model, None, prefill_chunk=40)
    poisoned = prompt(length)
    poisoned[2] = 9
    requests = [engine.submit(ids, GREEDY) for ids in (PROMPTS[2], poisoned, PROMPTS[3])]
    with pytest.raises(RequestFailed, match="not finite"):
        requests[1].result()
    assert requests[0].result().token_ids == alone(model, PROMPTS[2], 20)
    assert requests[2].result().token_ids == alone(model, PROMPTS[3], 20)
    assert engine.cache.keys.isfinite().all() and engine.cache.values.isfinite().all()
    assert engine.statistics().finished == {"error": 1, "length": 2}
    assert tokens_of(engine.run(PROMPTS, GREEDY)) == [alone(model, ids, 20) for ids in PROMPTS]


def test_a_step_that_raises_fails_its_own_requests_only(gpt2, monkeypatch):
    """Those of the step get the reason; those in the line are answered, as if nothing had been."""
    engine = Engine(gpt2, None, max_running=2)
    requests = [engine.submit(ids, GREEDY) for ids in PROMPTS[:4]]
    engine.step()
    with monkeypatch.context() as patch:
        patch.setattr(engine.model_step, "forward", lambda *step: 1 / 0)
        engine.step()
    for request in requests[:2]:
        with pytest.raises(RequestFailed, match="the computation failed: ZeroDivisionError"):
            request.result()
    for request in requests[2:]:
        assert request.result().token_ids == alone(gpt2, request.prompt_ids, 20)
    assert engine.statistics().failed_steps == 1
    assert engine.cache.n_used == 0


def test_a_step_that_fails_after_some_of_its_requests_have_finished(gpt2, monkeypatch):
    """Who had the last token has its answer; the others fail once, and the engine goes on."""
    engine = Engine(gpt2, None)
    first = engine.submit(prompt(5), SamplingParams(1, temperature=0, ignore_eos=True))
    second, third = engine.submit(prompt(6), GREEDY), engine.submit(prompt(7), GREEDY)
    accept = engine._accept
    monkeypatch.setattr(
        engine, "_accept", lambda request, *more: 1 / 0 if request is second else accept(request, *more)
    )
    engine.step()
    assert first.result().finish_reason == "length"
    for request in (second, third):
        with pytest.raises(RequestFailed, match="ZeroDivisionError"):
            request.result()
    assert engine.statistics().finished == {"length": 1, "error": 2}
    assert engine.submit(prompt(5), GREEDY).result().token_ids == alone(gpt2, prompt(5), 20)


def test_run_raises_what_the_model_raised(gpt2, monkeypatch):
    """A training loop must be able to tell memory that ran out from other errors."""
    engine = Engine(gpt2, None)
    with monkeypatch.context() as patch:
        patch.setattr(engine.model_step, "forward", lambda *step: (_ for _ in ()).throw(MemoryError("full")))
        with pytest.raises(MemoryError, match="full"):
            engine.run(PROMPTS, GREEDY)
    assert len(engine.run(PROMPTS, GREEDY)) == len(PROMPTS)


# -- threads -----------------------------------------------------------------------------------------------------------


def test_many_threads_share_one_engine(gpt2):
    """Sixteen threads submit, stream, cancel and wait; every answer is right, and nothing is left over."""
    expected = {tuple(ids): alone(gpt2, ids, 20) for ids in PROMPTS}
    errors = []
    with Engine(gpt2, None, max_running=4, max_waiting=1000) as engine:

        def client(number):
            try:
                for round_ in range(4):
                    ids = PROMPTS[(number + round_) % len(PROMPTS)]
                    request = engine.submit(ids, GREEDY)
                    if (number + round_) % 5 == 0:
                        request.cancel()
                    tokens = request.result(timeout=60).token_ids
                    assert tokens == expected[tuple(ids)][: len(tokens)]
                    assert len(tokens) == 20 or (number + round_) % 5 == 0
            except BaseException as error:
                errors.append(error)

        threads = [threading.Thread(target=client, args=(number,)) for number in range(16)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not errors
        statistics = engine.statistics()
        assert statistics.submitted == sum(statistics.finished.values()) == 64
        assert statistics.running == statistics.waiting == statistics.cache_tokens_used == 0
        assert tokens_of(engine.run(PROMPTS, GREEDY)) == list(expected.values())


def test_the_thread_sleeps_when_there_is_nothing_to_do_and_has_as_many_threads(gpt2, monkeypatch):
    """Also after a cancelled request; torch's number of threads, which is a setting of each thread, goes along."""
    engine, steps, n_threads = Engine(gpt2, None), [], []
    step, compute = engine.step, engine.model_step.compute
    monkeypatch.setattr(engine, "step", lambda: steps.append(1) or step())
    monkeypatch.setattr(
        engine.model_step, "compute", lambda spans: n_threads.append(torch.get_num_threads()) or compute(spans)
    )
    torch.set_num_threads(3)
    with engine:
        request = engine.submit(prompt(5), SamplingParams(10**6, ignore_eos=True, overflow="slide"))
        while not request.token_ids:
            time.sleep(0.001)
        request.cancel()
        request.result(timeout=5)
        n_steps = len(steps)
        time.sleep(0.05)
        assert len(steps) <= n_steps + 2
        assert set(n_threads) == {3}


def test_closing_ends_what_is_not_finished(gpt2):
    """With a sentence, at once, for those who run and those who wait; then nothing is taken any more."""
    engine = Engine(gpt2, None, max_running=1)
    engine.start()
    long = SamplingParams(10**6, temperature=0, ignore_eos=True, overflow="slide")
    requests = [engine.submit(prompt(5), long) for _ in range(3)]
    while not requests[0].token_ids:
        time.sleep(0.001)
    engine.close()
    for request in requests:
        with pytest.raises(RequestFailed, match="the engine was closed"):
            request.result(timeout=5)
    with pytest.raises(RequestFailed, match="closed"):
        engine.submit(prompt(5), GREEDY)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_nobody_waits_for_ever_for_an_engine_that_broke(gpt2, monkeypatch):
    """A mistake in the engine itself, which no step's error handling covers, still ends every request."""
    engine = Engine(gpt2, None)
    monkeypatch.setattr(engine, "_admit", lambda: 1 / 0)
    engine.start()
    with pytest.raises(RequestFailed, match="internal error|closed"):
        engine.submit(prompt(5), GREEDY).result(timeout=10)
    engine.close()


ILLEGAL = "CUDA error: an illegal memory access was encountered"


@pytest.mark.parametrize("error", [torch.AcceleratorError(ILLEGAL), RuntimeError(f"{ILLEGAL}\nCUDA kernel errors …")])
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_an_engine_whose_gpu_has_failed_is_dead(gpt2, monkeypatch, error):
    """Nothing is tried on it any more, and all are told: those who were computed and those who waited."""
    engine, tried = Engine(gpt2, None, max_running=1), []
    monkeypatch.setattr(engine.model_step, "forward", raises(error))
    monkeypatch.setattr(engine.cache, "scrub", tried.append)
    requests = [engine.submit(prompt(5), GREEDY) for _ in range(3)]
    engine.start()
    for request in requests:
        with pytest.raises(RequestFailed, match="the GPU has failed: CUDA error"):
            request.result(timeout=10)
    assert engine.dead and engine.closed and not tried
    with pytest.raises(RequestFailed, match="closed"):
        engine.submit(prompt(5), GREEDY)
    engine.close()


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory"), torch.AcceleratorError("CUDA error: out of memory")]
)
def test_a_gpu_without_memory_fails_who_took_part_and_goes_on(gpt2, monkeypatch, error):
    engine = Engine(gpt2, None)
    with monkeypatch.context() as patch:
        patch.setattr(engine.model_step, "forward", raises(error))
        with pytest.raises(type(error)):
            engine.run([prompt(5)], GREEDY)
    assert not engine.dead
    assert tokens_of(engine.run([prompt(5)], GREEDY)) == [alone(gpt2, prompt(5), 20)]


def raises(error):
    """A function that raises it, whatever it is given."""

    def fail(*_):
        raise error

    return fail


def test_the_cache_is_as_large_as_is_needed_and_there_is_room_for(gpt2, monkeypatch):
    """Three short requests take little; on a GPU its free memory is the limit, and a whole context always fits."""
    config = GPTConfig(1000, d_model=64, n_layers=2, n_heads=4, max_seq_len=1024)  # 512 bytes a token in bf16
    size = partial(default_cache_tokens, config, torch.bfloat16)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (10_000_000, 80_000_000_000))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 5_000_000)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 3_000_000)
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert size(cuda, 8) == 8 * (1024 + 16) and size(cuda, 3, longest=100) == 1024 and size(cuda, 20, 100) == 20 * 128
    assert size(cuda, 64) == 12_000_000 * 8 // 10 // 512
    assert size(cpu, 10_000) == 2**30 // 512
    engine = Engine(gpt2, None, max_running=50, longest=20)
    assert engine.cache.n_tokens == 50 * 48 and engine.prefill_chunk == 256
    assert tokens_of(engine.run(PROMPTS, GREEDY)) == [alone(gpt2, ids, 20) for ids in PROMPTS]


def test_a_result_may_time_out_and_come_later(gpt2):
    with Engine(gpt2, None) as engine:
        request = engine.submit(prompt(5), SamplingParams(90, temperature=0, ignore_eos=True))
        with pytest.raises(TimeoutError):
            request.result(timeout=0)
        assert len(request.result(timeout=60).token_ids) == 90


def test_statistics_add_up(gpt2):
    engine = Engine(gpt2, None, reuse_prefixes=False)
    engine.run(PROMPTS, GREEDY)
    statistics = engine.statistics()
    assert statistics.submitted == statistics.finished["length"] == len(PROMPTS)
    assert statistics.tokens_generated == 20 * len(PROMPTS)
    assert statistics.tokens_prefilled == sum(len(ids) for ids in PROMPTS if len(ids) > 1)
    assert statistics.time_to_first_token.count == len(PROMPTS)
    assert statistics.between_tokens.count == 19 * len(PROMPTS)
    assert 0 < statistics.between_tokens.quantile(0.5) <= statistics.between_tokens.quantile(0.99)
    assert min(statistics.model_seconds, statistics.sampling_seconds, statistics.overhead_seconds) > 0
