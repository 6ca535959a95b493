"""Learning merges and encoding fast: what the fast engines give is what the textbook's page gives."""

import builtins
import json
import random
import threading
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import regex
from test_byte_level_bpe import CORPUS, random_texts
from tokenizers import Tokenizer

from byte_level_bpe import ByteLevelBPETokenizer
from text import bpe_training, fast_encoding
from text.bpe_training import LONGEST_PIECE, TextSample, learn_merges, merges_of_tokens, times_made
from text.fast_encoding import fast_encoder, ids_of
from text.tokenizer_files import PRETOKENIZER_PATTERN

ROOT = Path(__file__).resolve().parent.parent


# ---------------------------------------------------------------------------------------------------- a textbook's page


def merge_word(word, left, right):
    """A word with every `left`, `right` that stand side by side made one, from its beginning."""
    result, index = [], 0
    while index < len(word):
        if word[index : index + 2] == (left, right):
            result.append(left + right)
            index += 2
        else:
            result.append(word[index])
            index += 1
    return tuple(result)


def train_by_the_book(texts, n_merges, min_frequency, alphabet):
    """Sennrich et al. 2016, algorithm 1: merge the commonest pair, again and again; the older tokens win a tie."""
    words = Counter()
    for text in texts:
        for piece in regex.findall(PRETOKENIZER_PATTERN, text):
            words[tuple(bytes([byte]) for byte in piece.encode())] += 1
    age = {bytes([byte]): place for place, byte in enumerate(alphabet)}
    merges = []
    while len(merges) < n_merges:
        pairs = Counter()
        for word, count in words.items():
            for pair in zip(word, word[1:], strict=False):
                pairs[pair] += count
        if not pairs:
            break
        best = min(pairs, key=lambda pair: (-pairs[pair], age[pair[0]], age[pair[1]]))
        after = Counter()
        for word, count in words.items():
            after[merge_word(word, *best)] += count
        if sum(len(w) * n for w, n in words.items()) - sum(len(w) * n for w, n in after.items()) < min_frequency:
            break
        words = after
        merges.append(best)
        age.setdefault(best[0] + best[1], len(age))
    return merges


def learned(texts, n_merges, min_frequency):
    sample = TextSample(None)
    for text in texts:
        sample.add(text)
    return learn_merges(sample, n_merges, min_frequency)


TEXTS = [
    *CORPUS[:4],
    "“你好”，他说。“你好吗？”她说，你好。\n\n第二段：你好，世界！\n",
    "def f(x_a):\n\treturn (x_a + 1)  # “注释”，it's 1234, IT'S 5678\n    return\n",
    "aaaa aaaa aaaaa bbb\u00a0bbb　bbb\r\n\r\nCRLF \x00\x01 e\u0301e\u0301 👩‍👩‍👧👩‍👩‍👧",
]


@pytest.fixture(params=["with the fast packages", "without them"])
def without_packages(request, monkeypatch):
    """Both ways, on machines that have gigatoken and rustbpe and on those that have not."""
    if request.param == "with the fast packages":
        pytest.importorskip("gigatoken")
        pytest.importorskip("rustbpe")
        return False
    real = builtins.__import__

    def missing(name, *rest, **more):
        if name in ("gigatoken", "rustbpe"):
            raise ImportError(name)
        return real(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", missing)
    return True


@pytest.mark.parametrize("min_frequency", [1, 2, 3, 6])
def test_merges_are_those_of_the_textbook(min_frequency, without_packages):
    """Of equally common pairs, `tokenizers` goes by the order of its alphabet, `rustbpe` by that of the bytes."""
    alphabet = bpe_training.byte_of_character().values() if without_packages else range(256)
    assert learned(TEXTS, 120, min_frequency) == train_by_the_book(TEXTS, 120, min_frequency, alphabet)


def test_more_text_than_there_is_room_for_is_sampled_evenly():
    texts = [f"text number {number} of many\n" for number in range(1000)]
    sample = TextSample(5000)
    for text in texts:
        sample.add(text)
    assert sample.n_texts == 1000 and sample.n_bytes == sum(map(len, texts))
    assert 1200 < sample.size <= 5000
    assert sample.texts == texts[:: sample.step]


def test_long_pieces_are_cut_for_training_and_take_no_time_without_end():
    """A megabyte without a space; otherwise the time grows with its square."""
    generator = random.Random(0)
    text = "".join(generator.choices("ACGT", k=1_000_000))
    sample = TextSample(None)
    sample.add(text + " and some words")
    parts = list(sample.cut())
    assert max(map(len, parts)) == LONGEST_PIECE and "".join(parts) == text + " and some words"
    tokenizer = ByteLevelBPETokenizer(300)
    tokenizer.train([text])
    ids = tokenizer.encode(text, add_special_tokens=False)["input_ids"]
    assert len(ids) < 500_000 and tokenizer.decode(ids) == text


def test_how_often_a_merge_was_made_is_found_backwards():
    """Of "abab abc": (a, b) three times, (ab, ab) once, (ab, c) once."""
    merges = [(b"a", b"b"), (b"ab", b"ab"), (b"ab", b"c")]
    assert times_made(merges, {b"abab": 1, b"abc": 1}) == [3, 1, 1]


def test_the_parts_of_tokens_are_what_earlier_merges_leave():
    merges = [(b"a", b"b"), (b"c", b"d"), (b"ab", b"cd"), (b"ab", b"c")]
    assert merges_of_tokens([left + right for left, right in merges]) == merges


def test_training_writes_nothing_by_itself(capfd):
    ByteLevelBPETokenizer(300).train(CORPUS)
    assert capfd.readouterr() == ("", "")


# ------------------------------------------------------------------------------------------------------------ encoding


def variants(tokenizer):
    """{name: tokenizer.json} of the kinds of folders that are published."""
    base = json.loads(tokenizer.to_files()["tokenizer.json"])

    def pattern(text):
        split = {"type": "Split", "pattern": {"Regex": text}, "behavior": "Isolated", "invert": False}
        return {"type": "Sequence", "pretokenizers": [split, base["pre_tokenizer"]["pretokenizers"][1]]}

    byte_level = {"type": "ByteLevel", "trim_offsets": True, "use_regex": True}
    three_digits = PRETOKENIZER_PATTERN.replace(r"|\p{N}|", r"|\p{N}{1,3}|")
    return {
        "ours": base,
        "Qwen": {**base, "normalizer": {"type": "NFC"}},
        "GPT-2": {**base, "pre_tokenizer": {**byte_level, "add_prefix_space": False}},
        "prefix space": {**base, "pre_tokenizer": {**byte_level, "add_prefix_space": True}},
        "Llama 3": {**base, "pre_tokenizer": pattern(three_digits), "model": {**base["model"], "ignore_merges": True}},
    }


@pytest.mark.parametrize("name", ["ours", "Qwen", "GPT-2", "prefix space", "Llama 3"])
def test_fast_ids_are_the_same_on_every_text(trained, name):
    pytest.importorskip("gigatoken")
    engine = Tokenizer.from_str(json.dumps(variants(trained)[name]))
    engine.encode_special_tokens = True
    encoder = fast_encoder(engine)
    assert encoder is not None
    texts = [*random_texts(2000, seed=3), *CORPUS[:4], *TEXTS, "<s>hello</s><pad>", *fast_encoding.PROBES]
    texts += ["".join(chunk) for chunk in (texts[:200], texts[200:400])]
    expected = ids_of(engine, texts)
    assert encoder.encode_batch(texts) == expected
    assert [encoder.encode(text) for text in texts[:300]] == expected[:300]
    ids, borders = encoder.encode_arrays(texts)
    assert [ids[a:b].tolist() for a, b in zip(borders, borders[1:], strict=False)] == expected


@pytest.fixture(scope="module")
def trained():
    tokenizer = ByteLevelBPETokenizer(600)
    tokenizer.train([*CORPUS, *TEXTS * 5])
    return tokenizer


def test_what_the_fast_engine_does_not_know_is_left_to_the_other(trained):
    content = variants(trained)["ours"]
    other = json.loads(json.dumps(content).replace(r"\\p{N}|", r"\\p{N}\\p{N}?|"))
    assert fast_encoder(Tokenizer.from_str(json.dumps(other))) is None
    plain = Tokenizer.from_str(json.dumps(content))
    plain.add_tokens(["added as plain text"])
    assert fast_encoder(plain) is None


def test_arrays_hold_the_ids_of_the_lists_with_either_engine(trained, without_packages):
    texts = ["", "a", *TEXTS, "half of a pair \ud83d", ""]
    tokenizer = ByteLevelBPETokenizer.from_files(trained.to_files())
    ids, borders = tokenizer.encode_arrays(texts)
    assert ids.dtype == np.uint32 and len(borders) == len(texts) + 1
    assert [ids[a:b].tolist() for a, b in zip(borders, borders[1:], strict=False)] == trained.encode_batch(texts)
    assert tokenizer.encode_batch([]) == [] and tokenizer.encode_arrays([])[1].tolist() == [0]
    assert tokenizer.encode(TEXTS[0], max_seq_len=3) == trained.encode(TEXTS[0], max_seq_len=3)


def test_threads_may_encode_at_once(trained):
    expected, wrong = trained.encode_batch(TEXTS), []

    def encode():
        for _ in range(50):
            try:
                assert trained.encode_batch(TEXTS) == expected
                assert trained.encode(TEXTS[0], add_special_tokens=False)["input_ids"] == expected[0]
            except Exception as error:  # told to the test, which is another thread
                wrong.append(error)

    threads = [threading.Thread(target=encode) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_an_engine_that_has_read_much_is_replaced(trained, monkeypatch):
    """It keeps every piece that it has met, which would take as much memory as the corpus is large."""
    pytest.importorskip("gigatoken")
    monkeypatch.setattr(fast_encoding, "FRESH_AFTER", 100)
    encoder = fast_encoder(trained._engine)
    expected = trained.encode_batch(TEXTS)
    for _ in range(3):
        before = encoder._engine
        assert encoder.encode_batch(TEXTS) == expected
        assert encoder._engine is not before
    assert encoder._characters <= sum(map(len, TEXTS))


@pytest.mark.parametrize("path", ["pretrain/train.txt", "pretrain/val.txt"])
def test_the_sample_data_has_the_same_ids(trained, path):
    lines = (ROOT / "data" / path).read_text(encoding="utf-8").splitlines()[:3000]
    assert trained.encode_batch(lines) == ids_of(trained._engine, lines)
