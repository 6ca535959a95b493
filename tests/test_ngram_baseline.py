"""The n-gram baseline: its probabilities are those of the formula, and it learns what a few tokens of context tell."""

import importlib
import json

import numpy as np
import pytest

from byte_level_bpe import ByteLevelBPETokenizer
from evaluation import ngram_baseline
from evaluation.ngram_baseline import NGramModel

A, B, C, END = 0, 1, 2, 3


@pytest.fixture
def toy():
    """A trigram model of "a b a b c" and "b c"."""
    return NGramModel(order=3, vocab_size=4).fit([[A, B, A, B, C], [B, C]])


def test_unigram_probabilities_by_hand(toy):
    """7 tokens (a 2, b 3, c 2), 3 kinds: p(w) = (count + 3 · 1/4) / (7 + 3)."""
    assert toy.probabilities([]) == pytest.approx([2.75 / 10, 3.75 / 10, 2.75 / 10, 0.75 / 10])


def test_bigram_probabilities_by_hand(toy):
    """After b stand a once and c twice: 2 kinds, so p(w | b) = (count + 2 · p(w)) / (3 + 2)."""
    unigram = np.array([0.275, 0.375, 0.275, 0.075])
    assert toy.probabilities([B]) == pytest.approx((np.array([1, 0, 2, 0]) + 2 * unigram) / 5)


def test_trigram_probabilities_by_hand(toy):
    """After a b stand a and c once each: p(w | a b) = (count + 2 · p(w | b)) / (2 + 2)."""
    bigram = (np.array([1, 0, 2, 0]) + 2 * np.array([0.275, 0.375, 0.275, 0.075])) / 5
    assert toy.probabilities([A, B]) == pytest.approx((np.array([1, 0, 1, 0]) + 2 * bigram) / 4)


def test_a_context_never_seen_counts_as_its_end(toy):
    """p(w | c b) = p(w | b): "c b" stands nowhere, and does not cross from the first sequence into the second."""
    assert toy.probabilities([C, B]) == pytest.approx(toy.probabilities([B]))
    assert toy.probabilities([END]) == pytest.approx(toy.probabilities([]))


def test_only_the_last_tokens_of_a_context_count(toy):
    assert toy.probabilities([C, C, A, B]) == pytest.approx(toy.probabilities([A, B]))


def test_probabilities_agree_with_counting_in_plain_python():
    """On random sequences every context's distribution sums to 1 and equals the recursive definition."""
    rng = np.random.default_rng(0)
    sequences = [rng.integers(0, 5, rng.integers(1, 30)).tolist() for _ in range(20)]
    model = NGramModel(order=4, vocab_size=5).fit(sequences)

    def expected(context):
        lower = expected(context[1:]) if context else np.full(5, 1 / 5)
        counts = np.zeros(5)
        for sequence in sequences:
            for end in range(len(context), len(sequence)):
                if sequence[end - len(context) : end] == context:
                    counts[sequence[end]] += 1
        kinds = np.count_nonzero(counts)
        return (counts + kinds * lower) / (counts.sum() + kinds) if kinds else lower

    for context in ([], [1], [2, 3], [0, 1, 2], [4, 4, 4], *(sequence[:3] for sequence in sequences)):
        assert model.probabilities(context).sum() == pytest.approx(1)
        assert model.probabilities(context) == pytest.approx(expected(list(context)))


def test_generation_is_greedy_and_stops_at_the_end():
    model = NGramModel(order=3, vocab_size=4).fit([[A, B, C, END], [A, B, C, END], [B, B, A]])
    assert model.next_token([A]) == B
    assert model.generate([A], eos=END) == [B, C, END]
    assert model.generate([A], eos=END, max_len=2) == [B, C]


def test_a_model_that_saw_nothing_is_uniform():
    assert NGramModel(order=3, vocab_size=4).fit([]).probabilities([A]) == pytest.approx([0.25] * 4)


def test_command_line_answers_what_it_has_seen(tmp_path, capsys):
    """Trained on the test's own short conversations, the baseline answers by heart; the JSON says how well."""
    records = [
        {"instruction": f"{word}?", "response": f"{word}!", "answer": f"{word}!", "skill": "echo", "language": "en"}
        for word in ("yes", "no")
    ]
    (tmp_path / "chats.json").write_text(json.dumps(records), encoding="utf-8")
    (tmp_path / "text.txt").write_text("yes or no\nno or yes\n", encoding="utf-8")
    ByteLevelBPETokenizer(300).save(tmp_path / "tokenizer")
    ngram_baseline.main(
        [
            *("--order", "40", "--tokenizer_dir", str(tmp_path / "tokenizer")),
            *("--train_data_dir", str(tmp_path / "text.txt"), "--sft_data_path", str(tmp_path / "chats.json")),
            *("--test_data_path", str(tmp_path / "chats.json"), "--output_path", str(tmp_path / "out" / "report.json")),
        ]
    )
    report = json.loads((tmp_path / "out" / "report.json").read_text(encoding="utf-8"))
    assert report["scores"]["exact"] == 1.0
    assert report["scores"]["ended"] == 1.0
    assert report["by_skill"]["echo"]["count"] == 2
    assert [row["prediction"] for row in report["predictions"]] == ["yes!", "no!"]
    assert report["exact_by_form"] == {"chat template": 1.0, "no headings": 1.0}
    assert "answers 100.0% exactly" in capsys.readouterr().out


def test_without_headings_the_answer_follows_the_question():
    """A short context then holds the end of the question; every answer is still closed by `</s>`."""
    tokenizer = ByteLevelBPETokenizer(300)
    turns = [{"role": "user", "content": "a?"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
    ids = ngram_baseline.encode_conversation(tokenizer, turns, headings=False)
    assert tokenizer.decode(ids, skip_special_tokens=False) == "<s>a?b</s>c"


def test_the_former_name_of_the_script_leads_here():
    """`python ngram_baseline.py` is what users have typed."""
    assert importlib.import_module("ngram_baseline").main is ngram_baseline.main
