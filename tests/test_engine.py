"""The engine: whoever else is there, whatever is preempted, shared, cut into chunks or fails, an answer stays the same."""

import math
import threading
import time

import pytest
import torch

from command_line import UserError
from inference import paged_attention
from inference.cache_blocks import BLOCK
from inference.engine import Engine, QueueFull, RequestFailed
from inference.sampling import SamplingParams

CONTEXT = 128
GREEDY = SamplingParams(max_gen_len=20, temperature=0, ignore_eos=True)


def prompt(length, seed=0):
    """Random token ids without special tokens."""
    return torch.randint(10, 64, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


PROMPTS = [prompt(length, seed) for seed, length in enumerate((5, 1, 40, 17, 90, 16, 33, 3))]


@pytest.fixture(params=["gpt2", "modern"])
def model(request, random_model):
    return random_model(request.param, max_seq_len=CONTEXT)


@pytest.fixture
def gpt2(random_model):
    return random_model("gpt2", max_seq_len=CONTEXT)


@pytest.fixture
def talker(random_model, tokenizer):
    """A model with the tokenizer's vocabulary, whose tokens are text."""
    return random_model("gpt2", max_seq_len=CONTEXT, vocab_size=len(tokenizer))


@torch.no_grad()
def alone(model, ids, n_tokens):
    """The plainest greedy loop: no cache, no batch."""
    ids = list(ids)
    for _ in range(n_tokens):
        ids.append(int(model(torch.tensor([ids[-model.config.max_seq_len :]]))["logits"][0, -1].argmax()))
    return ids[-n_tokens:]


def tokens_of(generations):
    return [generation.token_ids for generation in generations]


def recording_logits(model, monkeypatch):
    """Logits by the number of tokens they come after, as the engine computes them for one request."""
    recorded = []
    head = model.lm_head.forward
    monkeypatch.setattr(model.lm_head, "forward", lambda hidden: recorded.append(head(hidden)) or recorded[-1])
    return recorded


# -- one answer does not depend on the others --------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [{}, {"max_running": 3}, {"prefill_chunk": 7}, {"prefill_chunk": 1}])
def test_batched_is_alone(model, settings):
    """Prompts of 1 to 90 tokens together, with chunks of any size, give the tokens of the loop without cache."""
    answers = Engine(model, None, **settings).run(PROMPTS, GREEDY)
    assert tokens_of(answers) == [alone(model, ids, 20) for ids in PROMPTS]


def test_the_plain_ways_of_attention_give_the_same(model, monkeypatch):
    """Without a compiler, and with cells that are gathered, tokens are the same."""
    expected = tokens_of(Engine(model, None).run(PROMPTS, GREEDY))
    monkeypatch.setattr(paged_attention, "load_native", lambda source: None)
    engine = Engine(model, None)
    assert engine.cache.native is None
    assert tokens_of(engine.run(PROMPTS, GREEDY)) == expected


def test_logits_of_the_engine_are_the_models(model, monkeypatch):
    """Within 1e-4, at every step of an answer, after a prompt in chunks and among others."""
    ids = prompt(50)
    expected = model(torch.tensor([ids + alone(model, ids, 20)]))["logits"][0, 49:-1]  # (20, V)
    engine = Engine(model, None, prefill_chunk=16)
    recorded = recording_logits(model, monkeypatch)
    engine.run([ids], GREEDY)
    torch.testing.assert_close(torch.cat(recorded), expected, atol=1e-4, rtol=1e-4)
    recorded.clear()
    engine.run([prompt(3, 9), ids, prompt(30, 8)], GREEDY)
    for logits in expected:
        distance = min(float((rows - logits).abs().amax(dim=-1).min()) for rows in recorded)
        assert distance < 1e-4


def test_requests_join_and_leave_at_any_step(model):
    """A new request every second step, some cancelled on the way: those that stay are undisturbed."""
    engine = Engine(model, None, max_running=4)
    requests = []
    for number, ids in enumerate(PROMPTS * 2):
        requests.append(engine.submit(ids, GREEDY))
        if number % 3 == 2:
            requests[number - 1].cancel()
        engine.step()
        engine.step()
    for number, (request, ids) in enumerate(zip(requests, PROMPTS * 2, strict=True)):
        generation = request.result()
        expected = alone(model, ids, 20)
        if number % 3 == 1 and number < 15:
            assert generation.finish_reason == "cancelled"
            assert generation.token_ids == expected[: len(generation.token_ids)]
        else:
            assert generation.token_ids == expected
    assert engine.cache.n_used == 0 and len(engine.cache.free_slots) == 4


def test_sampled_answers_do_not_depend_on_the_batch_either(model):
    """A seed draws the same tokens alone, among others, and when it is preempted."""
    settings = [SamplingParams(20, seed=seed, top_k=20, ignore_eos=True) for seed in range(len(PROMPTS))]
    together = tokens_of(Engine(model, None).run(PROMPTS, settings))
    single = [Engine(model, None).run([ids], one)[0].token_ids for ids, one in zip(PROMPTS, settings, strict=True)]
    assert together == single
    assert tokens_of(Engine(model, None, cache_tokens=CONTEXT).run(PROMPTS, settings)) == single


def test_preempted_is_undisturbed(model):
    """With memory for two of five requests the younger ones give way again and again, and their answers are as ever."""
    params = SamplingParams(60, temperature=0, ignore_eos=True)
    prompts = [prompt(20, seed) for seed in range(5)]
    engine = Engine(model, None, cache_tokens=CONTEXT)
    answers = engine.run(prompts, params)
    assert engine.statistics().preemptions > 0
    assert tokens_of(answers) == [alone(model, ids, 60) for ids in prompts]
    assert engine.cache.n_used == 0


def test_the_oldest_request_is_never_preempted(gpt2):
    """So that there is always one that gets on: the first to come is the first to finish."""
    engine = Engine(gpt2, None, cache_tokens=CONTEXT)
    params = SamplingParams(80, temperature=0, ignore_eos=True)
    requests = [engine.submit(prompt(20, seed), params) for seed in range(4)]
    finished = []
    while len(finished) < 4:
        engine.step()
        finished += [request for request in requests if request.finished and request not in finished]
    assert finished == requests


# -- prefixes ----------------------------------------------------------------------------------------------------------


def test_reused_prefixes_change_nothing_and_spare_their_computation(model):
    """Prompts with 50 tokens in common, and a follow-up to an answer: the same tokens, most of them not computed."""
    common = prompt(50)
    prompts = [common + prompt(n, seed) for seed, n in enumerate((1, 7, 20))]
    engine, without = Engine(model, None), Engine(model, None, reuse_prefixes=False)
    assert tokens_of(engine.run(prompts, GREEDY)) == tokens_of(without.run(prompts, GREEDY))
    statistics = engine.statistics()
    assert statistics.tokens_reused == 2 * (50 // BLOCK * BLOCK)
    assert without.statistics().tokens_reused == 0
    answer = engine.run(prompts[:1], GREEDY)[0].token_ids
    longer = prompts[0] + answer + prompt(5, 77)
    reused = engine.statistics().tokens_reused
    assert engine.run([longer], GREEDY)[0].token_ids == alone(model, longer, 20)
    assert engine.statistics().tokens_reused - reused == (len(prompts[0]) + 19) // BLOCK * BLOCK


def test_samples_of_one_prompt_share_its_prefill(gpt2):
    """n answers differ, repeat with their seed, and the prompt is computed once, though all arrive together."""
    params = SamplingParams(12, seed=3, n=6, ignore_eos=True)
    engine = Engine(gpt2, None, prefill_chunk=16)
    answers = engine.run([prompt(65)], params)
    assert len(answers) == 6 and len({tuple(answer.token_ids) for answer in answers}) == 6
    assert engine.statistics().tokens_prefilled < 65 + 6
    assert tokens_of(Engine(gpt2, None, reuse_prefixes=False).run([prompt(65)], params)) == tokens_of(answers)
    request = engine.submit(prompt(65), params)
    assert [sample.result() for sample in request.samples] == answers


def test_new_weights_need_forget(gpt2):
    """Keys and values of old weights would be reused; `forget` drops them, those of running requests included."""
    engine, ids = Engine(gpt2, None), prompt(60)
    running = engine.submit(ids + [11], GREEDY)
    engine.step()
    with torch.no_grad():
        gpt2.token_embedding.weight.mul_(-0.7)
    engine.forget()
    running.result()
    assert engine.run([ids], GREEDY)[0].token_ids == alone(gpt2, ids, 20)
    assert engine.statistics().tokens_reused == 0


def test_an_int8_cache_is_close(model):
    """Log-probabilities along a text differ by less than 0.05 nats on average; the memory is a quarter and a bit."""
    ids = prompt(30)
    answer = Engine(model, None).run([ids], GREEDY)[0].token_ids
    engine = Engine(model, None, cache_dtype=torch.int8)
    assert engine.cache.keys.dtype == torch.int8
    found = []
    for n_given in range(20):
        params = SamplingParams(1, temperature=1.0, logprobs=64, seed=0)
        (generation,) = engine.run([ids + answer[:n_given]], params)
        found.append(generation.log_probs[0].likeliest[answer[n_given]])
    with torch.no_grad():
        logits = model(torch.tensor([ids + answer]))["logits"][0, 29:-1]
    exact = logits.log_softmax(dim=-1).gather(1, torch.tensor(answer).unsqueeze(1)).squeeze(1)
    assert 0 < (torch.tensor(found) - exact).abs().mean() < 0.05


# -- scheduling --------------------------------------------------------------------------------------------------------


def test_a_long_prompt_does_not_stall_running_answers(gpt2):
    """While 100 tokens of prompt are computed 10 a step, an answer that runs gets its token in every step."""
    engine = Engine(gpt2, None, prefill_chunk=10)
    running = engine.submit(prompt(4), SamplingParams(50, temperature=0, ignore_eos=True))
    engine.step()
    late = engine.submit(prompt(100), GREEDY)
    for n_steps in range(1, 11):
        engine.step()
        assert len(running.token_ids) == 1 + n_steps
        assert len(late.token_ids) == (n_steps == 10)


def test_first_come_first_served(gpt2):
    engine = Engine(gpt2, None, max_running=2)
    requests = [engine.submit(prompt(3 + seed, seed), GREEDY) for seed in range(6)]
    engine.step()
    assert [len(request.token_ids) for request in requests] == [1, 1, 0, 0, 0, 0]
    while not requests[1].finished:
        engine.step()
    engine.step()
    assert [len(request.token_ids) for request in requests] == [20, 20, 1, 1, 0, 0]


def test_cancelling_frees_the_slot_within_one_step(gpt2):
    engine = Engine(gpt2, None, max_running=1)
    first, second, third = (engine.submit(prompt(20, seed), GREEDY) for seed in range(3))
    engine.step()
    third.cancel()
    assert third.finished and third.result().token_ids == []
    first.cancel()
    engine.step()
    assert first.result().finish_reason == "cancelled" and len(first.token_ids) == 1
    assert len(second.token_ids) == 1
    assert second.result().token_ids == alone(gpt2, second.prompt_ids, 20)


def test_a_deadline_ends_what_runs_and_what_waits(gpt2):
    """With what there is so far; others go on."""
    engine = Engine(gpt2, None, max_running=2)
    long = SamplingParams(100, temperature=0, ignore_eos=True)
    timed, other = engine.submit(prompt(5), long, deadline_s=0.05), engine.submit(prompt(6), GREEDY)
    waiting = engine.submit(prompt(7), GREEDY, deadline_s=0.05)
    engine.step()
    time.sleep(0.06)
    engine.step()
    assert timed.result().finish_reason == waiting.result().finish_reason == "deadline"
    assert len(timed.token_ids) == 1 and waiting.token_ids == []
    assert other.result().finish_reason == "length"


def test_the_line_is_bounded(gpt2):
    """As many as can start and as may wait are taken; then QueueFull, until there is room again."""
    engine = Engine(gpt2, None, max_running=2, max_waiting=3)
    requests = [engine.submit(prompt(5), GREEDY) for _ in range(5)]
    with pytest.raises(QueueFull, match="try again later"):
        engine.submit(prompt(5), GREEDY)
    requests[-1].cancel()
    engine.submit(prompt(5), GREEDY).cancel()
    with pytest.raises(QueueFull):
        engine.submit(prompt(5), SamplingParams(n=2))
    assert engine.statistics().rejected == 3
    assert len(engine.run([prompt(5)] * 20, GREEDY)) == 20, "the bound is for submit"


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
    down = gpt2.layers[1].feed_forward.down_proj
    with monkeypatch.context() as patch:
        patch.setattr(down, "forward", lambda x: 1 / 0)
        engine.step()
    for request in requests[:2]:
        with pytest.raises(RequestFailed, match="the computation failed: ZeroDivisionError"):
            request.result()
    for request in requests[2:]:
        assert request.result().token_ids == alone(gpt2, request.prompt_ids, 20)
    assert engine.statistics().failed_steps == 1
    assert engine.cache.n_used == 0


def test_run_raises_what_the_model_raised(gpt2, monkeypatch):
    """A training loop must be able to tell memory that ran out from other errors."""
    engine = Engine(gpt2, None)
    with monkeypatch.context() as patch:
        patch.setattr(gpt2.lm_head, "forward", lambda x: (_ for _ in ()).throw(MemoryError("full")))
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
