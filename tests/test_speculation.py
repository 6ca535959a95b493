"""Speculative decoding: the same tokens with any drafter and none, and drafts only where they pay."""

from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from fixed_cost import FixedCost, speculating
from plain_generation import CONTEXT, GREEDY, PROMPTS, alone, prompt, tokens_of

from byte_level_bpe import ByteLevelBPETokenizer
from checkpoint import save_checkpoint
from command_line import UserError, parse_config
from gpt_model import ARCHITECTURES, GPTConfig, GPTModel
from inference import kv_cache_infer
from inference.chat import ChatConfig
from inference.draft_model import DraftModel, SpeculationOptions
from inference.engine import Engine
from inference.kv_cache_infer import GenerationConfig
from inference.quantizer import prepare_for_inference
from inference.request import Request, RequestFailed
from inference.sampling import SamplingParams, TokenSampler, sample_batch
from inference.service.settings import ServiceSettings
from inference.speculation import (
    MOST,
    PROBE_EVERY,
    PROBES,
    REST,
    Acceptance,
    Cost,
    IndexedText,
    PromptLookup,
    Speculation,
    verify,
)


class Drafts:
    """Proposes what a function makes of a request's context and the number of tokens that are wanted."""

    def __init__(self, propose):
        self.of, self.dropped = propose, Counter()

    def propose(self, wanted):
        return [self.of(request.context, most)[:most] for request, most in wanted]

    def drop(self, request):
        self.dropped[request] += 1


def knowing(answers, mistake_every=0):
    """A drafter that knows the answers to prompts, but for one token of so many."""

    def propose(context, most):
        for prompt_ids, answer in answers:
            whole = [*prompt_ids, *answer]
            if whole[: len(context)] == context:
                following = range(len(context), min(len(context) + most, len(whole)))
                return [(whole[at] + (mistake_every > 0 and at % mistake_every == 0)) % 64 for at in following]
        return [0] * most

    return Drafts(propose)


def wrong(context, most):
    return [(context[-1] + 1 + at) % 64 for at in range(most)]


# -- the same tokens ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weights", [None, "fp16", "int8", "int8_dynamic"])
@pytest.mark.parametrize("architecture", ["gpt2", "modern", "moe"])
def test_greedy_tokens_are_those_without(architecture, weights):
    """Alone and together, with drafts that are right, wrong, partly right, and looked up."""
    torch.manual_seed(0)
    sizes = dict(vocab_size=64, d_model=32, n_layers=2, n_heads=4, max_seq_len=CONTEXT)
    model = GPTModel.from_config(GPTConfig(**{**ARCHITECTURES[architecture], **sizes})).eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.add_(torch.randn_like(parameter), alpha=0.2)
    model = prepare_for_inference(model, weights) if weights else model
    expected = tokens_of(Engine(model, None).run(PROMPTS, GREEDY))
    answers = list(zip(PROMPTS, expected, strict=True))
    for drafter in (knowing(answers), knowing(answers, mistake_every=4), Drafts(wrong), PromptLookup()):
        engine = speculating(model, drafter, max_running=3)
        assert tokens_of(engine.run(PROMPTS, GREEDY)) == expected
        assert engine.statistics().tokens_drafted > 0
        assert engine.run(PROMPTS[:1], GREEDY)[0].token_ids == expected[0]


def test_without_a_compiler_and_in_the_cache_of_8_bits(random_model, cpu_level):
    model = random_model("modern", max_seq_len=CONTEXT)
    for settings in ({}, {"cache_dtype": torch.int8}):
        expected = tokens_of(Engine(model, None, **settings).run(PROMPTS, GREEDY))
        engine = speculating(model, knowing(list(zip(PROMPTS, expected, strict=True)), 3), **settings)
        assert tokens_of(engine.run(PROMPTS, GREEDY)) == expected
        assert 0 < engine.statistics().tokens_accepted < engine.statistics().tokens_drafted


def test_right_drafts_spare_passes(random_model):
    """20 tokens: the prompt's pass brings one, the next one as many as a draft may have and one more."""
    model = random_model(max_seq_len=CONTEXT)
    expected = tokens_of(Engine(model, None).run(PROMPTS[:1], GREEDY))
    engine = speculating(model, knowing([(PROMPTS[0], expected[0])]))
    assert tokens_of(engine.run(PROMPTS[:1], GREEDY)) == expected
    statistics = engine.statistics()
    assert statistics.steps == 3
    assert (statistics.drafts, statistics.tokens_drafted, statistics.tokens_accepted) == (2, MOST + 2, MOST + 2)
    assert statistics.tokens_generated == 20 and statistics.tokens_prefilled == len(PROMPTS[0])


SETTINGS = {
    "temperature": SamplingParams(temperature=0.7),
    "top_k": SamplingParams(top_k=5, logprobs=2),
    "top_p": SamplingParams(top_p=0.8, temperature=1.5),
    "min_p": SamplingParams(min_p=0.1),
    "penalties": SamplingParams(repetition_penalty=1.3, presence_penalty=0.5, frequency_penalty=0.3),
    "bias": SamplingParams(logit_bias={7: 2.0}, banned_tokens=(8, 9), logprobs=1),
    "greedy_penalties": SamplingParams(temperature=0, repetition_penalty=1.5, logprobs=3),
    "prompt": SamplingParams(prompt_logprobs=1, temperature=2.0),
    "stop": SamplingParams(stop_token_ids=(3, 11, 20, 31, 40, 50)),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_a_seed_draws_the_same_tokens(random_model, name):
    """With all that a request may ask for, in company, short of memory, and whatever is drafted."""
    model = random_model(max_seq_len=CONTEXT)
    settings = [replace(SETTINGS[name], max_gen_len=24, seed=seed) for seed in range(len(PROMPTS))]
    expected = Engine(model, None).run(PROMPTS, settings)
    answers = list(zip(PROMPTS, tokens_of(expected), strict=True))
    for drafter, memory in ((knowing(answers, 5), None), (Drafts(wrong), CONTEXT), (PromptLookup(), CONTEXT)):
        engine = speculating(model, drafter, cache_tokens=memory)
        for found, right in zip(engine.run(PROMPTS, settings), expected, strict=True):
            assert (found.token_ids, found.finish_reason) == (right.token_ids, right.finish_reason)
            for ours, theirs in ((found.log_probs, right.log_probs), (found.prompt_log_probs, right.prompt_log_probs)):
                assert [each.token_id for each in ours or []] == [each.token_id for each in theirs or []]
                values = [torch.tensor([each.log_prob or 0.0 for each in side or []]) for side in (ours, theirs)]
                torch.testing.assert_close(*values, atol=1e-4, rtol=0)
        assert engine.cache.n_used == 0 and len(engine.cache.free_slots) == engine.max_running
        assert memory is None or engine.statistics().preemptions > 0


@pytest.mark.parametrize(
    "settings", [{"temperature": 0.6}, {"top_k": 3}, {"top_p": 0.7}, {"temperature": 2, "top_k": 6}]
)
def test_the_distribution_is_that_of_the_model(settings):
    """Two tokens drawn 6,000 times after a draft that is mostly bad: χ² of the pairs against their probabilities."""
    torch.manual_seed(1)
    V, n = 8, 6000
    logits = 1.5 * torch.randn(1 + V, V)  # after the context, and after each token that may follow
    params = SamplingParams(**settings)

    def probabilities(row):
        scores = row / params.temperature
        if params.top_k:
            scores = scores.masked_fill(scores < scores.topk(params.top_k).values[-1], -torch.inf)
        p = scores.softmax(-1)
        order = p.argsort(descending=True)
        p[order[p[order].cumsum(0) - p[order] >= params.top_p]] = 0
        return p / p.sum()

    first = probabilities(logits[0])
    expected = n * first.unsqueeze(1) * torch.stack([probabilities(row) for row in logits[1:]])  # (V, V)
    bad = int(first.masked_fill(first == 0, 2).argmin())  # the least likely token that is possible
    drafts = [[bad if seed % 2 else int(first.argmax())] for seed in range(n)]
    samplers = [TokenSampler(replace(params, seed=seed)) for seed in range(n)]
    found = verify(logits[[row for (draft,) in drafts for row in (0, 1 + draft)]], samplers, drafts)
    pairs = [tokens.token_ids for tokens in found]
    accepted = sum(len(pair) - 1 for pair in pairs)
    short = [index for index in range(n) if len(pairs[index]) == 1]  # their second token comes from another pass
    rows = logits[[1 + pairs[index][0] for index in short]]
    for index, token_id in zip(short, sample_batch(rows, [samplers[i] for i in short]).token_ids, strict=True):
        pairs[index].append(token_id)
    counts = torch.zeros(V, V)
    for pair in pairs:
        counts[pair[0], pair[1]] += 1
    possible = expected > 0
    assert counts[~possible].sum() == 0
    statistic = float(((counts - expected)[possible] ** 2 / expected[possible]).sum())
    degrees = int(possible.sum()) - 1
    assert statistic < degrees + 4 * (2 * degrees) ** 0.5, "four standard deviations of χ²"
    rate = float(first[bad] + first.max()) / 2
    assert abs(accepted / n - rate) < 4 * (rate * (1 - rate) / n) ** 0.5, "accepted with the model's probability"


# -- ends, failures, statistics ----------------------------------------------------------------------------------------


def test_answers_end_where_they_end(random_model, tokenizer):
    """At a stop string inside a draft, at max_gen_len, at the context's end, and they slide beyond it."""
    model = random_model(vocab_size=len(tokenizer), max_seq_len=48)
    long = SamplingParams(200, temperature=0, ignore_eos=True)
    whole = Engine(model, tokenizer).run(["巴黎"], long)[0]
    characters = [c for c in whole.text if c != "\ufffd"]
    stop = whole.text[len(whole.text) // 2 :][:2]
    assert characters and stop
    slide = replace(long, overflow="slide", max_gen_len=90)
    short, stopped = replace(long, max_gen_len=7), replace(long, stop=(stop,))
    for params in (long, short, stopped, slide, replace(slide, stop=(stop,))):
        expected = Engine(model, tokenizer).run(["巴黎"], params)
        ids = tokenizer.encode("巴黎", add_special_tokens=True)["input_ids"]
        for drafter in (knowing([(ids, expected[0].token_ids)]), PromptLookup(), Drafts(wrong)):
            engine = speculating(model, drafter, tokenizer)
            assert engine.run(["巴黎"], params) == expected
            assert engine.cache.n_used == 0
    pieces = list(speculating(model, PromptLookup(), tokenizer).submit("巴黎", long).stream())
    assert "".join(pieces) == whole.text


def test_nothing_is_drafted_beyond_an_end(random_model, tokenizer):
    """A draft stops before a token that ends the answer, unless that is to be ignored."""
    model, end = random_model(vocab_size=len(tokenizer), max_seq_len=CONTEXT), tokenizer.eos_token_id
    for ignore_eos, expected in ((False, 2), (True, 5)):
        engine = speculating(model, Drafts(lambda context, most: [7, 8, end, 9, 9]), tokenizer)
        request = engine.submit([5, 6], SamplingParams(30, temperature=0, ignore_eos=ignore_eos))
        engine.step()
        engine.step()
        assert len(request.draft) == expected


def test_answers_of_a_form(random_model, tokenizer):
    """JSON of a schema, with drafts that the form does not allow and such that it does."""
    structured = pytest.importorskip("inference.service.structured")
    pytest.importorskip("llguidance")
    model = random_model(vocab_size=len(tokenizer), max_seq_len=CONTEXT)
    properties = {"n": {"type": "integer"}, "s": {"enum": ["a", "b"]}}
    schema = {"type": "object", "properties": properties, "required": ["n", "s"]}
    form = structured.json_form(tokenizer, schema)
    for params in (SamplingParams(60, temperature=0, form=form), SamplingParams(60, seed=1, form=form)):
        expected = Engine(model, tokenizer).run([[5, 6, 7]], params)
        for drafter in (knowing([([5, 6, 7], expected[0].token_ids)]), PromptLookup(), Drafts(wrong)):
            assert speculating(model, drafter, tokenizer).run([[5, 6, 7]], params) == expected


def test_damaged_weights_show_where_they_would(random_model):
    """A drafted token whose embedding is NaN spoils nothing as long as it is wrong; the failure is that without it."""
    model = random_model("gpt2", max_seq_len=CONTEXT, tie_embeddings=False)
    expected = tokens_of(Engine(model, None).run(PROMPTS, GREEDY))
    never = next(t for t in range(64) if all(t not in ids for ids in (*expected, *PROMPTS)))
    some = expected[0][5]
    for damaged, fails in ((never, False), (some, True)):
        weight = model.token_embedding.weight.data.clone()
        model.token_embedding.weight.data[damaged] = torch.nan
        for drafter in (Drafts(lambda context, most, t=damaged: [t] * most), knowing([(PROMPTS[0], expected[0])])):
            request = speculating(model, drafter).submit(PROMPTS[0], GREEDY)
            if fails:
                with pytest.raises(RequestFailed, match="not finite"):
                    request.result()
                assert request.token_ids == expected[0][: len(request.token_ids)]
            else:
                assert request.result().token_ids == expected[0]
        model.token_embedding.weight.data.copy_(weight)


def test_a_drafter_forgets_with_the_engine(random_model):
    """Whoever has ended, or lost its memory, is dropped."""
    model = random_model(max_seq_len=CONTEXT)
    drafter = PromptLookup()
    engine = speculating(model, drafter, cache_tokens=CONTEXT)
    engine.run(PROMPTS * 2, replace(GREEDY, max_gen_len=60))
    assert engine.statistics().preemptions > 0
    assert drafter.texts == {} and engine.speculation._own == {}


def test_drafts_take_no_memory_that_others_need(random_model):
    """As many requests give way with drafts as without."""
    model = random_model(max_seq_len=CONTEXT)
    prompts, params = [prompt(20, seed) for seed in range(5)], SamplingParams(60, temperature=0, ignore_eos=True)
    counts = []
    for engine in (
        Engine(model, None, cache_tokens=CONTEXT),
        speculating(model, Drafts(wrong), cache_tokens=CONTEXT),
    ):
        engine.run(prompts, params)
        counts.append(engine.statistics().preemptions)
    assert counts[0] > 0 and counts[1] <= counts[0]


# -- looking it up, and what pays --------------------------------------------------------------------------------------


def test_lookup_takes_the_longest_and_the_newest():
    text = IndexedText()
    assert text.continuation(3) == []
    text.extend([1, 2, 3, 4, 9, 3, 5, 2, 3])
    assert text.continuation(2) == [4, 9], "after 2, 3; after 3 alone 5 is newer"
    text.extend([8, 3])
    assert text.continuation(3) == [8, 3, 8], "a text that repeats itself goes on with its own draft"
    text.extend([77])
    assert text.continuation(3) == []


def test_lookup_does_not_look_through_the_text():
    """However long it is, a token costs a few entries."""
    text = IndexedText()
    text.extend(torch.randint(5000, (20_000,), generator=torch.Generator().manual_seed(0)).tolist())
    before = len(text.follower)
    text.extend([6000, 6001])
    assert len(text.follower) - before <= 8
    text.extend(text.ids[100:104])
    assert text.continuation(5) == text.ids[104:109]


def line(token_seconds, pass_seconds=1.0, draft_seconds=0.0):
    speculation = Speculation(Drafts(wrong))
    speculation.passes, speculation.drafts = FixedCost(token_seconds, pass_seconds), FixedCost(draft_seconds, 0.0)
    return speculation


def request_of(accepted, tried, speculation):
    request = Request(None, [5], SamplingParams())
    speculation.acceptance_of(request).accepted, speculation.acceptance_of(request).tried = accepted, tried
    return request


@pytest.mark.parametrize("rate", [0.1, 0.3, 0.6, 0.9])
@pytest.mark.parametrize("token_seconds", [0.02, 0.1, 0.3])
@pytest.mark.parametrize("draft_seconds", [0.0, 0.1])
def test_the_length_is_the_best_one(rate, token_seconds, draft_seconds):
    """Of all lengths it is the one with most expected tokens a second."""
    speculation = line(token_seconds, draft_seconds=draft_seconds)
    (length,) = speculation.lengths([(request_of(rate, 1.0, speculation), 100)], n_tokens=1, n_answers=1)

    def tokens_per_second(k):
        return sum(rate**i for i in range(k + 1)) / (1 + token_seconds * (1 + k) + draft_seconds * k)

    assert length == max(range(MOST + 1), key=tokens_per_second)


def test_drafting_ends_where_it_does_not_pay():
    """For hopeless requests, for expensive tokens, in a full batch; but for two probes after so many."""
    speculation = line(token_seconds=0.1)
    good, bad = request_of(90, 100, speculation), request_of(1, 100, speculation)
    assert speculation.lengths([(good, 9), (bad, 9)], 2, 2)[0] > 3
    lengths = [speculation.lengths([(bad, 9)], 1, 1)[0] for _ in range(2 * PROBE_EVERY + 1)]
    assert Counter(lengths) == {0: 2 * PROBE_EVERY - 3, PROBES[0]: 2, PROBES[1]: 2}
    assert line(token_seconds=0.1, pass_seconds=0.0).lengths([(good, 9)], 16, 16) == [0], "arithmetic is the limit"
    assert Speculation(Drafts(wrong)).lengths([(good, 9)], 1, 1) == [0], "nothing is known yet"


def test_a_bad_drafter_is_soon_asked_no_more(random_model):
    """And the requests that come later profit from what was seen."""
    model = random_model(max_seq_len=CONTEXT)
    engine = speculating(model, Drafts(wrong), token_seconds=0.2)
    params = SamplingParams(100, temperature=0, ignore_eos=True)
    engine.run([prompt(5)], params)
    first = engine.statistics().tokens_drafted
    engine.run([prompt(5, 1)], params)
    assert engine.statistics().tokens_drafted - first <= (100 // PROBE_EVERY + 1) * sum(PROBES)
    assert engine.speculation.overall.rate < 0.2


def test_nobody_is_asked_for_a_while_where_nothing_pays(random_model):
    """It costs a small model a tenth of its time to ask; who comes meanwhile does not wait for the end of the rest."""
    model, asked = random_model(max_seq_len=CONTEXT), []
    engine = speculating(model, Drafts(wrong), token_seconds=1.0)
    usual = engine.speculation.lengths
    engine.speculation.lengths = lambda *given: asked.append(len(given[0])) or usual(*given)
    engine.run([prompt(5)], SamplingParams(50, temperature=0, ignore_eos=True))
    assert asked.count(1) < 50 / REST + 3
    asked.clear()
    engine.run([prompt(5)], SamplingParams(3, temperature=0, ignore_eos=True))
    assert asked.count(1) == 1


def test_probes_read_contexts_rarely():
    """Where reading takes as long as many passes, there are as many passes between two probes."""
    speculation = line(token_seconds=0.1)
    bad = request_of(1, 100, speculation)
    speculation._probe_after = 5 * PROBE_EVERY
    lengths = [speculation.lengths([(bad, 9)], 1, 1)[0] for _ in range(5 * PROBE_EVERY + 1)]
    assert Counter(lengths) == {0: 5 * PROBE_EVERY - 1, PROBES[0]: 1, PROBES[1]: 1}


def test_a_draft_whose_first_token_is_dear_may_still_pay():
    """A small model reads what was right and one more token before it drafts the first: only longer drafts pay then."""
    speculation = line(token_seconds=0.05)
    speculation.drafts.seconds = lambda n_tokens: 0.9 + 0.05 * n_tokens
    speculation.drafts.token_seconds = 0.05
    assert speculation.lengths([(request_of(95, 100, speculation), 100)], n_tokens=1, n_answers=1)[0] > 5


def test_reading_a_context_is_not_what_a_draft_costs(random_model, monkeypatch):
    """A small model reads a whole prompt before its first token; taken for the price of drafts, it would end them."""
    model, clock = random_model(max_seq_len=CONTEXT), SimpleNamespace(now=0.0)
    monkeypatch.setattr("inference.speculation.time", SimpleNamespace(perf_counter=lambda: clock.now))
    (expected,) = tokens_of(Engine(model, None).run(PROMPTS[:1], GREEDY))
    knows, known = knowing([(PROMPTS[0], expected)], mistake_every=3).of, set()

    def slow_at_first(context, most):
        clock.now += 0.001 if known else 1.0
        known.add(len(context))
        return knows(context, most)

    engine = Engine(model, None, drafter=Drafts(slow_at_first))
    engine.speculation.passes = FixedCost(0.0, 0.01)
    assert tokens_of(engine.run(PROMPTS[:1], GREEDY)) == [expected]
    assert engine.statistics().drafts > 3 and engine.speculation.drafts.seconds(1) == pytest.approx(0.001)


def test_costs_are_a_line():
    """From times with outliers, base and slope come out; without two widths there is no slope."""
    cost = Cost()
    for _ in range(10):
        cost.add(1, 0.010)
    assert cost.token_seconds == 0 and cost.seconds(5) == pytest.approx(0.010)
    generator = torch.Generator().manual_seed(0)
    for number in range(300):
        n_tokens = int(torch.randint(1, 9, (), generator=generator))
        cost.add(n_tokens, (0.009 + 0.001 * n_tokens) * (20 if number % 10 == 0 else 1))
    assert cost.token_seconds == pytest.approx(0.001, rel=0.3)
    assert cost.seconds(4) == pytest.approx(0.013, rel=0.1)
    acceptance = Acceptance()
    for _ in range(200):
        acceptance.add(4, 2)
    assert acceptance.rate == pytest.approx(2 / 3, abs=0.02)


# -- a small model drafts ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("params", [GREEDY, replace(GREEDY, temperature=0.8, top_k=9), SETTINGS["penalties"]])
def test_a_model_drafts_for_itself(random_model, params):
    """Its drafts are right but where it drafts nothing, sampled ones, too: both draw with the same random numbers."""
    model = random_model(max_seq_len=CONTEXT)
    settings = [replace(params, max_gen_len=20, seed=seed) for seed in range(len(PROMPTS))]
    expected = tokens_of(Engine(model, None).run(PROMPTS, settings))
    engine = speculating(model, DraftModel(model))
    assert tokens_of(engine.run(PROMPTS, settings)) == expected
    statistics = engine.statistics()
    assert statistics.tokens_accepted == statistics.tokens_drafted > 100
    assert engine.speculation.drafter.cache.n_used == 0 and engine.speculation.drafter.known == {}


@pytest.mark.parametrize("settings", [{}, {"cache_tokens": CONTEXT}, {"max_running": 2}])
def test_another_model_drafts(random_model, settings):
    """One with a shorter context, little room and small steps, for answers that give way and slide."""
    model, small = random_model(max_seq_len=CONTEXT), random_model("modern", n_layers=1, max_seq_len=64)
    params = SamplingParams(45, temperature=0, ignore_eos=True, overflow="slide")
    expected = tokens_of(Engine(model, None).run(PROMPTS[:5], params))
    drafter = DraftModel(small, max_running=3, prefill_chunk=16)
    engine = speculating(model, drafter, **settings)
    assert tokens_of(engine.run(PROMPTS[:5], params)) == expected
    assert engine.statistics().tokens_drafted > 0
    assert drafter.cache.n_used == 0 and drafter.known == {}


def test_a_draft_goes_on_from_what_was_right(random_model):
    """Its cells are those of the answer: it proposes what the small model would write after the whole context."""
    model, small = random_model(max_seq_len=CONTEXT), random_model("modern", max_seq_len=CONTEXT)
    drafter = DraftModel(small)
    engine = speculating(model, drafter)
    request = engine.submit(PROMPTS[2], GREEDY)
    while not request.finished:
        context = request.context.copy()
        engine.step()
        if request.draft and not request.finished:
            assert request.draft == alone(small, context, len(request.draft))
    assert engine.statistics().drafts > 2


def options_with(path, **changes):
    return SpeculationOptions(**{"draft_model": str(path), **changes})


def test_a_draft_model_must_have_the_same_tokenizer(random_model, tokenizer, tmp_path):
    """One sentence for another tokenizer; --speculate off and a draft model do not go together."""
    other = ByteLevelBPETokenizer(vocab_size=300)
    other.train(["completely different words"] * 3)
    model = random_model(vocab_size=len(tokenizer))
    for name, its_own in (("same", tokenizer), ("other", other)):
        small = random_model("modern", vocab_size=len(its_own), n_layers=1)
        save_checkpoint(
            tmp_path / name, model_state=small.state_dict(), config=small.config, tokenizer=its_own, stage="sft"
        )
    assert isinstance(options_with(tmp_path / "same").drafter(model, tokenizer, 2, "auto"), DraftModel)
    with pytest.raises(UserError, match="other has another tokenizer than the model"):
        options_with(tmp_path / "other").drafter(model, tokenizer, 2, "auto")
    assert isinstance(SpeculationOptions(speculate="lookup").drafter(model, tokenizer, 2, "auto"), PromptLookup)
    assert SpeculationOptions().drafter(model, tokenizer, 2, "auto") is None
    for config in (GenerationConfig, ChatConfig, ServiceSettings):
        with pytest.raises(UserError, match="--speculate and --draft_model do not go together"):
            parse_config(config, ["--speculate", "off", "--draft_model", "x"], description="")


def test_the_command_line_says_how_many_were_right(random_model, tokenizer, tmp_path, capsys):
    model = random_model(vocab_size=len(tokenizer), max_seq_len=CONTEXT)
    path = str(tmp_path / "model.pth")
    save_checkpoint(path, model_state=model.state_dict(), config=model.config, tokenizer=tokenizer, stage="pretrain")
    given = f"--model_path {path} --prompt 法国 --temperature 0 --max_gen_len 100 --ignore_eos --num_threads 1".split()
    texts = []
    for more in (["--speculate", "off"], ["--draft_model", path]):
        kv_cache_infer.main(given + more)
        said = capsys.readouterr()
        texts.append(said.out)
        assert ("drafted tokens were right" in said.err) == ("--draft_model" in more)
    assert texts[0] == texts[1]
