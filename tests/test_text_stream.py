"""Streams of text: the pieces are the text, characters stay whole, and stop strings never show, not even in part."""

import codecs
import random

import pytest

from byte_level_bpe import ByteLevelBPETokenizer
from inference.text_stream import TextStream, whole_characters

TEXTS = [
    "法国的首都是巴黎。",
    "naïve café 👩‍🚀🇨🇳 é",
    "The capital is Paris.\n\n",
    "",
    "a\ufffdb",
    "\x00\x7f\u0800\U0010ffff",
]


@pytest.fixture(scope="module")
def byte_tokenizer():
    """A token is a byte, so every character but ASCII is split."""
    return ByteLevelBPETokenizer(300)


def stream(tokenizer, ids, stop=()):
    """The pieces of a text and its stream; as a server does, nothing is pushed after the stop."""
    text_stream, pieces = TextStream(tokenizer, stop), []
    for token_id in ids:
        pieces.append(text_stream.push(token_id))
        if text_stream.stopped:
            break
    pieces.append(text_stream.flush())
    assert "".join(pieces) == text_stream.text
    return pieces, text_stream


def ids_of_bytes(tokenizer, content):
    """The ids of single bytes, which need not be UTF-8."""
    of_byte = {tokenizer.token_bytes(index): index for index in range(tokenizer.vocab_size)}
    return [of_byte[bytes([byte])] for byte in content]


@pytest.mark.parametrize("text", TEXTS)
def test_pieces_are_whole_characters_and_join_to_the_text(tokenizer, byte_tokenizer, text):
    for each in (tokenizer, byte_tokenizer):
        ids = each.encode(text, add_special_tokens=True)["input_ids"] + [each.eos_token_id]
        pieces, _ = stream(each, ids)
        assert "".join(pieces) == text
        if "\ufffd" not in text:
            assert not any("\ufffd" in piece for piece in pieces)


def test_a_character_appears_with_its_last_byte(byte_tokenizer):
    ids = byte_tokenizer.encode("é界", add_special_tokens=False)["input_ids"]
    assert stream(byte_tokenizer, ids)[0] == ["", "é", "", "", "界", ""]


def test_random_bytes_give_what_decoding_them_at_once_gives(byte_tokenizer):
    """Bytes that are no UTF-8, overlong forms and surrogates among them, become U+FFFD; a beginning of a character at
    the end is left out."""
    generator = random.Random(0)
    likely = [0x41, 0x80, 0xBF, 0xC0, 0xC3, 0xE0, 0xE4, 0xED, 0xA0, 0xEF, 0xF0, 0x90, 0xF4, 0xF5, 0xFF]
    for _ in range(2000):
        content = bytes(generator.choice(likely) for _ in range(generator.randrange(9)))
        ids = ids_of_bytes(byte_tokenizer, content)
        expected = codecs.utf_8_decode(content, "replace", False)[0]
        assert "".join(stream(byte_tokenizer, ids)[0]) == expected == whole_characters(byte_tokenizer, ids)
        assert byte_tokenizer.decode(ids) == content.decode("utf-8", "replace")
        assert content.decode("utf-8", "replace").removeprefix(expected).strip("\ufffd") == ""


def test_random_ids_give_what_decoding_them_at_once_gives(tokenizer):
    """Special tokens among them, and ids beyond the tokenizer's vocabulary, which a padded model can produce."""
    generator = random.Random(1)
    for _ in range(300):
        ids = [generator.randrange(tokenizer.vocab_size + 5) for _ in range(30)]
        text = "".join(stream(tokenizer, ids)[0])
        assert tokenizer.decode(ids).removeprefix(text).strip("\ufffd") == ""


def test_an_unfinished_character_is_left_out(byte_tokenizer):
    pieces, _ = stream(byte_tokenizer, ids_of_bytes(byte_tokenizer, b"a\xe7\x95"))
    assert pieces == ["a", "", "", ""]


# --- stop strings ---------------------------------------------------------------------------------------------------


def up_to_the_first(text, stop):
    """The text before the first place where a stop string begins, and whether there is one."""
    places = [text.find(each) for each in stop if each in text]
    return text[: min(places)] if places else text, bool(places)


@pytest.mark.parametrize(
    ("text", "stop", "expected"),
    [
        ("one END two", ("END",), "one "),
        ("one EN two", ("END",), "one EN two"),
        ("one EN", ("END",), "one EN"),
        ("aaab", ("aab",), "a"),
        ("ababac.", ("abac",), "ab"),
        ("x\n\ny", ("\n\n",), "x"),
        ("巴黎。罗马。", ("。",), "巴黎"),
        ("xabcy", ("abc", "b"), "x"),
        ("xabdy", ("abc", "b"), "xa"),
        ("xab", ("abc", "b"), "xa"),
        ("two one", ("one", "two"), ""),
        ("User: hi", ("User:", "Us"), ""),
    ],
)
def test_the_text_ends_before_the_first_stop_string(tokenizer, byte_tokenizer, text, stop, expected):
    for each in (tokenizer, byte_tokenizer):
        pieces, text_stream = stream(each, each.encode(text, add_special_tokens=False)["input_ids"], stop)
        assert ("".join(pieces), text_stream.stopped) == (expected, expected != text)


def test_every_boundary_and_every_stop_string_gives_the_plain_definition(tokenizer, byte_tokenizer):
    """Random texts of few letters, so that partial matches overlap."""
    generator = random.Random(2)
    for _ in range(3000):
        text = "".join(generator.choice("ab界") for _ in range(generator.randrange(12)))
        stop = ["".join(generator.choice("ab界") for _ in range(generator.randrange(1, 5))) for _ in range(3)]
        expected, stopped = up_to_the_first(text, stop)
        for each in (tokenizer, byte_tokenizer):
            pieces, text_stream = stream(each, each.encode(text, add_special_tokens=False)["input_ids"], stop)
            assert ("".join(pieces), text_stream.stopped) == (expected, stopped)


def test_text_is_not_held_back_longer_than_it_must_be(byte_tokenizer):
    ids = byte_tokenizer.encode("a EN! END", add_special_tokens=False)["input_ids"]
    assert stream(byte_tokenizer, ids, ("END",))[0] == ["a", " ", "", "", "EN!", " ", "", "", "", ""]


def test_nothing_follows_a_stop_string(byte_tokenizer):
    text_stream = TextStream(byte_tokenizer, ("b",))
    pieces = [text_stream.push(i) for i in byte_tokenizer.encode("abcd", add_special_tokens=False)["input_ids"]]
    assert [*pieces, text_stream.flush()] == ["a", "", "", "", ""]
    assert text_stream.stopped
