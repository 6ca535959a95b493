"""Public sets: a copy of each in the shape in which it is published becomes records that the other stages read."""

import builtins
import gzip
import json
import sys
from types import SimpleNamespace

import pytest

from command_line import UserError
from text.conversation_data import parse_conversation, parse_preference
from text.download import SETS, main
from text.text_files import iter_documents, iter_records

CHOICES = {"A": "一", "B": "二", "C": "三", "D": "四"}
TURNS = [{"role": "user", "content": "Hi?"}, {"role": "assistant", "content": "Hello."}]
ROWS = {  # as their pages show them
    "tinystories": {"text": "Once upon a time."},
    "fineweb-edu-sample": {"text": "An article.", "id": "<urn>", "dump": "CC", "score": 3.1, "token_count": 3},
    "wikipedia-zh": {"id": "13", "url": "https://…", "title": "数学", "text": "数学是研究数量的学科。"},
    "skypile-sample": {"text": "一段网页文字。"},
    "alpaca-en": {"instruction": "Add.", "input": "1 and 2", "output": "3", "text": "Below is …"},
    "alpaca-zh": {"instruction": "相加。", "input": "", "output": "三"},
    "belle": {"instruction": "写诗。", "input": "", "output": "床前明月光"},
    "coig-cqia": {"instruction": "问？", "input": "", "output": "答。", "task_type": {"major": ["问答"]}},
    "ultrafeedback": {"prompt": "Hi?", "prompt_id": "x", "chosen": TURNS, "messages": TURNS, "score_chosen": 8.0,
                      "rejected": [TURNS[0], {"role": "assistant", "content": "Go away."}]},
    "hh-rlhf": {"chosen": "\n\nHuman: Hi?\n\nAssistant: Hello.", "rejected": "\n\nHuman: Hi?\n\nAssistant: Go."},
    "gsm8k": {"question": "1 + 2?", "answer": "It is 3.\n#### 3"},
    "ceval": {"id": 0, "question": "选？", **CHOICES, "answer": "B", "explanation": ""},
    "cmmlu": {"Question": "选？", **CHOICES, "Answer": "C"},
}  # fmt: skip


def copy_of(folder, name):
    """A folder as the set is published: a file for each split, one of them of parquet."""
    for number, (split, _) in enumerate(SETS[name].splits):
        rows = [ROWS[name]] * (3 + number)
        (folder / "data").mkdir(parents=True, exist_ok=True)
        path = folder / "data" / f"{split.replace('_', '-')}-00000-of-00001.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return folder


@pytest.mark.parametrize("name", SETS)
def test_a_copy_becomes_records_that_the_stages_read(name, tmp_path, capsys):
    source = copy_of(tmp_path / "copy", name)
    main([name, "--from_dir", str(source), "--output_dir", str(tmp_path / "out")])
    about = json.loads((tmp_path / "out" / name / "SOURCE.json").read_text())
    assert about["licence"] == SETS[name].licence and SETS[name].licence in capsys.readouterr().out
    assert list(about["records"].values()) == [3 + number for number in range(len(SETS[name].splits))]
    path = tmp_path / "out" / name / next(iter(about["records"]))
    if "text" in json.loads(gzip.decompress(path.read_bytes()).splitlines()[0]):
        assert list(iter_documents(path)) == [ROWS[name]["text"]] * 3
        return
    (where, record), *rest = iter_records(path)
    assert len(rest) == 2
    if "chosen" in record:
        preference = parse_preference(record, where)
        assert preference["answers"][0]["content"] == "Hello." and preference["prompt"][-1]["content"] == "Hi?"
    else:
        answer = next(ROWS[name][field] for field in ("output", "answer", "Answer") if field in ROWS[name])
        assert parse_conversation(record, where)[-1]["content"] == answer


def test_parquet_limits_and_what_is_not_the_set(tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    table = pytest.importorskip("pyarrow").Table.from_pylist([ROWS["alpaca-zh"]] * 5)
    (tmp_path / "copy").mkdir()
    parquet.write_table(table, tmp_path / "copy" / "alpaca.parquet")
    options = ["--from_dir", str(tmp_path / "copy"), "--output_dir", str(tmp_path / "out")]
    main(["alpaca-zh", *options, "--limit", "2"])
    assert len(list(iter_records(tmp_path / "out" / "alpaca-zh" / "train.jsonl.gz"))) == 2
    with pytest.raises(UserError, match="holds no record of hh-rlhf .with fields like chosen, rejected"):
        main(["hh-rlhf", *options])
    with pytest.raises(UserError, match="is no folder"):
        main(["alpaca-zh", "--from_dir", str(tmp_path / "nowhere")])
    with pytest.raises(UserError, match="--name must be one of tinystories"):
        main([])


def test_a_set_comes_whole_or_not_at_all(tmp_path):
    copy = copy_of(tmp_path / "copy", "gsm8k")
    with (copy / "data" / "test-00000-of-00001.jsonl").open("a") as file:
        file.write("broken\n")
    with pytest.raises(UserError, match="test-00000-of-00001.jsonl is not valid JSON"):
        main(["gsm8k", "--from_dir", str(copy), "--output_dir", str(tmp_path / "out")])
    assert not list((tmp_path / "out" / "gsm8k").iterdir())


@pytest.mark.parametrize(("hub", "package"), [("huggingface", "datasets"), ("modelscope", "modelscope")])
def test_without_the_package_or_the_network_it_says_what_to_do(hub, package, tmp_path, monkeypatch):
    real = builtins.__import__

    def missing(name, *rest, **more):
        if name == package:
            raise ImportError(f"No module named {name}")
        return real(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(UserError, match=rf"pip install {package}`, or name a copy with --from_dir"):
        main(["alpaca-zh", "--hub", hub, "--output_dir", str(tmp_path)])
    assert not (tmp_path / "alpaca-zh").exists()


def test_a_hub_that_cannot_be_reached_is_named(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")

    def unreachable(*arguments, **options):
        raise ConnectionError("Couldn't reach the hub\nmore")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    monkeypatch.setitem(sys.modules, "modelscope", SimpleNamespace(dataset_snapshot_download=unreachable))
    monkeypatch.delenv("HF_ENDPOINT", raising=False)
    with pytest.raises(UserError, match="from https://huggingface.co .*ConnectionError.*try HF_ENDPOINT=.*--from_dir"):
        main(["alpaca-zh", "--output_dir", str(tmp_path)])
    with pytest.raises(UserError, match="from ModelScope .*try --hub huggingface, or copy .*--from_dir"):
        main(["alpaca-zh", "--hub", "modelscope", "--output_dir", str(tmp_path)])
    monkeypatch.setenv("HF_ENDPOINT", "https://mirror.example")
    with pytest.raises(UserError, match="from https://mirror.example .*; try --hub modelscope, or copy"):
        main(["alpaca-zh", "--output_dir", str(tmp_path)])
