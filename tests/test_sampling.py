"""Sampling: the filters are those of `transformers`, the draws follow the distribution, and no row sees another."""

import math

import pytest
import torch

from inference.sampling import (
    SamplingParams,
    TokenSampler,
    draw,
    nucleus_threshold,
    sample_batch,
    sample_next,
    truncate,
)

V = 50


def random_logits(*shape, seed=0, scale=3.0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale


def one_row(logits, prompt_ids=(), index=0, **params):
    """The token that one request takes from logits (V,)."""
    return sample_batch(logits[None], [TokenSampler(SamplingParams(**params), prompt_ids, index)]).token_ids[0]


# --- the filters ----------------------------------------------------------------------------------------------------


def their_filters(params):
    """The logits warpers of `transformers` for the same parameters, in its order."""
    transformers = pytest.importorskip("transformers")
    warpers = transformers.LogitsProcessorList()
    if params.get("top_k"):
        warpers.append(transformers.TopKLogitsWarper(params["top_k"]))
    if params.get("top_p", 1) < 1:
        warpers.append(transformers.TopPLogitsWarper(params["top_p"]))
    if params.get("min_p"):
        warpers.append(transformers.MinPLogitsWarper(params["min_p"]))
    return warpers


@pytest.mark.parametrize(
    "params",
    [
        dict(top_k=1),
        dict(top_k=7),
        dict(top_k=V),
        dict(top_p=0.01),
        dict(top_p=0.5),
        dict(top_p=0.99),
        dict(min_p=0.05),
        dict(min_p=1.0),
        dict(top_k=10, top_p=0.7),
        dict(top_p=0.9, min_p=0.1),
        dict(top_k=20, top_p=0.95, min_p=0.02),
    ],
    ids=str,
)
def test_truncation_keeps_exactly_the_tokens_that_transformers_keeps(params):
    scores = random_logits(40, V)
    expected = their_filters(params)(None, scores.clone())
    full = {"top_k": 0, "top_p": 1.0, "min_p": 0.0, **params}
    kept = truncate(scores, *([full[name]] * 40 for name in ("top_k", "top_p", "min_p")))
    torch.testing.assert_close(kept, expected, rtol=0, atol=0)


@pytest.mark.parametrize("penalty", [1.3, 0.7])
def test_the_repetition_penalty_is_that_of_transformers(penalty):
    """It counts the tokens of the prompt and those of the answer."""
    transformers = pytest.importorskip("transformers")
    sampler = TokenSampler(SamplingParams(repetition_penalty=penalty, temperature=0), prompt_ids=[3, 5, 5])
    ids = [3, 5, 5]
    for step in range(12):
        logits = random_logits(V, seed=step, scale=0.3)
        processor = transformers.RepetitionPenaltyLogitsProcessor(penalty)
        expected = processor(torch.tensor([ids]), logits[None].clone())[0]
        adjusted = logits.clone()
        sampler.adjust(adjusted)
        torch.testing.assert_close(adjusted, expected)
        ids += sample_batch(logits[None], [sampler]).token_ids
    assert len(set(ids)) > 5


def test_bias_and_bans_are_those_of_transformers():
    transformers = pytest.importorskip("transformers")
    logits = random_logits(V)
    bias = transformers.SequenceBiasLogitsProcessor([[[4], 2.5], [[9], -7.0]])
    bans = transformers.NoBadWordsLogitsProcessor([[1], [30]])
    expected = bans(torch.tensor([[0]]), bias(torch.tensor([[0]]), logits[None].clone()))[0]
    TokenSampler(SamplingParams(logit_bias={4: 2.5, 9: -7.0}, banned_tokens=(1, 30))).adjust(logits)
    torch.testing.assert_close(logits, expected)


def test_presence_is_subtracted_once_and_frequency_for_each_time():
    """mu[j] -= c[j] · frequency + (c[j] > 0) · presence, over the answer alone: OpenAI's definition."""
    params = SamplingParams(presence_penalty=0.5, frequency_penalty=0.25, temperature=0)
    sampler = TokenSampler(params, prompt_ids=[1, 2])
    for token in (7, 7, 8):
        peak = torch.zeros(V).index_fill(0, torch.tensor([token]), 100.0)
        assert sample_batch(peak[None], [sampler]).token_ids == [token]
    scores = torch.zeros(V)
    sampler.adjust(scores)
    expected = torch.zeros(V)
    expected[7], expected[8] = -(2 * 0.25 + 0.5), -(0.25 + 0.5)
    assert scores.tolist() == expected.tolist()


def test_steps_come_in_the_order_of_transformers():
    """Bias, repetition penalty, temperature, top-k, top-p: another order would keep other tokens."""
    transformers = pytest.importorskip("transformers")
    params = dict(top_k=12, top_p=0.8, min_p=0.05)
    logits, prompt = random_logits(300, V), [3, 5, 11]
    bias = transformers.SequenceBiasLogitsProcessor([[[4], 2.5]])
    penalty = transformers.RepetitionPenaltyLogitsProcessor(1.5)
    ids = torch.tensor([prompt] * 300)
    expected = penalty(ids, bias(ids, logits.clone()))
    expected = their_filters(params)(None, transformers.TemperatureLogitsWarper(1.7)(None, expected))
    samplers = [
        TokenSampler(SamplingParams(**params, temperature=1.7, repetition_penalty=1.5, logit_bias={4: 2.5}), prompt)
        for _ in range(300)
    ]
    uniforms = torch.tensor([0.0, 0.3, 0.6, 0.999999]).repeat(75)
    for sampler, uniform in zip(samplers, uniforms.tolist(), strict=True):
        sampler.uniform = lambda uniform=uniform: uniform
    assert sample_batch(logits, samplers).token_ids == draw(expected.softmax(-1), uniforms).tolist()


def test_a_wide_nucleus_is_found_beyond_the_first_candidates():
    """Of 5,000 almost equally likely tokens, 90 % are more than the candidates that are looked at first."""
    scores = random_logits(3, 5000, scale=0.1)
    scores[1, 7] = 30.0  # a narrow one beside them
    top_p = torch.tensor([0.9, 0.9, 1.0])
    kept = (scores >= nucleus_threshold(scores, top_p)).sum(dim=1).tolist()
    ordered = scores[0].softmax(-1).sort(descending=True).values
    assert kept == [int((ordered.cumsum(0) - ordered < 0.9).sum()), 1, 5000]


def test_tokens_of_equal_score_stay_or_go_together():
    scores = torch.tensor([[2.0, 1.0, 1.0, 1.0, 0.0]])
    for settings in (dict(top_k=[2], top_p=[1.0]), dict(top_k=[0], top_p=[0.6])):
        assert truncate(scores, **settings, min_p=[0.0]).isfinite().tolist() == [[True, True, True, True, False]]


# --- the draws ------------------------------------------------------------------------------------------------------


def chi_square(counts, probabilities):
    """Pearson's statistic over the tokens that are expected at least five times."""
    expected = probabilities * counts.sum()
    often = expected >= 5
    return ((counts - expected)[often] ** 2 / expected[often]).sum().item(), int(often.sum()) - 1


@pytest.mark.parametrize(
    "params",
    [dict(), dict(temperature=0.5), dict(temperature=2.0, top_k=9), dict(top_p=0.8), dict(min_p=0.05, temperature=1.5)],
    ids=str,
)
def test_draws_follow_the_distribution(params):
    """10,000 draws, and the statistic stays below mean + 4 standard deviations of a chi-square distribution."""
    logits = random_logits(V, scale=1.5)
    sampler = TokenSampler(SamplingParams(**params, seed=0))
    counts = torch.zeros(V)
    for _ in range(10):
        tokens = sample_batch(logits.expand(1000, V), [sampler] * 1000).token_ids
        counts += torch.bincount(torch.tensor(tokens), minlength=V)
    scores = their_filters(params)(None, logits[None] / params.get("temperature", 1.0))
    expected = scores.softmax(-1)[0]
    assert counts[expected == 0].sum() == 0
    statistic, freedom = chi_square(counts, expected)
    assert freedom >= 5 and statistic < freedom + 4 * math.sqrt(2 * freedom)


def test_a_token_without_probability_is_never_drawn():
    """Not at the ends of the unit interval either."""
    probabilities = torch.tensor([[0.0, 0.25, 0.0, 0.75, 0.0]])
    for uniform, token in ((0.0, 1), (0.2499, 1), (0.25, 3), (1 - 2**-53, 3)):
        assert draw(probabilities, torch.tensor([uniform], dtype=torch.float64)).item() == token


SETTINGS = [
    dict(temperature=0),
    dict(),
    dict(temperature=0.7, top_k=5),
    dict(top_p=0.6),
    dict(min_p=0.2, repetition_penalty=1.4),
    dict(presence_penalty=1.0, frequency_penalty=0.5, logit_bias={3: 4.0}),
    dict(temperature=0, repetition_penalty=2.0, logprobs=2),
    dict(top_k=30, top_p=0.9, min_p=0.01, banned_tokens=(1, 2), logprobs=0),
]


@pytest.mark.parametrize("tied", [False, True])
def test_a_row_does_not_depend_on_its_neighbours(tied):
    """Rows with settings of all kinds: together, alone and in another order they take the same tokens; also where many
    tokens are equally likely."""

    def run(order, n_steps=20):
        samplers = {i: TokenSampler(SamplingParams(**SETTINGS[i], seed=i), prompt_ids=[i]) for i in order}
        tokens = {i: [] for i in order}
        for step in range(n_steps):
            logits = random_logits(len(SETTINGS), V, seed=step)
            logits = logits.round() if tied and step % 2 else logits
            sampled = sample_batch(logits[order], [samplers[i] for i in order])
            for i, token in zip(order, sampled.token_ids, strict=True):
                tokens[i].append(token)
        return tokens

    together = run(list(range(len(SETTINGS))))
    assert together == run(list(range(len(SETTINGS)))[::-1])
    for i in range(len(SETTINGS)):
        assert run([i])[i] == together[i]


def test_a_seed_repeats_and_each_of_n_answers_has_numbers_of_its_own():
    def tokens(seed, index=0):
        sampler = TokenSampler(SamplingParams(seed=seed, n=2), index=index)
        return [sample_batch(torch.zeros(1, V), [sampler]).token_ids[0] for _ in range(10)]

    assert tokens(1) == tokens(1)
    assert len({tuple(tokens(seed, index)) for seed in (1, -1, 11) for index in (0, 1)}) == 6


def test_an_unset_seed_comes_from_torchs_global_generator():
    """So that training which samples resumes exactly."""

    def token_ids():
        torch.manual_seed(5)
        return [one_row(torch.zeros(V)) for _ in range(10)]

    first = token_ids()
    assert first == token_ids()
    assert len(set(first)) > 3


def test_greedy_takes_the_likeliest_and_uses_no_randomness():
    """Temperature 0, one too small to divide by, and top-k 1."""
    logits = random_logits(V) * 1e3
    for params in (dict(temperature=0), dict(temperature=1e-40), dict(temperature=1e-300), dict(top_k=1)):
        assert one_row(logits, **params) == logits.argmax().item()
    torch.manual_seed(0)
    before = torch.get_rng_state()
    TokenSampler(SamplingParams(temperature=0))
    assert torch.equal(before, torch.get_rng_state())


def test_logits_are_left_as_they_were():
    logits = random_logits(len(SETTINGS), V)
    before = logits.clone()
    sample_batch(logits, [TokenSampler(SamplingParams(**settings), [1]) for settings in SETTINGS])
    assert torch.equal(logits, before)


def test_rows_of_equal_settings_follow_the_distribution():
    """20,000 draws at temperature 2 from the three likeliest of five tokens, within four standard deviations."""
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0, 3.0])
    generator = torch.Generator().manual_seed(0)
    draws = sample_next(logits.expand(20_000, 5), temperature=2.0, top_k=3, generator=generator)
    expected = torch.where(logits >= 1.0, logits / 2, -math.inf).softmax(dim=0)
    found = draws.bincount(minlength=5) / 20_000
    assert (found - expected).abs().max() < 4 * math.sqrt(0.25 / 20_000)
    assert found[expected == 0].sum() == 0


@pytest.mark.parametrize("top_k", [0, 5, 99])
def test_top_k_of_everything_is_no_limit(top_k):
    logits = torch.randn(2000, 5, generator=torch.Generator().manual_seed(0))
    unlimited = sample_next(logits, generator=torch.Generator().manual_seed(3))
    assert torch.equal(sample_next(logits, top_k=top_k, generator=torch.Generator().manual_seed(3)), unlimited)


@pytest.mark.parametrize("temperature", [0.0, 1e-40, 1e-300])
def test_a_temperature_too_small_to_divide_by_is_greedy(temperature):
    logits = random_logits(3, V) * 1e3
    assert torch.equal(sample_next(logits, temperature), logits.argmax(dim=-1))


# --- what is reported -----------------------------------------------------------------------------------------------


def test_log_probabilities_are_of_the_distribution_before_truncation():
    logits = random_logits(V)
    sampler = TokenSampler(SamplingParams(temperature=0.5, top_k=2, logprobs=3, seed=0))
    sampled = sample_batch(logits[None], [sampler])
    (reported,) = sampled.log_probs
    expected = (logits / 0.5).log_softmax(-1)
    assert reported.token_id == sampled.token_ids[0]
    assert reported.log_prob == pytest.approx(expected[reported.token_id].item())
    assert list(reported.likeliest) == expected.topk(3).indices.tolist()
    assert list(reported.likeliest.values()) == pytest.approx(expected.topk(3).values.tolist())


def test_greedy_reports_temperature_1_and_requests_that_ask_for_nothing_get_nothing():
    logits = random_logits(2, V)
    samplers = [TokenSampler(SamplingParams(temperature=0, logprobs=0)), TokenSampler(SamplingParams(temperature=0))]
    reported, nothing = sample_batch(logits, samplers).log_probs
    assert reported.log_prob == pytest.approx(logits[0].log_softmax(-1).max().item())
    assert reported.likeliest == {} and nothing is None


@pytest.mark.parametrize("params", SETTINGS, ids=str)
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_row_that_is_not_finite_is_reported_and_harms_no_other(params, value):
    logits = random_logits(3, V)
    alone = one_row(logits[0], seed=1, **params)
    logits[1, 7] = value
    logits[2] = -math.inf
    samplers = [TokenSampler(SamplingParams(**params, seed=1)) for _ in range(3)]
    sampled = sample_batch(logits, samplers)
    assert sampled.finite == [True, False, False]
    assert sampled.token_ids[0] == alone
    assert all(0 <= token < V for token in sampled.token_ids)


# --- bad input ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("params", "words"),
    [
        (dict(max_gen_len=0), "max_gen_len must be a whole number of at least 1, not 0"),
        (dict(temperature=math.nan), "temperature must be a number of at least 0, not nan"),
        (dict(temperature=-0.1), "temperature must be a number of at least 0, not -0.1"),
        (dict(temperature=math.inf), "temperature must be"),
        (dict(temperature="hot"), "temperature must be a number of at least 0, not 'hot'"),
        (dict(top_k=51), "top_k must be a whole number from 0 to 50, the size of the vocabulary, not 51"),
        (dict(top_k=1.5), "top_k must be a whole number"),
        (dict(top_p=0), "top_p must be above 0"),
        (dict(top_p=1.1), "top_p must be a number from 0 to 1, not 1.1"),
        (dict(min_p=-1), "min_p must be a number from 0 to 1, not -1"),
        (dict(repetition_penalty=1e-40), "repetition_penalty must be a number from 0.01 to 100"),
        (dict(presence_penalty=math.nan), "presence_penalty must be a number, not nan"),
        (dict(logit_bias={50: 1.0}), "logit_bias has 50, which is no token id of a vocabulary of 50"),
        (dict(logit_bias={5: math.inf}), "logit_bias must map token ids to numbers"),
        (dict(banned_tokens=(-1,)), "banned_tokens has -1"),
        (dict(banned_tokens=tuple(range(50))), "leave at least one token"),
        (dict(stop_token_ids=("a",)), "stop_token_ids has 'a'"),
        (dict(stop=("",)), "stop must be a tuple of strings of at least one character, not ('',)"),
        (dict(stop="end"), "stop must be a tuple of strings"),
        (dict(seed=1.5), "seed must be a whole number, not 1.5"),
        (dict(n=0), "n must be a whole number of at least 1"),
        (dict(logprobs=51), "logprobs must be a whole number from 0 to 50"),
        (dict(overflow="wrap"), "overflow must be one of error, slide, not 'wrap'"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_each_mistake_is_named_in_one_sentence(params, words):
    (complaint,) = SamplingParams(**params).complaints(V)
    assert words in complaint


def test_what_is_unusual_but_sound_is_accepted():
    params = [dict(seed=10**400), dict(max_gen_len=10**400), dict(logit_bias={0: -math.inf}), dict(top_k=V, logprobs=V)]
    assert [SamplingParams(**each).complaints(V) for each in [{}, *params]] == [[]] * 5
    assert len(SamplingParams(temperature=-1, top_p=2.0, n=0).complaints(V)) == 3
    assert SamplingParams(top_k=10**6, logit_bias={10**6: 1.0}).complaints() == []
    assert SamplingParams(top_k=-1).complaints() == ["top_k must be a whole number of at least 0, not -1"]
