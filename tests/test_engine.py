"""The engine: whoever else is there, whatever is preempted, shared or cut into chunks, an answer stays the same."""

import gc
import time
import weakref
from dataclasses import replace

import pytest
import torch
from plain_generation import CONTEXT, GREEDY, PROMPTS, alone, prompt, tokens_of

from inference.engine import Engine, QueueFull
from inference.kernels import paged_attention
from inference.kernels.paged_attention import BLOCK_SIZE
from inference.sampling import SamplingParams


@pytest.fixture(params=["gpt2", "modern"])
def model(request, random_model, cpu_level):
    return random_model(request.param, max_seq_len=CONTEXT)


def recording_logits(engine, monkeypatch):
    """The logits that the engine computes, step by step."""
    recorded, forward = [], engine.model_step.forward
    monkeypatch.setattr(engine.model_step, "forward", lambda *step: recorded.append(forward(*step)) or recorded[-1])
    return lambda: [logits for _, logits in recorded]


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


def test_half_precision_takes_the_plain_way(model):
    """A bf16 model has bf16 cells; greedy tokens are those of the same model without cache, but for near ties."""
    model = model.to(torch.bfloat16)
    engine = Engine(model, None)
    assert engine.cache.native is None and engine.cache.keys.dtype == torch.bfloat16
    first = [ids[0] for ids in tokens_of(engine.run(PROMPTS, GREEDY))]
    same = [token == alone(model, ids, 1)[0] for token, ids in zip(first, PROMPTS, strict=True)]
    assert sum(same) >= len(PROMPTS) - 1


def test_logits_of_the_engine_are_the_models(model, monkeypatch):
    """Within 1e-4, at every step of an answer, after a prompt in chunks and among others."""
    ids = prompt(50)
    expected = model(torch.tensor([ids + alone(model, ids, 20)]))["logits"][0, 49:-1].detach()  # (20, V)
    engine = Engine(model, None, prefill_chunk=16)
    recorded = recording_logits(engine, monkeypatch)
    engine.run([ids], GREEDY)
    torch.testing.assert_close(torch.cat(recorded()), expected, atol=1e-4, rtol=1e-4)
    n_steps = len(recorded())
    engine.run([prompt(3, 9), ids, prompt(30, 8)], GREEDY)
    among_others = torch.cat(recorded()[n_steps:])
    for logits in expected:
        distance = float((among_others - logits).abs().amax(dim=-1).min())
        assert distance < 1e-4


@pytest.mark.parametrize("settings", [{}, {"prefill_chunk": 7}, {"cache_tokens": CONTEXT + BLOCK_SIZE}])
def test_log_probabilities_of_prompts_are_the_models(gpt2, settings):
    """In any company, in chunks, put back for want of memory, and where the cache holds the prompt's beginning."""
    ids = prompt(60)
    prompts = [ids, prompt(3, 9), [*ids[:50], *prompt(30, 8)], [5], ids]
    engine = Engine(gpt2, None, **settings)
    engine.run([ids], GREEDY)
    scored = SamplingParams(20, temperature=0, prompt_logprobs=2)
    answers = engine.run(prompts, [scored, GREEDY, replace(scored, n=2, temperature=3.0), scored, scored])
    assert answers[1].prompt_log_probs is answers[3].prompt_log_probs is None
    assert answers[0].token_ids == alone(gpt2, ids, 20)
    for tokens, answer in zip(prompts, [*answers[:3], *answers[4:]], strict=True):
        if answer.prompt_log_probs is None:
            continue
        expected = gpt2(torch.tensor([tokens]))["logits"][0, :-1].log_softmax(dim=-1).detach()  # (T - 1, V)
        first, *others = answer.prompt_log_probs
        assert first.log_prob is None and [each.token_id for each in answer.prompt_log_probs] == tokens
        found, own = torch.tensor([each.log_prob for each in others]), expected[range(len(others)), tokens[1:]]
        torch.testing.assert_close(found, own, atol=1e-4, rtol=0)
        assert [list(each.likeliest) for each in others] == expected.topk(2).indices.tolist()


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
    assert statistics.tokens_reused == 2 * (50 // BLOCK_SIZE * BLOCK_SIZE)
    assert without.statistics().tokens_reused == 0
    answer = engine.run(prompts[:1], GREEDY)[0].token_ids
    longer = prompts[0] + answer + prompt(5, 77)
    reused = engine.statistics().tokens_reused
    assert engine.run([longer], GREEDY)[0].token_ids == alone(model, longer, 20)
    assert engine.statistics().tokens_reused - reused == (len(prompts[0]) + 19) // BLOCK_SIZE * BLOCK_SIZE


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
    running, short = engine.submit(ids + [11], GREEDY), engine.submit(ids[:10], GREEDY)
    engine.step()
    with torch.no_grad():
        gpt2.token_embedding.weight.mul_(-0.7)
    engine.forget()
    running.result()
    assert engine.run([ids], GREEDY)[0].token_ids == alone(gpt2, ids, 20)
    ids = ids[:10] + short.result().token_ids  # whose first tokens are in the cache as the old weights saw them
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


def test_a_step_never_computes_more_of_prompts_than_its_budget(gpt2, monkeypatch):
    """However many prompts wait, so that the time of a step is bounded."""
    engine, sizes = Engine(gpt2, None, prefill_chunk=24), []
    forward = engine.model_step.forward
    monkeypatch.setattr(engine.model_step, "forward", lambda ids, last: sizes.append(len(ids)) or forward(ids, last))
    engine.run([prompt(50, seed) for seed in range(5)], GREEDY)
    assert 24 <= max(sizes) <= 24 + 5


def test_first_come_first_served(gpt2):
    engine = Engine(gpt2, None, max_running=2)
    requests = [engine.submit(prompt(3 + seed, seed), GREEDY) for seed in range(6)]
    engine.step()
    assert [len(request.token_ids) for request in requests] == [1, 1, 0, 0, 0, 0]
    while not requests[1].finished:
        engine.step()
    engine.step()
    assert [len(request.token_ids) for request in requests] == [20, 20, 1, 1, 0, 0]


def test_who_came_first_keeps_its_place_after_a_slide(gpt2):
    """A request whose context was full computes it again; it is not taken for a young one, which would give way."""
    engine = Engine(gpt2, None, max_running=3)
    params = SamplingParams(200, temperature=0, ignore_eos=True, overflow="slide")
    old = engine.submit(prompt(120), params)
    young = [engine.submit(prompt(5, seed), params) for seed in (1, 2)]
    for _ in range(12):
        engine.step()
    assert len(old.context) < 100, "it has slid"
    assert engine.running == [old, *young]


def test_preemption_is_rare(gpt2):
    """A request is let in only where those who run can grow: few tokens are computed twice."""
    prompts = [prompt(20, seed) for seed in range(20)]
    engine = Engine(gpt2, None, cache_tokens=2 * CONTEXT, reuse_prefixes=False)
    engine.run(prompts, SamplingParams(60, temperature=0, ignore_eos=True))
    statistics = engine.statistics()
    assert 0 < statistics.preemptions < 14
    assert statistics.tokens_prefilled < 900


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


def test_a_finished_request_is_let_go_long_before_its_deadline(gpt2):
    """Of a thousand with an hour each, the engine remembers no more than a few."""
    held = []
    with Engine(gpt2, None) as engine:
        for _ in range(1000):
            request = engine.submit(prompt(5), replace(GREEDY, max_gen_len=1), deadline_s=3600)
            request.result()
            held.append(weakref.ref(request))
        del request
        gc.collect()
        assert sum(reference() is not None for reference in held) <= 2 * 64 + 1


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
