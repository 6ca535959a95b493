"""Beam search: the answers of `transformers`, those of a search without a cache, and those of trying everything."""

import itertools

import pytest
import torch
from test_transformers_parity import in_transformers, random_ids

from command_line import UserError
from inference.beam_search import BeamSettings, beam_search

PAD, END = 1, 7


@pytest.fixture
def ending_model(random_model, architecture):
    """A model that ends an answer now and then, so that finished and running beams compete."""
    model = random_model(architecture, seed=3, tie_embeddings=False)
    with torch.no_grad():
        model.lm_head.weight.mul_(0.8)  # flat enough that beams of different lengths are close
        model.lm_head.weight[END] *= 3.0
    return model


@torch.no_grad()
def log_probs_of(model, prompt, answer):
    """Log-probability of each token of an answer, without a cache."""
    logits = model(torch.tensor([[*prompt, *answer]]))["logits"][0]
    log_probs = logits.log_softmax(-1)[len(prompt) - 1 : -1]
    return log_probs[range(len(answer)), answer].tolist()


@pytest.mark.parametrize("early_stopping", [False, True, "never"])
@pytest.mark.parametrize("length_penalty", [1.0, 0.0, -1.0, 2.0])
@pytest.mark.parametrize("num_beams", [2, 5])
def test_answers_and_scores_are_those_of_transformers(ending_model, num_beams, length_penalty, early_stopping):
    """All n of them, in order, for several prompts; some end by themselves, others at the limit."""
    theirs = in_transformers(ending_model)
    ended = set()
    for seed in range(6):
        prompt = random_ids(1, 4 + seed, seed=seed)
        expected = theirs.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=16,
            num_beams=num_beams,
            num_return_sequences=num_beams,
            length_penalty=length_penalty,
            early_stopping=early_stopping,
            do_sample=False,
            pad_token_id=PAD,
            eos_token_id=END,
            return_dict_in_generate=True,
            output_scores=True,
        )
        settings = BeamSettings(num_beams, length_penalty, early_stopping)
        found = beam_search(
            ending_model, prompt[0].tolist(), settings, max_gen_len=16, end_token_ids={END}, n=num_beams
        )
        rows = expected.sequences[:, prompt.size(1) :].tolist()
        for hypothesis, row in zip(found, rows, strict=True):
            assert hypothesis.token_ids == row[: len(hypothesis.token_ids)]
            assert set(row[len(hypothesis.token_ids) :]) <= {PAD}
            assert hypothesis.ended == (hypothesis.token_ids[-1] == END)
            ended.add(hypothesis.ended)
        scores = [hypothesis.score for hypothesis in found]
        torch.testing.assert_close(torch.tensor(scores), expected.sequences_scores, atol=1e-4, rtol=1e-4)
    assert True in ended or length_penalty > 1, "no answer ended by itself: too little is shown"


@pytest.mark.parametrize("length_penalty", [0.0, 1.0])
def test_a_beam_as_wide_as_all_beginnings_finds_the_best_answer_of_all(random_model, architecture, length_penalty):
    """Brute force over every sequence of a vocabulary of five tokens."""
    vocab_size, max_gen_len, end, prompt = 5, 4, 2, [3, 4]
    model = random_model(architecture, vocab_size=vocab_size)

    def score(answer):
        return sum(log_probs_of(model, prompt, answer)) / len(answer) ** length_penalty

    others = [token for token in range(vocab_size) if token != end]
    answers = [
        [*beginning, *last]
        for length in range(max_gen_len)
        for beginning in itertools.product(others, repeat=length)
        for last in ([[end]] if length < max_gen_len - 1 else [[token] for token in range(vocab_size)])
    ]
    best = sorted(answers, key=score, reverse=True)[:3]
    settings = BeamSettings(num_beams=vocab_size**max_gen_len, length_penalty=length_penalty, early_stopping="never")
    found = beam_search(model, prompt, settings, max_gen_len=max_gen_len, end_token_ids={end}, n=3)
    assert [hypothesis.token_ids for hypothesis in found] == best
    assert [hypothesis.score for hypothesis in found] == pytest.approx([score(answer) for answer in best], rel=1e-4)


def diverse_search_without_cache(model, prompt, num_beams, num_beam_groups, penalty, max_gen_len):
    """Algorithm 1 of arXiv:1610.02424 as plainly as can be, over an endless vocabulary: nothing ends before the limit.

    Returns the beams of each group, (log-probability, tokens), best first."""
    width = num_beams // num_beam_groups
    groups = [[(0.0, [])] for _ in range(num_beam_groups)]
    for _ in range(max_gen_len):
        taken = []
        for g, beams in enumerate(groups):
            candidates = []
            for total, answer in beams:
                with torch.no_grad():
                    log_probs = model(torch.tensor([[*prompt, *answer]]))["logits"][0, -1].log_softmax(-1).tolist()
                for token, log_prob in enumerate(log_probs):
                    candidates.append((total + log_prob - penalty * taken.count(token), [*answer, token]))
            groups[g] = sorted(candidates, reverse=True)[:width]
            taken += [answer[-1] for _, answer in groups[g]]
    return groups


@pytest.mark.parametrize(
    ("num_beams", "num_beam_groups", "penalty"), [(6, 3, 1.5), (4, 4, 0.7), (4, 2, 0.0), (3, 1, 5.0)]
)
def test_diverse_groups_follow_the_paper_and_the_cache_changes_nothing(
    random_model, architecture, num_beams, num_beam_groups, penalty
):
    model, prompt = random_model(architecture), [5, 9, 30]
    settings = BeamSettings(num_beams, 0.0, num_beam_groups=num_beam_groups, diversity_penalty=penalty)
    found = beam_search(model, prompt, settings, max_gen_len=6, n=num_beams)
    groups = diverse_search_without_cache(model, prompt, num_beams, num_beam_groups, penalty, 6)
    expected = sorted((beam for group in groups for beam in group), key=lambda beam: -beam[0])
    assert [hypothesis.score for hypothesis in found] == pytest.approx([total for total, _ in expected], abs=1e-3)
    assert sorted(hypothesis.token_ids for hypothesis in found) == sorted(answer for _, answer in expected)


def test_a_diversity_penalty_makes_the_groups_differ(random_model):
    """Without it all groups find the same; with it, answers differ from the first token on."""

    def first_tokens(penalty):
        settings = BeamSettings(num_beams=4, num_beam_groups=4, diversity_penalty=penalty)
        return {found.token_ids[0] for found in beam_search(random_model(), [5, 6], settings, max_gen_len=4, n=4)}

    assert len(first_tokens(0.0)) == 1
    assert len(first_tokens(100.0)) == 4


def test_one_beam_is_greedy_search(random_model, architecture):
    model, prompt = random_model(architecture), random_ids(1, 5)
    (found,) = beam_search(model, prompt[0].tolist(), BeamSettings(num_beams=1), max_gen_len=15)
    assert found.token_ids == model.generate(prompt, max_gen_len=15, temperature=0)[0, 5:].tolist()


def test_a_wider_search_finds_nothing_worse(random_model, architecture):
    """On random models, on the average over prompts; and every score is what the formula says."""
    model, scores = random_model(architecture), {1: 0.0, 8: 0.0}
    for seed in range(5):
        prompt = random_ids(1, 5, seed=seed)[0].tolist()
        for width in scores:
            (found,) = beam_search(model, prompt, BeamSettings(width, length_penalty=0.5), max_gen_len=9)
            expected = sum(log_probs_of(model, prompt, found.token_ids)) / len(found.token_ids) ** 0.5
            assert found.score == pytest.approx(expected, abs=1e-3)
            scores[width] += found.score
    assert scores[8] > scores[1]


def test_the_answer_ends_where_the_context_ends(random_model, architecture):
    model = random_model(architecture)
    (found,) = beam_search(model, [5] * 30, BeamSettings(3), max_gen_len=100)
    assert len(found.token_ids) == 2 and not found.ended


def test_the_model_is_left_in_the_mode_it_was_in(random_model):
    model = random_model(dropout=0.5).train()
    answers = [beam_search(model, [5, 6], BeamSettings(2), max_gen_len=5) for _ in range(2)]
    assert model.training and answers[0] == answers[1]
    model.eval()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (dict(num_beams=0), "num_beams must be at least 1, not 0"),
        (dict(num_beams=4, num_beam_groups=3), "num_beams 4 must be a multiple of num_beam_groups 3"),
        (dict(num_beams=1), "n must be from 1 to num_beams, 1, not 2"),
        (dict(length_penalty=float("nan")), "length_penalty must be a finite number"),
        (dict(diversity_penalty=-1.0), "diversity_penalty must be a number of at least 0"),
        (dict(early_stopping="often"), "early_stopping must be one of False, True and 'never', not 'often'"),
    ],
    ids=str,
)
def test_each_mistake_is_named_in_one_sentence(random_model, settings, words):
    with pytest.raises(UserError, match=words):
        beam_search(random_model(), [5, 6], BeamSettings(**settings), n=2)


def test_bad_prompts_and_damaged_weights_are_named_in_one_sentence(random_model):
    for prompt in ([], [5] * 32, [5] * 40):
        with pytest.raises(UserError, match=f"the prompt has {len(prompt)} tokens; a context of 32 takes 1 to 31"):
            beam_search(random_model(), prompt, BeamSettings())
    with pytest.raises(UserError, match="max_gen_len must be at least 1, not 0"):
        beam_search(random_model(), [5, 6], BeamSettings(), max_gen_len=0)
    model = random_model()
    with torch.no_grad():
        model.final_norm.weight[0] = float("nan")
    with pytest.raises(UserError, match="not finite"):
        beam_search(model, [5, 6], BeamSettings())
