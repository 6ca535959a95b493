"""What the tokenizer promises: nothing is lost, ids agree with independent implementations, text stays text."""

import json
import os
import pickle
import random
import subprocess
import sys
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from byte_level_bpe import IGNORED_LABEL, ByteLevelBPETokenizer, main
from command_line import UserError
from text.tokenizer_files import KNOWN_FILES, PRETOKENIZER_PATTERN, SAVED_FILES

ROOT = Path(__file__).resolve().parent.parent

CORPUS = [
    "The quick brown fox jumps over the lazy dog, and the dog sleeps; it's fine, isn't it?",
    "机器学习是人工智能的一个分支,机器学习让计算机从数据中学习。人工智能改变世界。",
    "one, two, three, , , , four  spaces   here\n\nand lines\n1234 + 5678 = 6912",
    "def add(a, b):\n    return a + b  # comment\n",
] * 20

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>' + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


CHAT = [
    {"role": "system", "content": "简短回答。"},
    {"role": "user", "content": "法国的首都?"},
    {"role": "assistant", "content": "巴黎。"},
    {"role": "user", "content": "意大利呢?"},
    {"role": "assistant", "content": "罗马。"},
]


@pytest.fixture(scope="module")
def tokenizer():
    trained = ByteLevelBPETokenizer(vocab_size=420)
    trained.train(CORPUS, min_frequency=2)
    return trained


def random_texts(count, seed=0):
    """Strings over all planes of Unicode, ASCII, white space and pieces of the corpus; no surrogates."""
    generator = random.Random(seed)

    def character():
        kind = generator.randrange(5)
        if kind == 0:
            return chr(generator.randrange(128))
        if kind == 1:
            return chr(generator.randrange(0x4E00, 0x9FFF))
        if kind == 2:
            return generator.choice(" \n\r\t\u00a0\u3000\u0085\u2028")
        code = generator.randrange(0x110000 - 0x800)
        return chr(code if code < 0xD800 else code + 0x800)

    for _ in range(count):
        words = generator.choice(CORPUS).split(" ")
        parts = [generator.choice([character(), generator.choice(words), " "]) for _ in range(generator.randrange(40))]
        yield "".join(parts)


def byte_values():
    """The character that stands for each byte, by GPT-2's rule."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {**{byte: chr(byte) for byte in printable}, **{byte: chr(256 + i) for i, byte in enumerate(others)}}


BYTE_CHARACTERS = byte_values()


def bpe_by_rank(piece, ranks):
    """Merge the neighbours of lowest rank, leftmost first, until none can be merged: the algorithm in plain Python."""
    parts = [BYTE_CHARACTERS[byte] for byte in piece.encode()]
    while len(parts) > 1:
        pairs = list(zip(parts, parts[1:], strict=False))
        best = min(range(len(pairs)), key=lambda i: (ranks.get(pairs[i], float("inf")), i))
        if pairs[best] not in ranks:
            break
        parts[best : best + 2] = [parts[best] + parts[best + 1]]
    return parts


# -- text ⇄ ids --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    ["", " ", "你好,世界", "🙂👩‍👩‍👧‍👦", "مرحبا بالعالم", "\x00\x01\x7f\x1b", "e\u0301 é"]
    + ["\r\n\t \u3000\u2028", "a, b", "ﬀ ℌ Ⅷ", "\ufeff"],
)
def test_scripts_and_bytes_unseen_in_training_round_trip(tokenizer, text):
    ids = tokenizer.encode(text)["input_ids"]
    assert tokenizer.decode(ids) == text
    assert tokenizer.unk_token_id not in ids


def test_random_unicode_round_trips_trained_or_not(tokenizer):
    texts = list(random_texts(1500))
    for each in (tokenizer, ByteLevelBPETokenizer(300)):
        batch = each.encode_batch(texts)
        assert [each.decode(ids) for ids in batch] == texts
        assert batch[:200] == [each.encode(text, add_special_tokens=False)["input_ids"] for text in texts[:200]]


def test_ids_equal_bpe_by_rank_in_plain_python(tokenizer):
    regex = pytest.importorskip("regex")
    lines = tokenizer.to_files()["merges.txt"].split("\n")[1:-1]
    ranks = {tuple(line.split(" ")): rank for rank, line in enumerate(lines)}
    for text in [*CORPUS[:4], *random_texts(300, seed=1)]:
        expected = [
            tokenizer.vocab[part]
            for piece in regex.findall(PRETOKENIZER_PATTERN, text)
            for part in bpe_by_rank(piece, ranks)
        ]
        assert tokenizer.encode(text, add_special_tokens=False)["input_ids"] == expected


def test_ids_equal_tiktoken_with_the_same_merges(tokenizer):
    tiktoken = pytest.importorskip("tiktoken")
    byte_of = {character: byte for byte, character in BYTE_CHARACTERS.items()}
    specials = {token: tokenizer.vocab[token] for token in ("<s>", "<pad>", "</s>", "<unk>")}
    ranks = {bytes(byte_of[c] for c in token): i for token, i in tokenizer.vocab.items() if token not in specials}
    encoding = tiktoken.Encoding("ours", pat_str=PRETOKENIZER_PATTERN, mergeable_ranks=ranks, special_tokens=specials)
    for text in [*CORPUS[:4], *random_texts(300, seed=2)]:
        assert tokenizer.encode_batch([text])[0] == encoding.encode_ordinary(text)


def test_merges_are_applied_by_rank_not_from_left_to_right():
    """`ab` is rarer than `bc`, so that `abc` must become a + bc although ab comes first in the text."""
    trained = ByteLevelBPETokenizer(262)
    trained.train(["bc"] * 10 + ["ab"] * 5)
    ids = trained.encode("abc", add_special_tokens=False)["input_ids"]
    assert [trained.decode([index]) for index in ids] == ["a", "bc"]


def test_half_a_surrogate_pair_becomes_the_replacement_character(tokenizer):
    assert tokenizer.decode(tokenizer.encode("a\ud800b\udc00")["input_ids"]) == "a\ufffdb\ufffd"
    assert tokenizer.decode(tokenizer.encode("\ud83d\ude42")["input_ids"]) == "🙂"
    ByteLevelBPETokenizer(300).train(["ab\ud800"] * 3)


def test_encode_adds_only_s_and_never_pads(tokenizer):
    encoded = tokenizer.encode("你好 world", max_seq_len=2048)
    assert encoded["input_ids"][0] == tokenizer.bos_token_id == 0
    assert not {tokenizer.pad_token_id, tokenizer.eos_token_id} & set(encoded["input_ids"])
    assert encoded["attention_mask"] == [1] * len(encoded["input_ids"])
    assert len(encoded["input_ids"]) < 20
    assert tokenizer.encode("你好 world", max_seq_len=3)["input_ids"] == encoded["input_ids"][:3]
    assert tokenizer.encode("你好 world", add_special_tokens=False)["input_ids"] == encoded["input_ids"][1:]
    assert tokenizer.encode("")["input_ids"] == [0]
    assert tokenizer.encode("", add_special_tokens=False) == {"input_ids": [], "attention_mask": []}
    assert tokenizer.encode_batch([]) == [] and tokenizer.decode([]) == ""


def test_special_tokens_have_the_ids_0_to_3_and_their_strings_in_a_text_stay_text(tokenizer):
    names = (tokenizer.bos_token_id, tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id)
    assert names == (0, 1, 2, 3) == tuple(tokenizer.vocab[token] for token in ("<s>", "<pad>", "</s>", "<unk>"))
    text = "<s>x</s><pad> <unk>"
    ids = tokenizer.encode(text)["input_ids"]
    assert min(ids[1:]) > 3
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode([0, *ids[1:], 2], skip_special_tokens=False) == f"<s>{text}</s>"


def test_training_on_special_strings_does_not_merge_them_into_special_tokens():
    trained = ByteLevelBPETokenizer(300)
    trained.train(["<s> </s> <pad> <unk></s></s>"] * 50)
    assert min(trained.encode("</s><s><pad><unk>", add_special_tokens=False)["input_ids"]) > 3


def test_training_is_deterministic_and_stops_at_the_wanted_size(tokenizer):
    again = ByteLevelBPETokenizer(vocab_size=420)
    again.train(iter(CORPUS))
    assert again.fingerprint == tokenizer.fingerprint
    assert again.vocab_size == len(again) == len(again.vocab) == 420
    assert sorted(again.vocab.values()) == list(range(420))
    again.train(CORPUS)  # training starts anew each time
    assert again.fingerprint == tokenizer.fingerprint


def test_training_refuses_what_cannot_work(tokenizer, tmp_path):
    with pytest.raises(UserError, match="259"):
        ByteLevelBPETokenizer(259)
    with pytest.raises(UserError, match="PAD"):
        ByteLevelBPETokenizer(300, special_tokens=("<s>", "PAD", "</s>", "<unk>"))
    with pytest.raises(UserError, match="different"):
        ByteLevelBPETokenizer(300, special_tokens=("<s>", "<s>", "</s>", "<unk>"))
    for nothing in ([], ["", ""]):
        with pytest.raises(UserError, match="no text"):
            ByteLevelBPETokenizer(300).train(nothing)
    with pytest.raises(UserError, match="min_frequency"):
        ByteLevelBPETokenizer(300).train(CORPUS, min_frequency=0)
    tokenizer.save(tmp_path)
    with pytest.raises(UserError, match="loaded"):
        ByteLevelBPETokenizer.from_pretrained(tmp_path).train(CORPUS)


# -- files -------------------------------------------------------------------------------------------------------------


def test_a_saved_tokenizer_loads_unchanged(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "new" / "folder")
    assert sorted(path.name for path in (tmp_path / "new" / "folder").iterdir()) == sorted(SAVED_FILES)
    copies = [
        ByteLevelBPETokenizer.from_pretrained(tmp_path / "new" / "folder"),
        ByteLevelBPETokenizer.from_files(tokenizer.to_files()),
        pickle.loads(pickle.dumps(tokenizer)),
    ]
    texts = [*CORPUS[:4], "</s>", *random_texts(50, seed=3)]
    for copy in copies:
        assert copy.fingerprint == tokenizer.fingerprint
        assert copy.vocab == tokenizer.vocab
        assert [copy.encode(text) for text in texts] == [tokenizer.encode(text) for text in texts]
        assert copy.to_files() == tokenizer.to_files()


def test_merges_with_commas_and_spaces_survive_saving(tmp_path):
    trained = ByteLevelBPETokenizer(280)
    trained.train(["x ,, ,, ,, \n\n a   b"] * 30)
    tokens = {trained.decode([index]) for index in range(260, len(trained))}
    assert any("," in token for token in tokens) and any(" " in token for token in tokens)
    trained.save(tmp_path)
    merges = json.loads((tmp_path / "tokenizer.json").read_text(encoding="utf-8"))["model"]["merges"]
    lines = (tmp_path / "merges.txt").read_text(encoding="utf-8").split("\n")[1:-1]
    assert [line.split(" ") for line in lines] == merges
    text = "x ,, ,, a   b \n\n"
    assert ByteLevelBPETokenizer.from_pretrained(tmp_path).encode(text) == trained.encode(text)


def test_the_fingerprint_tells_vocabularies_and_templates_apart(tokenizer):
    other = ByteLevelBPETokenizer(421)
    other.train(CORPUS)
    changed = ByteLevelBPETokenizer.from_files(tokenizer.to_files())
    changed.chat_template = tokenizer.chat_template + "!"
    prints = {tokenizer.fingerprint, other.fingerprint, changed.fingerprint}
    assert len(prints) == 3 and all(len(each) == 64 for each in prints)


def test_a_save_stopped_after_any_file_leaves_a_folder_that_does_not_load(tokenizer, tmp_path):
    for count in range(len(SAVED_FILES)):
        folder = tmp_path / str(count)
        tokenizer.save(folder)
        for name in SAVED_FILES[count:]:
            (folder / name).unlink()
        with pytest.raises(UserError, match=r"tokenizer.json is missing.*byte_level_bpe.py"):
            ByteLevelBPETokenizer.from_pretrained(folder)


def test_a_save_that_fails_over_an_older_tokenizer_does_not_mix_the_two(tokenizer, tmp_path):
    ByteLevelBPETokenizer(300).save(tmp_path)
    (tmp_path / "vocab.json").unlink()
    (tmp_path / "vocab.json").mkdir()  # a file cannot take its place: the save stops after the first file
    with pytest.raises(UserError, match="cannot be saved"):
        tokenizer.save(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["merges.txt", "tokenizer_config.json", "vocab.json"]
    with pytest.raises(UserError, match=r"tokenizer.json is missing"):
        ByteLevelBPETokenizer.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer.json", '{"model": {"type": "BPE"'),
        ("tokenizer.json", '{"model": {"type": "WordPiece"}}'),
        ("tokenizer.json", '{"model": {"type": "BPE"}, "decoder": {"type": "ByteLevel"}}'),
        ("tokenizer.json", "[]"),
        ("tokenizer_config.json", "{}"),
        ("tokenizer_config.json", '{"eos_token": "</end>"}'),
        ("tokenizer_config.json", '{"eos_token": 7}'),
        ("tokenizer_config.json", '{"eos_token": "</s>", "chat_template": "{% for %}"}'),
        ("tokenizer_config.json", '{"eos_token": "</s>", "chat_template": 5}'),
        ("tokenizer_config.json", '{"eos_token": "</s>", "chat_template": [{"name": "other"}]}'),
    ],
)
def test_a_damaged_folder_is_a_user_error_that_names_it_and_the_remedy(tokenizer, tmp_path, name, content):
    tokenizer.save(tmp_path)
    (tmp_path / name).write_text(content, encoding="utf-8")
    with pytest.raises(UserError) as error:
        ByteLevelBPETokenizer.from_pretrained(tmp_path)
    assert str(tmp_path) in str(error.value) and "byte_level_bpe.py" in str(error.value)


def test_a_missing_folder_and_an_unwritable_one_are_user_errors(tokenizer, tmp_path):
    with pytest.raises(UserError, match="byte_level_bpe.py"):
        ByteLevelBPETokenizer.from_pretrained(tmp_path / "nothing")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be saved"):
        tokenizer.save(tmp_path / "file")


def test_the_folder_loads_in_tokenizers_and_transformers_with_the_same_ids_and_rendering(tokenizer, tmp_path):
    transformers = pytest.importorskip("transformers")
    tokenizer.save(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path, local_files_only=True)
    for text in [*CORPUS[:4], *random_texts(50, seed=4)]:
        ids = tokenizer.encode(text)["input_ids"]
        assert Tokenizer.from_file(str(tmp_path / "tokenizer.json")).encode(text).ids == ids
        assert theirs(text)["input_ids"] == ids
        assert theirs.decode(ids, skip_special_tokens=True) == text
    for role in ("bos", "eos", "pad", "unk"):
        assert getattr(theirs, f"{role}_token_id") == getattr(tokenizer, f"{role}_token_id")
    for messages, prompt in ((CHAT, False), (CHAT[:2], True), (CHAT[1:4], True), (CHAT[1:], False)):
        rendered = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)
        assert tokenizer.render_chat(messages, prompt) == rendered
    whole = theirs.apply_chat_template(CHAT[:3], tokenize=True, return_dict=True)["input_ids"]
    assert tokenizer.encode_chat(CHAT[:3])["input_ids"] == whole


def published_folder(tokenizer, folder, special, config, old_layout):
    """A folder as GPT-2's and Qwen's are published, with our merges inside and `special` tokens after the rest."""
    files = tokenizer.to_files()
    model = json.loads(files["tokenizer.json"])["model"]
    plain = [token for token in model["vocab"] if token not in ("<s>", "<pad>", "</s>", "<unk>")]
    vocab = {token: index for index, token in enumerate(plain)}
    folder.mkdir()
    if config.get("tokenizer_class") is None:  # GPT-2 counts its special token among the ordinary ones
        vocab.update({token: len(vocab) + i for i, token in enumerate(special)})
    else:
        config["added_tokens_decoder"] = {
            str(len(vocab) + i): {"content": token, "special": token != "<think>"} for i, token in enumerate(special)
        }
    (folder / "vocab.json").write_text(json.dumps(vocab), encoding="utf-8")
    (folder / "merges.txt").write_text(files["merges.txt"], encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    if not old_layout:
        transformers = pytest.importorskip("transformers")
        name = config.get("tokenizer_class") or "GPT2Tokenizer"
        getattr(transformers, name).from_pretrained(folder).save_pretrained(folder)
        for extra in ("vocab.json", "merges.txt"):
            (folder / extra).unlink(missing_ok=True)
        assert (folder / "tokenizer.json").is_file()
    return folder


@pytest.mark.parametrize("old_layout", [True, False])
def test_gpt2_folders_load_with_the_ids_of_transformers(tokenizer, tmp_path, old_layout):
    transformers = pytest.importorskip("transformers")
    config = {"model_max_length": 1024}
    folder = published_folder(tokenizer, tmp_path / "gpt2", ["<|endoftext|>"], config, old_layout)
    ours = ByteLevelBPETokenizer.from_pretrained(folder)
    theirs = transformers.GPT2Tokenizer.from_pretrained(folder)
    for text in [*CORPUS[:4], *random_texts(100, seed=5)]:
        assert ours.encode_batch([text])[0] == theirs(text)["input_ids"]
        assert ours.decode(ours.encode(text)["input_ids"]) == text
    end = ours.vocab["<|endoftext|>"]
    assert (ours.bos_token_id, ours.eos_token_id, ours.pad_token_id) == (end, end, end)
    assert ours.vocab_size == len(theirs) == end + 1
    answer = ours.encode_chat(CHAT[1:3])  # without a template of its own it is given the default one
    assert answer["labels"][-1] == end


@pytest.mark.parametrize("old_layout", [True, False])
def test_qwen_folders_load_with_the_ids_and_the_template_of_transformers(tokenizer, tmp_path, old_layout):
    transformers = pytest.importorskip("transformers")
    config = {
        "tokenizer_class": "Qwen2Tokenizer",
        "bos_token": None,
        "eos_token": "<|im_end|>",
        "pad_token": {"__type": "AddedToken", "content": "<|endoftext|>", "special": True},
        "unk_token": None,
        "add_bos_token": False,
        "chat_template": "overridden by the file",
    }
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>"]
    folder = published_folder(tokenizer, tmp_path / "qwen", special, config, old_layout)
    (folder / "chat_template.jinja").write_text(CHATML, encoding="utf-8")
    ours = ByteLevelBPETokenizer.from_pretrained(folder)
    theirs = transformers.Qwen2Tokenizer.from_pretrained(folder)
    for text in [*CORPUS[:4], "e\u0301", "<think>", *random_texts(100, seed=6)]:
        assert ours.encode(text)["input_ids"] == theirs(text)["input_ids"]  # no token before the text
    assert ours.bos_token_id is None and ours.unk_token_id is None
    assert ours.eos_token_id == theirs.eos_token_id and ours.pad_token_id == theirs.pad_token_id
    assert ours.render_chat(CHAT, True) == theirs.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=True)
    encoded = ours.encode_chat(CHAT)
    assert ours.decode(encoded["input_ids"], skip_special_tokens=False) == ours.render_chat(CHAT)
    taught = [index for index in encoded["labels"] if index != IGNORED_LABEL]
    # ChatML's line break after an answer is not taught
    assert ours.decode(taught, skip_special_tokens=False) == "巴黎。<|im_end|>罗马。<|im_end|>"

    ours.save(tmp_path / "copy")
    copy = ByteLevelBPETokenizer.from_pretrained(tmp_path / "copy")
    assert copy.fingerprint == ours.fingerprint and copy.encode_chat(CHAT) == encoded


# -- command line ------------------------------------------------------------------------------------------------------


def test_the_command_line_trains_from_several_files_and_reports(tmp_path, capsys):
    (tmp_path / "a.txt").write_text("\n".join(CORPUS[:40]), encoding="utf-8")
    (tmp_path / "b.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in CORPUS), encoding="utf-8")
    output = tmp_path / "tokenizer"
    inputs = ["--input", str(tmp_path / "a"), str(tmp_path / "b.jsonl")]
    main([*inputs, "--vocab_size", "300", "--output_dir", str(output)])
    report = capsys.readouterr().out.strip().splitlines()[-1]
    assert "300 tokens" in report and "bytes per token" in report and str(output) in report
    assert ByteLevelBPETokenizer.from_pretrained(output).vocab_size == 300
    assert {*KNOWN_FILES, "report.json", "report.png"} >= {path.name for path in output.iterdir()}
    figures = json.loads((output / "report.json").read_text(encoding="utf-8"))
    assert figures["bytes_per_token"]["all"] > 1 and 0 <= figures["unused"] < 1 and figures["longest"]


@pytest.mark.parametrize(
    "arguments",
    [["--input", "missing.txt"], ["--input", "empty.txt"], ["--vocab_size", "100"], ["--min_frequency", "0"], ["--x"]],
)
def test_the_command_line_answers_a_mistake_with_one_sentence_and_status_2(tmp_path, arguments):
    (tmp_path / "empty.txt").write_text("")
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(ROOT / "byte_level_bpe.py"), "--output_dir", "out", *arguments]
    run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert run.returncode == 2
    assert run.stderr.startswith("error: ") and len(run.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()


# -- the strings of special tokens in a text ---------------------------------------------------------------------------


def test_strings_of_special_tokens_are_read_as_the_corpus_means_them(tmp_path):
    """By default they are text; a folder with `special_strings` reads them in documents as `transformers` does, and
    in prompts and conversations as text all the same."""
    transformers = pytest.importorskip("transformers")
    lines = [" the <unk> of <unk> </s> , 1998 ", "plain words"]
    plain, special = (ByteLevelBPETokenizer(300, special_strings=kind) for kind in ("text", "special"))
    for tokenizer, folder in ((plain, "plain"), (special, "special")):
        tokenizer.train(lines * 3)
        tokenizer.save(tmp_path / folder)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "special")
    loaded = ByteLevelBPETokenizer.from_pretrained(tmp_path / "special")
    for tokenizer in (special, loaded, pickle.loads(pickle.dumps(loaded))):
        assert tokenizer.encode_documents(lines) == theirs(lines, add_special_tokens=False)["input_ids"]
        assert tokenizer.encode_documents(lines)[0].count(3) == 2
    split = theirs(lines, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    for tokenizer in (plain, special, loaded):
        assert tokenizer.encode_batch(lines) == split
        assert not {2, 3} & set(tokenizer.encode(lines[0])["input_ids"])
        chat = tokenizer.encode_chat([{"role": "user", "content": "<unk></s>"}], add_generation_prompt=True)
        assert not {2, 3} & set(chat["input_ids"])
    assert plain.encode_documents(lines) == split
    assert plain.fingerprint != special.fingerprint  # token shards of one reading are not taken for the other's


def test_documents_with_special_strings_are_named_when_a_tokenizer_is_trained(tmp_path, capsys):
    """The share of such documents is said, and how to read them otherwise."""
    (tmp_path / "wiki.txt").write_text("the <unk> said\nplain\n" * 10, encoding="utf-8")
    arguments = ["--input", str(tmp_path / "wiki.txt"), "--vocab_size", "300", "--output_dir", str(tmp_path / "bpe")]
    main(arguments)
    assert "50.0% of the documents of a sample hold the string of a special token" in capsys.readouterr().out
    main([*arguments, "--special_strings", "special"])
    assert "hold the string" not in capsys.readouterr().out
    assert ByteLevelBPETokenizer.from_pretrained(tmp_path / "bpe").special_strings == "special"
