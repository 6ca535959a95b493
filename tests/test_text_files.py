"""Reading what people have: every kind of file gives the same documents, every mistake one sentence."""

import ctypes
import gzip
import json
import random
import subprocess
import sys
from pathlib import Path

import pytest

from command_line import UserError
from text.text_files import ReadingOptions, UnreadRecords, holds_records, iter_documents, iter_records, resolve_files

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = ["法国的首都是巴黎。", "The capital of France is Paris.", "  leading spaces and a tab\tinside  ", "🦊 café"]


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    data = content.encode() if isinstance(content, str) else content
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def as_lines(documents):
    return "".join(document + "\n" for document in documents)


def as_jsonl(documents):
    return "".join(json.dumps({"id": number, "text": text}) + "\n" for number, text in enumerate(documents))


# ---------------------------------------------------------------------------------------------------------- documents


@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz", "a.jsonl", "a.jsonl.gz", "b.c.jsonl"])
def test_every_kind_of_text_file_gives_the_same_documents(name, tmp_path):
    path = write(tmp_path / name, (as_jsonl if "jsonl" in name else as_lines)(DOCUMENTS))
    assert list(iter_documents(path)) == DOCUMENTS


def test_parquet_gives_the_same_documents(tmp_path):
    """From the column `text`; null and blank cells are no documents."""
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    rows = [None, *DOCUMENTS, " "]
    table = pyarrow.table({"id": list(range(len(rows))), "text": pyarrow.array(rows, pyarrow.string())})
    parquet.write_table(table, tmp_path / "a.parquet")
    assert list(iter_documents(tmp_path / "a.parquet")) == DOCUMENTS
    parquet.write_table(pyarrow.table({"content": ["x"]}), tmp_path / "b.parquet")
    with pytest.raises(UserError, match='b.parquet has no column "text"; its columns are content'):
        list(iter_documents(tmp_path / "b.parquet"))
    parquet.write_table(pyarrow.table({"text": [1, 2]}), tmp_path / "c.parquet")
    with pytest.raises(UserError, match='column "text" of .*c.parquet does not hold texts'):
        list(iter_documents(tmp_path / "c.parquet"))


def test_a_file_that_is_no_parquet_is_refused(tmp_path):
    """With pyarrow because it is damaged, without it because it is missing: one sentence either way."""
    with pytest.raises(UserError, match=r"a\.parquet"):
        list(iter_documents(write(tmp_path / "a.parquet", "no parquet at all, but long enough for a footer")))


def test_line_ends_of_every_system_and_byte_order_marks_are_not_text(tmp_path):
    """CRLF, a missing last line end, a mark at the beginning, blank lines; a carriage return inside a line stays."""
    path = write(tmp_path / "a.txt", b"\xef\xbb\xbfone\r\n\r\n   \ntwo\rstill two\r\nthree")
    assert list(iter_documents(path)) == ["one", "two\rstill two", "three"]


def test_unusual_line_separators_do_not_end_a_document(tmp_path):
    """Only \\n does: U+2028, U+0085 and form feeds occur inside texts."""
    text = "a\u2028b\u0085c\x0cd\x1ee"
    assert list(iter_documents(write(tmp_path / "a.txt", text + "\nnext\n"))) == [text, "next"]


def test_a_document_of_jsonl_may_hold_line_ends(tmp_path):
    assert list(iter_documents(write(tmp_path / "a.jsonl", as_jsonl(["one\ntwo", "three"])))) == ["one\ntwo", "three"]


def test_a_corpus_is_read_one_document_at_a_time(tmp_path):
    """The first document is there before a mistake further down is seen."""
    path = write(tmp_path / "a.jsonl", '{"text": "first"}\n' + '{"text": "fine"}\n' * 9 + "not json\n")
    documents = iter_documents(path)
    assert next(documents) == "first"
    with pytest.raises(UserError, match=r"line 11 of .*a\.jsonl is not valid JSON"):
        list(documents)


# -------------------------------------------------------------------------------------------------------------- paths


def test_a_path_may_be_a_file_a_folder_or_a_name_without_its_ending(tmp_path):
    train = write(tmp_path / "train.txt", "a\n")
    second = write(tmp_path / "sub" / "b.jsonl.gz", as_jsonl("b"))
    write(tmp_path / "notes.md", "no data\n")
    assert resolve_files(train) == [train]
    assert resolve_files(str(tmp_path / "train")) == [train]
    assert resolve_files(tmp_path / "sub" / "b") == [second]
    assert resolve_files(tmp_path) == sorted([train, second])
    assert list(iter_documents(tmp_path)) == ["b", "a"]  # in the order of the paths, the same on every machine


@pytest.mark.parametrize(
    ("path", "complaint"),
    [
        ("missing", "there is no data at .*missing .nor with one of the endings .txt"),
        ("missing/deeper/still.txt", "there is no data at"),
        ("notes.md", "is none of the supported kinds of file; convert it to .txt"),
        ("empty_folder", "the folder .*empty_folder holds no file that ends in .txt"),
    ],
)
def test_a_wrong_path_is_named(path, complaint, tmp_path):
    write(tmp_path / "notes.md", "text\n")
    (tmp_path / "empty_folder").mkdir()
    with pytest.raises(UserError, match=complaint):
        resolve_files(tmp_path / path)


# ----------------------------------------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize("content", [b"", b"\n\n  \n", b"\xef\xbb\xbf"])
def test_a_file_without_text_is_named(content, tmp_path):
    with pytest.raises(UserError, match=r"a\.txt holds no text; give a file with at least one line"):
        list(iter_documents(write(tmp_path / "a.txt", content)))


def test_a_binary_file_is_named(tmp_path):
    for rest in (b"", b"bad \xff\n"):
        with pytest.raises(UserError, match=r"a\.txt is a binary file .line 2 has a zero byte."):
            list(iter_documents(write(tmp_path / "a.txt", b"fine\nsome\0thing\n" + rest)))


@pytest.mark.parametrize("encoding", ["gbk", "utf-16", "latin-1"])
@pytest.mark.parametrize("good_lines", [0, 5000])
def test_a_wrong_encoding_is_named_with_its_line(encoding, good_lines, tmp_path):
    """However far into the file the first undecodable byte stands."""
    text = "café" if encoding == "latin-1" else "机器学习"
    path = write(tmp_path / "a.txt", b"a fine line\n" * good_lines + text.encode(encoding) + b"\n")
    with pytest.raises(UserError, match=rf"a\.txt is not UTF-8 text \(.* in line {good_lines + 1}\); save it as UTF-8"):
        list(iter_documents(path))


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("not json", "line 2 of .* is not valid JSON"),
        ('["text"]', 'line 2 of .* has no field "text" holding a string'),
        ('{"content": "x"}', 'line 2 of .* has no field "text" holding a string'),
        ('{"text": 3}', 'line 2 of .* has no field "text" holding a string'),
        ("[" * 100_000, "line 2 of .* is not valid JSON"),
        ('{"text": ' + "9" * 5000 + "}", "line 2 of .*"),
    ],
)
def test_a_wrong_record_of_jsonl_is_named_by_its_line(line, complaint, tmp_path):
    with pytest.raises(UserError, match=complaint):
        list(iter_documents(write(tmp_path / "a.jsonl", '{"text": "fine"}\n' + line + "\n")))


@pytest.mark.parametrize("name", ["a.txt.gz", "a.jsonl.gz", "a.json.gz"])
def test_a_damaged_gzip_file_is_named(name, tmp_path):
    """Not gzip at all, cut off anywhere, a byte changed anywhere: refused, or the change left the text as it was."""
    generator = random.Random(0)
    words = [" ".join(generator.choices(["red", "green", "blue"], k=9)) for _ in range(200)]
    if name == "a.txt.gz":
        content, read = as_lines(words), iter_documents
    else:
        content, read = json.dumps([{"text": word} for word in words]), iter_records
        content = as_jsonl(words) if "jsonl" in name else content
    path = write(tmp_path / name, content)
    good, expected = path.read_bytes(), list(read(path))
    damaged = [b"not gzip", *(good[:length] for length in range(1, len(good), 97))]
    for offset in [*range(0, 24), *range(24, len(good), 61), *range(len(good) - 8, len(good))]:
        damaged.append(good[:offset] + bytes([good[offset] ^ 0x41]) + good[offset + 1 :])
    refused = 0
    for data in damaged:
        path.write_bytes(data)
        try:
            assert list(read(path)) == expected
        except UserError as error:
            assert name in str(error)
            refused += 1
    assert refused > 0.8 * len(damaged)


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    """Here by a file of the kernel whose reading fails, as a bad disk or a lost network folder would."""
    source = Path("/proc/self/mem")
    if not source.exists():
        pytest.skip("needs /proc")
    (tmp_path / "a.txt").symlink_to(source)
    with pytest.raises(UserError, match=r"a\.txt cannot be read .*; mend that"):
        list(iter_documents(tmp_path / "a.txt"))


# ------------------------------------------------------------------------------------------------------------ records


@pytest.mark.parametrize("name", ["a.json", "a.json.gz", "a.jsonl", "a.jsonl.gz"])
def test_records_of_json_and_jsonl_are_the_same(name, tmp_path):
    """Each comes with a name for messages: its number, from 1, and the file."""
    records = [{"instruction": "你好", "response": "hi"}, {"n": 1}]
    text = "\n".join(json.dumps(r) for r in records) if "jsonl" in name else json.dumps(records, ensure_ascii=False)
    path = write(tmp_path / name, text)
    assert list(iter_records(path)) == [(f"record 1 of {path}", records[0]), (f"record 2 of {path}", records[1])]


@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    [
        ("a.json", "", "is not valid JSON"),
        ("a.json", "{", "is not valid JSON"),
        ("a.json", '{"data": []}', "must hold a list of records"),
        ("a.json", "[]", "holds no record"),
        ("a.json", '[{"a": 1}, 3]', r"record 2 of .*a\.json is not an object"),
        ("a.json", "机器".encode("gbk"), "is not UTF-8 text .* in line 1"),
        ("a.json", b"\x00\x01\x02PK", "is not valid JSON"),
        ("a.jsonl", "\n\n", "holds no record"),
        ("a.jsonl", '{"a": 1}\n{"a": \n', r"record 2 of .*a\.jsonl is not valid JSON"),
        ("a.jsonl", '{"a": 1}\n[]\n', r"record 2 of .*a\.jsonl is not an object"),
    ],
)
def test_wrong_records_are_named(name, content, complaint, tmp_path):
    with pytest.raises(UserError, match=complaint):
        list(iter_records(write(tmp_path / name, content)))


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.json", '[{"messages": []}]', True),
        ("a.json", '[{"text": "hi"}]', False),
        ("a.jsonl", '\n{"messages": []}\n', True),
        ("a.jsonl.gz", '{"id": 1, "text": "hi"}\n', False),
        ("a.txt", "[]", False),
        ("a.txt.gz", "hi", False),
        ("a.csv", "instruction,output\na,b\n", True),
    ],
)
def test_records_are_told_from_documents(name, content, expected, tmp_path):
    assert holds_records(write(tmp_path / name, content)) is expected


def test_rows_of_a_table_are_records(tmp_path):
    """Of a CSV file the first line names the fields; quotes hold line breaks, and true and false are no texts."""
    path = write(tmp_path / "a.csv", '\ufeffprompt,completion,label\n"a\nb",c,True\n"d, e",f,false\n')
    assert [record for _, record in iter_records(path)] == [
        {"prompt": "a\nb", "completion": "c", "label": True},
        {"prompt": "d, e", "completion": "f", "label": False},
    ]
    with pytest.raises(UserError, match="record 2 of .* has not as many fields as the first line"):
        list(iter_records(write(tmp_path / "b.csv", "a,b\n1,2\n3\n")))


# ------------------------------------------------------------------------------------------------ other ways of reading


def read(path, left_out=None, **options):
    return list(iter_documents(path, ReadingOptions(**options), left_out))


def test_zstd_csv_and_json_give_the_same_documents(tmp_path):
    zstandard = pytest.importorskip("zstandard")
    data = zstandard.ZstdCompressor().compress(as_jsonl(DOCUMENTS).encode())
    assert list(iter_documents(write(tmp_path / "a.jsonl.zst", data))) == DOCUMENTS
    with pytest.raises(UserError, match=r"b\.jsonl\.zst is not a sound zstd file"):
        list(iter_documents(write(tmp_path / "b.jsonl.zst", b"not zstd, whatever its name says")))
    listed = json.dumps([{"text": text} for text in DOCUMENTS])
    assert list(iter_documents(write(tmp_path / "c.json", listed))) == DOCUMENTS
    rows = "id,text\n" + "".join(f'{number},"{text}"\n' for number, text in enumerate([*DOCUMENTS, "two\nlines"]))
    assert list(iter_documents(write(tmp_path / "d.csv.gz", rows))) == [*DOCUMENTS, "two\nlines"]


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv", "a.json", "a.parquet"])
def test_the_text_may_have_another_name(name, tmp_path):
    records = [{"id": number, "content": text} for number, text in enumerate(DOCUMENTS)]
    path = tmp_path / name
    if name.endswith(".parquet"):
        parquet = pytest.importorskip("pyarrow.parquet")
        parquet.write_table(pytest.importorskip("pyarrow").Table.from_pylist(records), path)
    elif name.endswith(".csv"):
        write(path, "id,content\n" + "".join(f"{number},{text}\n" for number, text in enumerate(DOCUMENTS)))
    else:
        lines = [json.dumps(record) for record in records]
        write(path, f"[{','.join(lines)}]" if name.endswith(".json") else "\n".join(lines))
    assert read(path, text_field="content") == DOCUMENTS
    with pytest.raises(UserError, match="content"):  # what there is, is said
        read(path)


def test_books_and_code_are_no_lines(tmp_path):
    path = write(tmp_path / "a.txt", "\ufefffirst line\r\nsecond line\r\n\r\n \r\nnext\nof it\n")
    assert read(path, documents="blank_line") == ["first line\nsecond line", "next\nof it"]
    assert read(path, documents="file") == ["first line\nsecond line\n\n \nnext\nof it"]


def test_another_encoding_is_read_or_offered(tmp_path):
    path = write(tmp_path / "a.txt", "中文，简体。\n第二行\n".encode("gb18030"))
    with pytest.raises(UserError, match=r"byte 0xd6.* in line 1\).*--encoding gb18030.*--errors replace"):
        read(path)
    assert read(path, encoding="gb18030") == ["中文，简体。", "第二行"]
    utf16 = write(tmp_path / "c.txt", "中文\nand more\n".encode("utf-16"))
    with pytest.raises(UserError, match=r"--encoding utf-16.*--errors replace"):
        read(utf16)
    assert read(utf16, encoding="utf-16") == ["中文", "and more"]
    with pytest.raises(UserError, match=r"nothing of .*a\.txt can be read, the first of it because a document of"):
        read(path, skip_bad_records=True)
    mixed = write(tmp_path / "b.txt", b"first\nbad \xff\nthird\n")
    assert read(mixed, errors="replace") == ["first", "bad \ufffd", "third"]
    assert read(mixed, errors="ignore") == ["first", "bad ", "third"]
    assert ReadingOptions(encoding="klingon").reading_complaints() and not ReadingOptions().reading_complaints()


def test_what_cannot_be_read_is_left_out_counted_and_kept_if_that_is_wished(tmp_path):
    lines = [b'{"text": "first"}', b"no json", b'{"other": 1}', b'{"text": "bad \xff"}', b'{"text": "last"}']
    path = write(tmp_path / "a.jsonl", b"\n".join(lines))
    left_out = UnreadRecords(tmp_path / "left_out.jsonl")
    assert read(path, left_out, skip_bad_records=True) == ["first", "last"]
    kept = [json.loads(line) for line in (tmp_path / "left_out.jsonl").read_text().splitlines()]
    assert left_out.count == 3 and [entry["text"].strip() for entry in kept][:2] == ["no json", '{"other": 1}']
    assert "line 2 of" in kept[0]["why"] and "3 records left out" in str(left_out)
    with pytest.raises(UserError, match="line 4"):
        read(path)


def test_in_a_folder_dot_names_and_tables_beside_texts_are_no_data(tmp_path, capsys):
    write(tmp_path / "a.txt", "text\n")
    write(tmp_path / ".ipynb_checkpoints" / "a-checkpoint.txt", "text\n")
    write(tmp_path / "._a.txt", b"\x00\x05")
    write(tmp_path / "dataset_info.json", "{}")
    assert resolve_files(tmp_path) == [tmp_path / "a.txt"]
    assert "1 .json and .csv files beside its texts are not read" in capsys.readouterr().err


def test_the_same_file_under_two_names_is_said(tmp_path, capsys):
    for name in ("a.txt", "b.txt"):
        write(tmp_path / name, "the same text\n")
    write(tmp_path / "c.txt", "THE same text\n")
    assert len(resolve_files(tmp_path)) == 3
    assert "a.txt and " in (said := capsys.readouterr().err) and "c.txt" not in said


WRITE_WHERE_NOTHING_CAN_BE_WRITTEN = """
import sys
sys.path.insert(0, sys.argv[1])
import byte_level_bpe, text.download
from command_line import UserError
from text.cleaning.__main__ import main as clean
from text.text_files import UnreadRecords
from text.token_shards import tokenize_to_shards

for work in (
    lambda: byte_level_bpe.main(["--input", "a.txt", "--vocab_size", "300", "--output_dir", "closed/tokenizer"]),
    lambda: clean(["--input", "a.txt", "--output", "closed/out.jsonl"]),
    lambda: clean(["--input", "a.txt", "--output", "out.jsonl", "--rejected", "closed/rejected.jsonl"]),
    lambda: clean(["--input", "a.txt", "--output", "out.jsonl", "--report", "closed/report.html"]),
    lambda: clean(["--input", "a.txt", "--output", "out.jsonl", "--work_dir", "closed/work"]),
    lambda: text.download.main(["alpaca-zh", "--from_dir", ".", "--output_dir", "closed"]),
    lambda: tokenize_to_shards("a.txt", byte_level_bpe.ByteLevelBPETokenizer(300), "closed"),
    lambda: UnreadRecords("closed/left_out.jsonl").add("why", "text"),
):
    try:
        work()
    except UserError as error:
        print(error)
"""


def test_a_folder_that_cannot_be_written_to_is_named_before_any_work(tmp_path):
    """Not even by root, once it has given up the right to write everywhere."""
    if sys.platform != "linux":
        pytest.skip("needs Linux's capabilities")
    write(tmp_path / "a.txt", "some text\n")
    folder = tmp_path / "closed"
    folder.mkdir(mode=0o555)
    library, drop_from_the_bounding_set, dac_override = ctypes.CDLL(None), 24, 1
    done = subprocess.run(
        [sys.executable, "-c", WRITE_WHERE_NOTHING_CAN_BE_WRITTEN, str(ROOT)],
        preexec_fn=lambda: library.prctl(drop_from_the_bounding_set, dac_override, 0, 0, 0),
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    names = ("--output_dir", "--output", "--rejected", "--report", "--work_dir", "--output_dir")
    assert (done.stdout.splitlines(), done.stderr) == (
        [
            *(f"{folder} cannot be written to; choose another {name} or mend its permissions" for name in names),
            "cannot write token shards into closed (Permission denied); free some space or choose another --shard_dir",
            "what is left out cannot be kept in closed/left_out.jsonl (Permission denied); free some space or choose "
            "another place",
        ],
        "",
    )
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["a.txt", "closed"]  # nothing was begun
