"""From text and records to batches: nothing is lost, nothing is learnt that should not be, every run sees the same."""

import json
import os
import pickle
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import at_once
import numpy as np
import pytest
import torch

from byte_level_bpe import ByteLevelBPETokenizer
from command_line import UserError
from data_loader import (
    BatchOrder,
    GPTPPODataset,
    GPTPretrainDataset,
    GPTSFTDataset,
    MixedDataset,
    PackedDataset,
    PreferenceDataset,
    best_fit,
    create_pretrain_dataloader,
    create_sft_dataloader,
)
from gpt_model import IGNORED_LABEL
from text import token_shards
from text.conversation_data import parse_preference
from text.text_files import ReadingOptions, iter_documents, parse_sources
from text.token_shards import TokenShards, in_validation_part, tokenize_to_shards

ROOT = Path(__file__).resolve().parent.parent
BOS, PAD, EOS = 0, 1, 2


@pytest.fixture
def text_file(tmp_path, corpus):
    path = tmp_path / "text.txt"
    path.write_text("".join(line + "\n" for line in corpus), encoding="utf-8")
    return path


def all_tokens(shards):
    return shards.slice(0, shards.n_tokens).tolist()


def shard_folders(folder):
    return sorted(path.name for path in Path(folder).iterdir())


# ------------------------------------------------------------------------------------------------------------- shards


def test_shards_hold_every_document_between_its_special_tokens(text_file, corpus, tokenizer, tmp_path):
    """`<s>` text `</s>` after one another, decoded back to the text; bytes and documents are counted."""
    shards = tokenize_to_shards(text_file, tokenizer, tmp_path / "shards")
    ids = all_tokens(shards)
    assert ids.count(BOS) == ids.count(EOS) == shards.n_documents == len(corpus)
    assert ids[0] == BOS
    assert ids[-1] == EOS
    assert tokenizer.decode(ids) == "".join(corpus)
    assert shards.n_bytes == sum(len(line.encode()) for line in corpus)
    assert shards.arrays[0].dtype == np.uint16
    assert isinstance(shards.arrays[0], np.memmap)  # never wholly in memory


def test_a_long_corpus_is_cut_into_several_shards_that_read_as_one(corpus, tokenizer, tmp_path, monkeypatch):
    path = tmp_path / "text.txt"
    path.write_text("\n".join(corpus * 200), encoding="utf-8")
    whole = tokenize_to_shards(path, tokenizer, tmp_path / "one")
    monkeypatch.setattr(token_shards, "SHARD_TOKENS", 10_000)
    parts = tokenize_to_shards(path, tokenizer, tmp_path / "many")
    assert len(whole.arrays) == 1
    assert len(parts.arrays) > 2
    assert all_tokens(parts) == all_tokens(whole)
    edge = len(parts.arrays[0])
    assert parts.slice(edge - 3, edge + 4).tolist() == whole.slice(edge - 3, edge + 4).tolist()


def test_a_large_vocabulary_has_room_in_the_shards(text_file, tokenizer, tmp_path, monkeypatch):
    """Ids beyond 65,535 need four bytes."""
    monkeypatch.setattr(ByteLevelBPETokenizer, "__len__", lambda self: 70_000)

    def encode_arrays(self, texts):
        return np.full(len(texts), 69_999, np.uint32), np.arange(len(texts) + 1)

    monkeypatch.setattr(ByteLevelBPETokenizer, "encode_arrays", encode_arrays)
    shards = tokenize_to_shards(text_file, tokenizer, tmp_path / "shards")
    assert all_tokens(shards)[:3] == [BOS, 69_999, EOS]


def test_shards_are_reused_while_text_and_tokenizer_stay(text_file, tokenizer, tmp_path, monkeypatch):
    first = tokenize_to_shards(text_file, tokenizer, tmp_path / "shards")
    tokens = all_tokens(first)
    monkeypatch.setattr(token_shards, "_write_shards", lambda *_: pytest.fail("tokenized again"))
    again = tokenize_to_shards(
        str(text_file.with_suffix("")), tokenizer, tmp_path / "shards"
    )  # found without its ending
    assert all_tokens(again) == tokens
    assert (again.n_bytes, again.n_documents) == (first.n_bytes, first.n_documents)


def test_shards_are_made_anew_when_the_text_changes(text_file, tokenizer, tmp_path):
    """Also where its length and even its first lines stay the same."""
    tokenize_to_shards(text_file, tokenizer, tmp_path / "shards")
    changed = text_file.read_text(encoding="utf-8").replace("Paris", "sirap")
    os.utime(text_file, (1, 1))
    text_file.write_text(changed, encoding="utf-8")
    decoded = tokenizer.decode(all_tokens(tokenize_to_shards(text_file, tokenizer, tmp_path / "shards")))
    assert "sirap" in decoded
    assert "Paris" not in decoded


def test_shards_are_made_anew_for_another_tokenizer(text_file, corpus, tokenizer, tmp_path):
    other = ByteLevelBPETokenizer(vocab_size=290)
    other.train(corpus)
    shards = [tokenize_to_shards(text_file, t, tmp_path / "shards") for t in (tokenizer, other)]
    assert shards[0].n_tokens < shards[1].n_tokens
    assert tokenizer.decode(all_tokens(shards[0])) == other.decode(all_tokens(shards[1])) == "".join(corpus)


def test_shards_are_made_anew_when_a_file_joins_the_folder(tokenizer, tmp_path):
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / "a.txt").write_text("first\n")
    assert tokenize_to_shards(folder, tokenizer, tmp_path / "shards").n_documents == 1
    (folder / "b.txt").write_text("second\nthird\n")
    assert tokenize_to_shards(folder, tokenizer, tmp_path / "shards").n_documents == 3


TOKENIZE = """
import sys
from byte_level_bpe import ByteLevelBPETokenizer
from text.token_shards import tokenize_to_shards
tokenize_to_shards(sys.argv[1], ByteLevelBPETokenizer.from_pretrained(sys.argv[2]), sys.argv[3])
"""


def test_killed_while_tokenizing_leaves_nothing_that_is_used(corpus, tokenizer, tmp_path):
    """A real process, `kill -9` once it has written its first tokens; the next run starts over and is complete."""
    path = tmp_path / "text.txt"
    path.write_text("\n".join(corpus * 20_000), encoding="utf-8")
    tokenizer.save(tmp_path / "tokenizer")
    folder = tmp_path / "shards"
    process = subprocess.Popen(
        [sys.executable, "-c", TOKENIZE, str(path), str(tmp_path / "tokenizer"), str(folder)], cwd=ROOT
    )
    while process.poll() is None and not any(part.stat().st_size for part in folder.rglob("*.bin")):
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL  # it was killed, not done
    [left] = folder.iterdir()
    assert left.name.endswith(".tmp")
    assert not list(folder.rglob("manifest.json"))

    path.write_text("\n".join(corpus), encoding="utf-8")  # the same path; short, so that the test is
    assert tokenizer.decode(all_tokens(tokenize_to_shards(path, tokenizer, folder))) == "".join(corpus)


THREE_AT_ONCE = """
import sys
from pathlib import Path
import at_once
from byte_level_bpe import ByteLevelBPETokenizer
from text import token_shards
path, tokenizer, *folders = sys.argv[1:]
tokenizer = ByteLevelBPETokenizer.from_pretrained(tokenizer)

def tokenize():
    sys.stdout.write(f"{token_shards.tokenize_to_shards(path, tokenizer, folder).n_tokens} ")  # in one piece
    sys.stdout.flush()

def pause_in_the_middle():  # after the first chunk
    encode, chunks = ByteLevelBPETokenizer.encode_arrays, []
    def encode_first(*arguments):
        chunks.append(at_once.pause_instead() if chunks else encode(*arguments))
        return chunks[-1]
    ByteLevelBPETokenizer.encode_arrays, token_shards.SHARD_TOKENS = encode_first, 1

for folder in folders:
    at_once.three_at_once(tokenize, pause_in_the_middle, lambda: any(Path(folder).rglob("*.bin")))
    sys.modules["fcntl"] = None  # no locks from here on
"""


def test_three_runs_that_start_together_read_the_whole_text(corpus, tokenizer, tmp_path):
    """Also where one of them is killed in the middle, and where system or disk know no locks, as on Windows."""
    path, folders = tmp_path / "text.txt", [tmp_path / "with locks", tmp_path / "without"]
    path.write_text("\n".join(corpus * 500), encoding="utf-8")
    tokenizer.save(tmp_path / "tokenizer")
    printed = at_once.run_script(THREE_AT_ONCE, path, tmp_path / "tokenizer", *folders)
    n_tokens = sum(len(ids) + 2 for ids in tokenizer.encode_batch(corpus)) * 500
    assert printed.split() == [str(n_tokens)] * 4
    for folder, n_left in zip(folders, (0, 1), strict=True):
        made = [path for path in folder.iterdir() if not path.name.endswith(".tmp")]
        assert [(path / "manifest.json").is_file() for path in made] == [True]
        assert len(list(folder.iterdir())) == 1 + n_left, "who is alone clears away what the killed process left"


def test_what_was_left_a_day_ago_is_cleared_away_without_locks(text_file, tokenizer, tmp_path, monkeypatch):
    """And what another process may still be writing is not."""
    monkeypatch.setitem(sys.modules, "fcntl", None)
    tokenize_to_shards(text_file, tokenizer, tmp_path / "shards")
    [made] = (tmp_path / "shards").iterdir()
    old, fresh = (made.with_name(f".{made.name}.{name}.tmp") for name in ("old", "fresh"))
    for folder in (old, fresh):
        folder.mkdir()
        (folder / "shard_00000.bin").write_bytes(b"1")
    for path in (old, old / "shard_00000.bin"):
        os.utime(path, (0, 0))
    (made / "manifest.json").unlink()
    tokenize_to_shards(text_file, tokenizer, tmp_path / "shards")
    assert not old.exists() and fresh.exists()


@pytest.mark.parametrize("name", ["shard_00000.bin", "manifest.json"])
@pytest.mark.parametrize("keep", [0, 7])
def test_shards_that_a_power_cut_left_incomplete_are_made_anew(name, keep, text_file, corpus, tokenizer, tmp_path):
    tokenize_to_shards(text_file, tokenizer, tmp_path / "shards")
    [folder] = (tmp_path / "shards").iterdir()
    (folder / name).write_bytes((folder / name).read_bytes()[:keep])
    assert tokenizer.decode(all_tokens(tokenize_to_shards(text_file, tokenizer, tmp_path / "shards"))) == "".join(
        corpus
    )


def test_a_full_disk_is_one_sentence_and_leaves_nothing_behind(corpus, tokenizer, tmp_path):
    """A real limit on the size of files, in a process of its own."""
    path = tmp_path / "text.txt"
    path.write_text("\n".join(corpus * 500), encoding="utf-8")
    tokenizer.save(tmp_path / "tokenizer")
    script = "import resource\nresource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))\n" + TOKENIZE
    arguments = [str(path), str(tmp_path / "tokenizer"), str(tmp_path / "shards")]
    done = subprocess.run([sys.executable, "-c", script, *arguments], cwd=ROOT, capture_output=True, text=True)
    assert f"UserError: cannot write token shards into {tmp_path / 'shards'} (File too large); free some" in done.stderr
    assert shard_folders(tmp_path / "shards") == []


def test_a_shard_folder_that_cannot_be_made_is_named(text_file, tokenizer):
    with pytest.raises(UserError, match=r"cannot write token shards into .*text\.txt .*choose another --shard_dir"):
        tokenize_to_shards(text_file, tokenizer, text_file)


def test_a_mistake_in_the_text_leaves_nothing_behind(tokenizer, tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "fine"}\n{"txt": "wrong"}\n')
    with pytest.raises(UserError, match="line 2 of"):
        tokenize_to_shards(tmp_path / "a.jsonl", tokenizer, tmp_path / "shards")
    assert shard_folders(tmp_path / "shards") == []


def test_half_a_surrogate_pair_in_a_text_does_not_stop_the_run(tokenizer, tmp_path):
    """Cut emoji are common in scraped JSON; they become U+FFFD, three bytes."""
    (tmp_path / "a.jsonl").write_text('{"text": "cut \\\\ud83d"}\n'.replace("\\\\", "\\"))
    shards = tokenize_to_shards(tmp_path / "a.jsonl", tokenizer, tmp_path / "shards")
    assert tokenizer.decode(all_tokens(shards)) == "cut \ufffd"
    assert shards.n_bytes == 7


# ------------------------------------------------------------------------------------------------------ validation part


@pytest.mark.parametrize("fraction", [0.01, 0.05, 0.3, 0.5])
@pytest.mark.parametrize("n", [100, 1000, 12_345])
def test_the_validation_part_is_evenly_spread(n, fraction):
    """Of any number of documents, and of any stretch of them, it holds its share."""
    chosen = [in_validation_part(index, fraction) for index in range(n)]
    assert abs(sum(chosen) - n * fraction) <= 3
    assert abs(sum(chosen[n // 2 :]) - n / 2 * fraction) <= 3


@pytest.mark.parametrize("fraction", [0.1, 0.4])
def test_train_and_validation_part_are_disjoint_and_complete(fraction, tokenizer, tmp_path):
    lines = [f"document number {number}" for number in range(50)]
    path = tmp_path / "text.txt"
    path.write_text("\n".join(lines))

    def documents(part, shard_dir):
        shards = tokenize_to_shards(path, tokenizer, tmp_path / shard_dir, part=part, val_fraction=fraction)
        ids = np.array(all_tokens(shards))
        return [tokenizer.decode(part) for part in np.split(ids, np.flatnonzero(ids == EOS) + 1)[:-1]]

    train, val = documents("train", "shards"), documents("val", "shards")
    assert sorted(train + val) == sorted(lines)
    assert set(train).isdisjoint(val)
    assert len(val) == pytest.approx(50 * fraction, abs=2)
    assert documents("val", "elsewhere") == val  # the same in every run


@pytest.mark.parametrize("part", ["train", "val"])
def test_a_text_too_small_to_be_divided_says_so(part, tokenizer, tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("a\n")
    fraction = 0.5 if part == "train" else 0.0
    with pytest.raises(UserError, match=f"too few documents .*: none is left for the {part} part; give more"):
        tokenize_to_shards(path, tokenizer, tmp_path / "shards", part=part, val_fraction=fraction)
    assert shard_folders(tmp_path / "shards") == []


# -------------------------------------------------------------------------------------------------------- pretraining


def numbered_shards(n_tokens, sizes=()):
    """Tokens 0, 1, 2, …, in one shard or in several."""
    return TokenShards(np.split(np.arange(n_tokens, dtype=np.uint16), np.cumsum(sizes)), n_tokens, 1)


@pytest.mark.parametrize("epoch", range(4))
@pytest.mark.parametrize(
    ("n_tokens", "sizes"), [(8, ()), (9, ()), (15, (4,)), (16, (1, 5)), (100, (33, 33)), (22, (8, 8))]
)
def test_every_token_is_predicted_exactly_once_in_a_pass(n_tokens, sizes, epoch):
    """All but the very first, each with what stands before it; regression of trap 4, where the rest was dropped."""
    dataset = GPTPretrainDataset(numbered_shards(n_tokens, sizes), max_seq_len=8)
    samples = [dataset.window(index, epoch) for index in range(len(dataset))]
    predicted = Counter()
    for sample in samples:
        ids, labels = sample["input_ids"], sample["labels"]
        assert ids.shape == labels.shape == (8,)
        assert (ids.diff() % n_tokens == 1).all()  # a window is a piece of the text, whose end the beginning follows
        targets = labels[1:][labels[1:] != IGNORED_LABEL]
        assert torch.equal(targets, ids[1:][labels[1:] != IGNORED_LABEL])
        predicted.update(targets.tolist())
    first = int(samples[0]["input_ids"][0])
    assert predicted == Counter(token for token in range(n_tokens) if token != first)
    assert bool(first) == bool(epoch)  # the first pass begins with the text, the others do not
    batch = dataset.collate(samples)
    assert dataset.count(batch) == n_tokens - 1


def test_a_token_stands_at_many_places_of_its_windows_in_the_course_of_passes():
    """Eight passes cut windows of 128 tokens at eight places that are far from each other."""
    dataset = GPTPretrainDataset(numbered_shards(1000), max_seq_len=128)
    cuts = sorted(int(dataset.window(0, epoch)["input_ids"][0]) for epoch in range(8))
    assert min(b - a for a, b in zip(cuts, [*cuts[1:], cuts[0] + 127], strict=True)) > 127 // 16


@pytest.mark.parametrize("index", [-1, 3, 99])
def test_windows_end_where_the_text_ends(index):
    """An index beyond is an IndexError, which is how Python's `for` finds the end."""
    dataset = GPTPretrainDataset(numbered_shards(22), max_seq_len=8)
    assert len(dataset) == 3
    if index >= 0:
        with pytest.raises(IndexError):
            dataset[index]
    else:
        assert dataset[-1]["input_ids"].tolist() == dataset[2]["input_ids"].tolist()


def test_a_text_shorter_than_a_window_says_how_long_it_is():
    with pytest.raises(UserError, match=r"poem\.txt has 7 tokens, less than one window; lower --max_seq_len .now 8."):
        GPTPretrainDataset(numbered_shards(7), max_seq_len=8, name="poem.txt")


def test_a_window_of_one_token_predicts_nothing_and_is_refused():
    with pytest.raises(UserError, match="--max_seq_len must be at least 2, not 1"):
        GPTPretrainDataset(numbered_shards(7), max_seq_len=1)


@pytest.mark.parametrize("shuffle", [True, False])
def test_short_texts_and_small_corpora_are_trained_on(shuffle, tokenizer, tmp_path):
    """Regression of trap 4: no text is too short to count, and fewer windows than a batch still make a batch."""
    path = tmp_path / "short.txt"
    path.write_text("ab\n猫\nc\n" * 4, encoding="utf-8")
    loader = create_pretrain_dataloader(
        path, tokenizer, batch_size=64, max_seq_len=8, shuffle=shuffle, shard_dir=tmp_path / "shards"
    )
    batches = list(loader)
    assert len(batches) == 1
    seen = set(batches[0]["input_ids"].flatten().tolist())
    expected = set(all_tokens(tokenize_to_shards(path, tokenizer, tmp_path / "shards")))
    assert seen == expected


def test_a_pretraining_batch_fits_the_model(text_file, tokenizer, tmp_path, random_model):
    model = random_model("modern", vocab_size=len(tokenizer))
    loader = create_pretrain_dataloader(text_file, tokenizer, 4, 16, shard_dir=tmp_path / "shards")
    batch = next(iter(loader))
    assert {name: (value.shape, value.dtype) for name, value in batch.items()} == {
        name: ((4, 16), torch.int64) for name in ("input_ids", "labels")
    }
    assert model(**batch)["loss"].isfinite()


# ---------------------------------------------------------------------------------------------------------------- SFT


def conversation(question, answer):
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


CONVERSATIONS = [
    conversation("法国的首都?", "巴黎。"),
    conversation("What is the capital of Italy?", "Rome."),
    [*conversation("1+1?", "2"), *conversation("And 2+2?", "That is 4.")],
]


def labelled_text(tokenizer, labels):
    return tokenizer.decode([label for label in labels if label != IGNORED_LABEL], skip_special_tokens=False)


def test_labels_are_exactly_the_answers_and_their_ends(tokenizer):
    """Regression of trap 5: the first token of the answer and the `</s>` that ends it are learnt, the prompt is not."""
    dataset = GPTSFTDataset(CONVERSATIONS, tokenizer, max_seq_len=256)
    expected = ["巴黎。</s>", "Rome.</s>", "2</s>That is 4.</s>"]
    assert [labelled_text(tokenizer, labels) for _, labels in dataset] == expected
    for (ids, labels), messages in zip(dataset, CONVERSATIONS, strict=True):
        assert all(label in (IGNORED_LABEL, token) for token, label in zip(ids, labels, strict=True))
        prompt = tokenizer.encode_chat(messages[:-1], add_generation_prompt=True)["input_ids"]
        assert ids[: len(prompt)] == prompt
        assert labels[len(prompt)] == ids[len(prompt)] != IGNORED_LABEL  # right after the prompt the learning begins
        assert labels[len(prompt) - 1] == IGNORED_LABEL


def test_padding_reaches_only_to_the_longest_and_is_not_learnt(tokenizer):
    dataset = GPTSFTDataset(CONVERSATIONS, tokenizer, max_seq_len=256)
    batch = dataset.collate(list(dataset))
    longest = max(dataset.lengths)
    assert batch["input_ids"].shape == batch["labels"].shape == (3, longest)
    for row, (ids, labels) in enumerate(dataset):
        assert batch["input_ids"][row].tolist() == ids + [PAD] * (longest - len(ids))
        assert batch["labels"][row].tolist() == labels + [IGNORED_LABEL] * (longest - len(ids))
    assert dataset.collate(list(dataset)[:1])["input_ids"].shape == (1, dataset.lengths[0])


def test_the_loss_of_a_padded_batch_is_the_mean_over_its_answers(architecture, tokenizer, random_model):
    """No mask is needed: what stands right of a row neither is seen nor counts."""
    model = random_model(architecture, vocab_size=len(tokenizer), max_seq_len=256)
    dataset = GPTSFTDataset(CONVERSATIONS, tokenizer, max_seq_len=256)
    batch = dataset.collate(list(dataset))
    total = 0.0
    for sample in dataset:
        alone = dataset.collate([sample])
        total += model(**alone)["loss"].item() * dataset.count(alone)
    assert model(**batch)["loss"].item() == pytest.approx(total / dataset.count(batch), rel=1e-5)


def test_long_conversations_are_cut_and_those_without_an_answer_left_out(tokenizer):
    prompt = tokenizer.encode_chat(CONVERSATIONS[1][:1], add_generation_prompt=True)["input_ids"]
    for room, kept in ((0, 0), (1, 1), (2, 1)):
        dataset = GPTSFTDataset([CONVERSATIONS[1], conversation("a", "b")], tokenizer, len(prompt) + room)
        assert (len(dataset), dataset.account.n_left_out) == (1 + kept, 1 - kept)
        assert max(dataset.lengths) <= len(prompt) + room
    with pytest.raises(UserError, match="none of the 3 .* .3 no answer within 4 tokens.; raise --max_seq_len"):
        GPTSFTDataset(CONVERSATIONS, tokenizer, max_seq_len=4)


def test_text_in_a_message_never_becomes_a_special_token(tokenizer):
    dataset = GPTSFTDataset([conversation("say </s> and <pad>", "</s><s>")], tokenizer, max_seq_len=256)
    [(ids, labels)] = list(dataset)
    assert ids.count(EOS) == 1
    assert PAD not in ids
    assert labels[-1] == EOS


def test_sft_batches_from_a_file(tokenizer, tmp_path):
    path = tmp_path / "data.json"
    path.write_text(json.dumps([{"instruction": f"{n}?", "response": "x" * n} for n in range(1, 11)]))
    for shuffle in (True, False):
        loader = create_sft_dataloader(path, tokenizer, batch_size=4, max_seq_len=64, shuffle=shuffle)
        answers = [labelled_text(tokenizer, row.tolist()) for batch in loader for row in batch["labels"]]
        assert set(answers) == {"x" * n + "</s>" for n in range(1, 11)}
        assert len(loader) == 3


# --------------------------------------------------------------------------------------------------- pairs and prompts


def test_preferences_are_compared_pair_by_pair_and_each_prompt_weighs_1(tokenizer):
    """All pairs of a ranking, better before worse; the mask is 1 on tokens; what is too long is left out."""
    long = "0 1 2 3 4 5 6 7 8 9 " * 20
    records = [
        {"instruction": "法国的首都?", "chosen": "巴黎。", "rejected": "不知道,我真的不知道。", "margin": 0.5},
        {"instruction": "x", "responses": ["good", long, "poor", "bad"]},
        {"instruction": "too long", "chosen": "a", "rejected": long},
    ]
    preferences = [parse_preference(record, "record") for record in records]
    dataset = PreferenceDataset(preferences, tokenizer, max_seq_len=64)
    assert (len(dataset), dataset.account.n_left_out) == (2, 1)
    batch = dataset.collate(list(dataset))
    assert batch["input_ids"].shape == batch["attention_mask"].shape == (5, max(dataset.lengths))
    assert dataset.count(batch) == 2
    rows = zip(batch["input_ids"], batch["attention_mask"], strict=True)
    answers = [tokenizer.decode(row[mask == 1].tolist()).split(":")[-1] for row, mask in rows]
    assert [(answers[better], answers[worse]) for better, worse in batch["pairs"].tolist()] == [
        ("巴黎。", "不知道,我真的不知道。"), ("good", "poor"), ("good", "bad"), ("poor", "bad")
    ]  # fmt: skip
    assert batch["weights"].tolist() == pytest.approx([1, 1 / 3, 1 / 3, 1 / 3])
    assert batch["margins"].tolist() == [0.5, 0, 0, 0]
    assert (batch["input_ids"][batch["attention_mask"] == 0] == PAD).all()
    assert (batch["attention_mask"].diff(dim=1) <= 0).all()  # padded on the right
    with pytest.raises(UserError, match="none of the 3 preferences of the data can be used .3 longer than 3 tokens."):
        PreferenceDataset(preferences, tokenizer, 3)


def test_only_the_last_answer_of_a_preference_is_labelled(tokenizer):
    """Earlier turns of the assistant belong to the prompt; the closing token belongs to the answer."""
    record = {"messages": CONVERSATIONS[0] + CONVERSATIONS[0][-2:-1], "chosen": "yes", "rejected": "no"}
    [sample] = PreferenceDataset([parse_preference(record, "record")], tokenizer, 256)
    for (ids, labels), text in zip(sample["answers"], ("yes", "no"), strict=True):
        labelled = [label for label in labels if label != IGNORED_LABEL]
        assert labelled == [*tokenizer.encode(text, add_special_tokens=False)["input_ids"], EOS]
        assert len(ids) == len(labels)


def test_prompts_are_padded_on_the_left_and_end_where_the_answer_begins(tokenizer):
    """Regression of trap 7 (shapes of different prompts collide) and of trap 2 (`</s>` after the prompt)."""
    prompts = [messages[:-1] for messages in CONVERSATIONS]
    dataset = GPTPPODataset([*prompts, prompts[0]], tokenizer, max_prompt_len=256)
    assert len(dataset) == 3  # each once
    batch = dataset.collate(list(dataset))
    assert batch["input_ids"].shape == batch["attention_mask"].shape
    assert (batch["attention_mask"].diff(dim=1) >= 0).all()
    assert (batch["input_ids"][batch["attention_mask"] == 0] == PAD).all()
    for row, mask, prompt in zip(*batch.values(), prompts, strict=True):
        expected = tokenizer.encode_chat(prompt, add_generation_prompt=True)["input_ids"]
        assert row[mask == 1].tolist() == expected
        assert row[-1] != EOS
    with pytest.raises(UserError, match="can be used .[0-9]+ longer than the 2 tokens that are left for a prompt"):
        GPTPPODataset(prompts, tokenizer, max_prompt_len=2)


# -------------------------------------------------------------------------------------------------------------- order


@pytest.mark.parametrize("with_lengths", [False, True])
@pytest.mark.parametrize(("n", "batch_size"), [(1, 1), (1, 4), (3, 8), (10, 3), (64, 8), (1000, 7)])
def test_every_sample_comes_in_every_epoch(n, batch_size, with_lengths):
    """Full batches only; what is missing in the last is taken from the same epoch, nobody more than once too often."""
    lengths = [1 + index % 17 for index in range(n)] if with_lengths else None
    order = BatchOrder(n, batch_size, seed=3, lengths=lengths)
    assert len(order) == order.steps_per_epoch == -(-n // batch_size)
    for epoch in range(3):
        batches = [order.batch(epoch * len(order) + step) for step in range(len(order))]
        assert {len(batch) for batch in batches} == {batch_size}
        counts = Counter(index for batch in batches for index in batch)
        assert set(counts) == set(range(n))
        assert max(counts.values()) - min(counts.values()) <= 1


@pytest.mark.parametrize("lengths", [None, [index % 13 for index in range(100)]])
def test_the_order_is_a_pure_function_of_seed_and_step(lengths):
    """Asked in any order, by any process, so that a resumed run goes on with the data the first had not seen."""
    steps = list(range(60))
    straight = [BatchOrder(100, 8, 5, lengths).batch(step) for step in steps]
    order = BatchOrder(100, 8, 5, lengths)
    backwards = [order.batch(step) for step in reversed(steps)][::-1]
    alone = [BatchOrder(100, 8, 5, lengths).batch(step) for step in (0, 12, 13, 59)]
    assert backwards == straight
    assert alone == [straight[step] for step in (0, 12, 13, 59)]
    assert [BatchOrder(100, 8, 6, lengths).batch(step) for step in steps] != straight
    torch.manual_seed(1)
    state = torch.get_rng_state()
    BatchOrder(100, 8, 5, lengths).batch(3)
    assert torch.equal(torch.get_rng_state(), state)  # and it leaves the run's own randomness alone


def test_epochs_differ():
    order = BatchOrder(100, 10, 0)
    epochs = [[order.batch(epoch * 10 + step) for step in range(10)] for epoch in range(3)]
    assert epochs[0] != epochs[1] != epochs[2]


def test_similar_lengths_share_a_batch():
    """Which spares nearly all padding, while long and short batches still come in mixed order."""
    lengths = torch.randint(5, 200, (1600,), generator=torch.Generator().manual_seed(0)).tolist()

    def padding(order):
        batches = [[lengths[index] for index in order.batch(step)] for step in range(len(order))]
        return sum(max(batch) * len(batch) - sum(batch) for batch in batches) / sum(lengths)

    bucketed = BatchOrder(1600, 16, 0, lengths)
    assert padding(BatchOrder(1600, 16, 0)) > 0.5
    assert padding(bucketed) < 0.05
    longest = [max(lengths[index] for index in bucketed.batch(step)) for step in range(len(bucketed))]
    rises = sum(later > earlier for earlier, later in zip(longest, longest[1:], strict=False))
    assert 30 < rises < 70


@pytest.mark.parametrize("kind", ["pretrain", "sft"])
def test_workers_prepare_the_same_batches(kind, text_file, tokenizer, tmp_path):
    """In processes of their own, each batch once and in the same order."""
    records = [{"instruction": f"question {k}", "response": f"answer {k}"} for k in range(9)]
    (tmp_path / "sft.json").write_text(json.dumps(records))

    def batches(num_workers):
        if kind == "sft":
            return list(create_sft_dataloader(tmp_path / "sft.json", tokenizer, 2, 64, num_workers=num_workers))
        folder = tmp_path / "shards"
        return list(create_pretrain_dataloader(text_file, tokenizer, 2, 16, shard_dir=folder, num_workers=num_workers))

    alone, together = batches(0), batches(2)
    assert len(alone) == len(together) > 3
    for one, other in zip(alone, together, strict=True):
        assert all(torch.equal(one[name], other[name]) for name in one)


def test_for_workers_that_start_anew_a_corpus_is_its_files(text_file, tokenizer, tmp_path):
    """On Windows and macOS a data set is sent to its workers: the names of mapped files, not what is in them."""
    text_file.write_text(text_file.read_text() * 200)
    shards = tokenize_to_shards(text_file, tokenizer, tmp_path / "shards")
    sent = pickle.dumps(shards)
    assert len(sent) < 1000 < shards.arrays[0].nbytes
    assert all_tokens(pickle.loads(sent)) == all_tokens(shards)
    small = TokenShards([np.arange(5, dtype=np.uint16)], 5, 1)
    assert all_tokens(pickle.loads(pickle.dumps(small))) == [0, 1, 2, 3, 4]


def test_documents_are_found_all_over_the_text():
    """The first one, and those after evenly spread places; never the end of the text, nor a long document's middle."""
    eos = 9
    documents = [[1, 2, eos]] * 10 + [[3] * 30 + [eos]] + [[4, eos]] * 20
    ids = np.array([token for document in documents for token in document], dtype=np.uint16)
    begins = {0, *(np.flatnonzero(ids == eos) + 1).tolist()} - {len(ids)}
    for arrays in ([ids], [ids[:17], ids[17:60], ids[60:]]):
        shards = TokenShards(arrays, 1, len(documents))
        for n in (1, 2, 3, 7):
            starts = shards.spread_documents(n, eos)
            assert starts[0] == 0 and starts[-1] >= len(ids) * (n - 1) // n
            assert set(starts) <= begins and n - 1 <= len(starts) <= n, "two places may be in one long document"
    one_long = TokenShards([np.array([3] * 99 + [eos], dtype=np.uint16)], 1, 1)
    assert one_long.spread_documents(3, eos) == one_long.spread_documents(3, eos, search=4) == [0]


# ----------------------------------------------------------------------------------------------------- work cut by size


def test_shards_do_not_depend_on_how_the_work_is_cut(tokenizer, tmp_path, monkeypatch):
    """Documents of one word and of many at once; none is encoded beside more text than a chunk may have."""
    documents = ["机器", "word " * 3000, "法国的首都是巴黎。", "x", "The quick brown fox. " * 500] * 3
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents), encoding="utf-8")
    once = tokenize_to_shards(path, tokenizer, tmp_path / "one")
    monkeypatch.setattr(token_shards, "CHUNK_CHARACTERS", 1000)
    encode, sizes = tokenizer.encode_arrays, []

    def watched(texts):
        sizes.append(sum(map(len, texts[:-1])))
        return encode(texts)

    monkeypatch.setattr(tokenizer, "encode_arrays", watched)
    again = tokenize_to_shards(path, tokenizer, tmp_path / "two")
    assert max(sizes) < 1000 and len(sizes) > 5
    assert np.array_equal(once.slice(0, once.n_tokens), again.slice(0, again.n_tokens))
    expected = [
        token
        for ids in tokenizer.encode_batch(documents)
        for token in (tokenizer.bos_token_id, *ids, tokenizer.eos_token_id)
    ]
    assert once.slice(0, once.n_tokens).tolist() == expected and once.n_bytes == again.n_bytes


def test_shards_of_an_old_tokenizer_are_offered_for_removal(tokenizer, tmp_path, capsys):
    (tmp_path / "a.txt").write_text("one\ntwo\n", encoding="utf-8")
    tokenize_to_shards(tmp_path / "a.txt", ByteLevelBPETokenizer(300), tmp_path / "shards")
    (old,) = (tmp_path / "shards").iterdir()
    assert capsys.readouterr().out == ""
    tokenize_to_shards(tmp_path / "a.txt", tokenizer, tmp_path / "shards")
    assert f"rm -r {old}" in capsys.readouterr().out and old.is_dir()


def test_what_cannot_be_read_is_kept_beside_the_shards(tokenizer, tmp_path, capsys):
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\nbroken\n{"text": "two"}\n', encoding="utf-8")
    reading = ReadingOptions(skip_bad_records=True)
    shards = tokenize_to_shards(tmp_path / "a.jsonl", tokenizer, tmp_path / "shards", reading=reading)
    (kept,) = (tmp_path / "shards").glob("*/left_out.jsonl")
    assert shards.n_documents == 2 and "broken" in kept.read_text()
    assert f"1 records left out that cannot be read, kept in {kept}" in capsys.readouterr().out
    with pytest.raises(UserError, match="line 2 of"):
        tokenize_to_shards(tmp_path / "a.jsonl", tokenizer, tmp_path / "shards")


# -------------------------------------------------------------------------------------------------------------- packing


@pytest.mark.parametrize("architecture", ["modern", "gpt2"])
def test_packed_conversations_are_as_if_each_were_alone(architecture, tokenizer, random_model):
    """Losses, numbers of predicted tokens and gradients: of rows with several texts, and of a row for each."""
    conversations = [
        [{"role": "user", "content": question * n}, {"role": "assistant", "content": answer * (1 + n % 2)}]
        for n, (question, answer) in enumerate([("法国？", "巴黎。"), ("one ", "two "), ("机器", "学习")] * 3, start=1)
    ]
    data = GPTSFTDataset(conversations, tokenizer, 96)
    packed = PackedDataset(data, 96)
    model = random_model(architecture, vocab_size=len(tokenizer), max_seq_len=96)
    results = []
    for part in (data, packed):
        batch = part.collate([part[index] for index in range(len(part))])
        model.zero_grad()
        loss = model(**batch)["loss"]
        loss.backward()
        results.append((loss.item(), part.count(batch), model.token_embedding.weight.grad.clone()))
    assert len(packed) < len(data) and results[0][1] == results[1][1]
    assert results[0][0] == pytest.approx(results[1][0], abs=1e-5)
    torch.testing.assert_close(results[0][2], results[1][2], atol=1e-5, rtol=1e-4)
    assert sum(packed.lengths) == sum(data.lengths) and max(packed.lengths) <= 96
    assert packed.waste == pytest.approx(1 - sum(data.lengths) / (96 * len(packed)))


def test_best_fit_fills_bins_as_by_hand():
    """Of bins of 10: 7 and 3, 6 and 4, 5; each thing in one bin."""
    assert best_fit([3, 5, 7, 4, 6], 10) == [[2, 0], [4, 3], [1]]
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 100, (500,), generator=generator).tolist()
    bins = best_fit(lengths, 100)
    assert sorted(index for some in bins for index in some) == list(range(500))
    assert all(sum(lengths[index] for index in some) <= 100 for some in bins)
    assert len(bins) <= 1.05 * sum(lengths) / 100


def test_separate_documents_do_not_see_each_other(tokenizer, tmp_path, random_model):
    """A window's loss is that of its documents, each alone."""
    (tmp_path / "a.txt").write_text("机器学习\none two three\n法国的首都是巴黎。\n", encoding="utf-8")
    shards = tokenize_to_shards(tmp_path / "a.txt", tokenizer, tmp_path / "shards")
    data = GPTPretrainDataset(shards, shards.n_tokens, eos_token_id=tokenizer.eos_token_id)
    model = random_model("modern", vocab_size=len(tokenizer), max_seq_len=shards.n_tokens)
    batch = data.collate([data[0]])
    ids, total = batch["input_ids"][0].tolist(), 0.0
    ends = [index + 1 for index, token in enumerate(ids) if token == tokenizer.eos_token_id]
    for start, end in zip([0, *ends], ends, strict=False):
        row = torch.tensor([ids[start:end]])
        total += model(row, labels=row)["loss"].item() * (end - start - 1)
    assert len(ends) == 3 and data.count(batch) == data.n_predicted == shards.n_tokens - 3
    assert model(**batch)["loss"].item() * data.n_predicted == pytest.approx(total, rel=1e-5)


# ------------------------------------------------------------------------------------------------------ several sources


def test_sources_are_mixed_by_weight_and_none_is_forgotten():
    sizes, weights = (1001, 101), (0.5, 0.5)  # windows of 11 tokens: 100 and 10
    arrays = [np.arange(size, dtype=np.uint32) + 10_000 * number for number, size in enumerate(sizes)]
    sources = [GPTPretrainDataset(TokenShards([array], 0, 1), 11) for array in arrays]
    mixed = MixedDataset(sources, weights)
    assert len(mixed) == 200 and mixed.counts.tolist() == [100, 100]
    cuts = set()  # of the text that is read ten times in a pass
    for epoch in range(2):
        windows = [mixed.window(index, epoch)["input_ids"].tolist() for index in range(len(mixed))]
        predicted = Counter(token for window in windows for token in window[1:])
        starts = {10_000 + (window[0] - 10_000) % 10 for window in windows if window[0] >= 10_000}
        assert len(predicted) >= sum(sizes) - len(sizes)  # a pass begins with a token that it does not predict
        assert all(count == 1 if token < 10_000 else 7 <= count <= 10 for token, count in predicted.items())
        cuts |= starts
    assert len(cuts) == 10  # all that there are
    batch = mixed.collate([mixed[0], mixed[150]])
    assert batch["input_ids"].shape == (2, 11) and mixed.count(batch) == 20
    orders = [BatchOrder(len(mixed), 10, seed=3) for _ in range(2)]
    passes = [[order.batch(step) for step in range(40)] for order in orders]
    assert passes[0] == passes[1] and passes[0][:20] != passes[0][20:]  # the same for a seed, another in each epoch


def test_sources_and_their_weights_are_read(tmp_path):
    assert parse_sources("a.txt:0.7\nb.jsonl:3") == [("a.txt", 0.7), ("b.jsonl", 3.0)]
    assert parse_sources("C:data\nfolder") == [("C:data", None), ("folder", None)]
    (tmp_path / "odd:1").mkdir()
    assert parse_sources(str(tmp_path / "odd:1")) == [(str(tmp_path / "odd:1"), None)]
    for wrong, words in (("a:1\nb", "give each one or none"), ("a:1\nb:-1", "must be above 0")):
        with pytest.raises(UserError, match=words):
            parse_sources(wrong)


# ------------------------------------------------------------------------------------------------------ bounded memory

TOKENIZE_IN_BOUNDS = """
import resource, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from byte_level_bpe import ByteLevelBPETokenizer
from text.token_shards import tokenize_to_shards
import text.fast_encoding
from text import token_shards

token_shards.CHUNK_CHARACTERS, text.fast_encoding.FRESH_AFTER = int(sys.argv[4]), 4 * int(sys.argv[4])
tokenizer = ByteLevelBPETokenizer(300)
tokenizer.encode_arrays(["hello"])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
shards = tokenize_to_shards(sys.argv[2], tokenizer, sys.argv[3])
print(shards.n_bytes, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""


def test_a_single_line_of_100_megabytes_is_learned_from_and_encoded_whole(tmp_path):
    piece = "“机器学习”是 machine learning; "
    n = 100_000_000 // len(piece.encode())
    (tmp_path / "a.txt").write_text(piece * n, encoding="utf-8")
    tokenizer = ByteLevelBPETokenizer(300)
    sample = tokenizer.train(iter_documents(tmp_path / "a.txt"), sample_bytes=1_000_000)
    assert sample.n_bytes == n * len(piece.encode()) and sample.size < 3_000_000
    shards = tokenize_to_shards(tmp_path / "a.txt", tokenizer, tmp_path / "shards")
    assert shards.n_documents == 1 and shards.n_bytes == sample.n_bytes
    widths = np.array([len(tokenizer.token_bytes(index)) for index in range(len(tokenizer))])
    assert sum(widths[array].sum() for array in shards.arrays) == sample.n_bytes
    for part in (shards.slice(0, 100), shards.slice(shards.n_tokens - 100, shards.n_tokens)):
        assert tokenizer.decode(part).strip("\ufffd") in piece * 99


def test_memory_does_not_grow_with_the_corpus(tmp_path):
    """CORPUS_MB=4000 before pytest -s tries it with more than memory holds: 1.5 GB at most are taken then."""
    megabytes = int(os.environ.get("CORPUS_MB", "0"))
    size, chunk, limit = (megabytes, 4_000_000, 1500) if megabytes else (12, 250_000, 100)
    generator = np.random.default_rng(0)
    with (tmp_path / "large.txt").open("w", encoding="utf-8") as file:
        for _ in range(size):  # a megabyte of clauses that hardly come twice, as in verse
            codes = generator.integers(0x4E00, 0x9000, 1_000_000 // 3)
            codes[6::7], codes[60::61] = ord("，"), ord("\n")
            file.write("".join(map(chr, codes)))
    command = [sys.executable, "-c", TOKENIZE_IN_BOUNDS, str(ROOT), "large.txt", "shards", str(chunk)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    n_bytes, grown = map(int, done.stdout.split())
    print(f"{n_bytes / 1e6:,.0f} MB of text, {grown} MB of memory beyond what an empty tokenizer takes")
    assert n_bytes > 0.9e6 * size and grown < limit
