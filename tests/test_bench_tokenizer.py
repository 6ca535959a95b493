"""The tokenizer's benchmark runs from end to end on a little text, and everybody's ids are the same."""

import json

import pytest

from benchmarks import bench_tokenizer


def test_a_quick_run_measures_everything_and_ends_with_one_line_of_json(tmp_path, monkeypatch, capfd):
    pytest.importorskip("gigatoken")
    pytest.importorskip("rustbpe")
    (tmp_path / "data/pretrain").mkdir(parents=True)
    for name in ("train", "val"):
        lines = [f"第{number}行，some words and {number * 37} more.\n" for number in range(300)]
        (tmp_path / f"data/pretrain/{name}.txt").write_text("".join(lines), encoding="utf-8")
    (tmp_path / "data/code.py").write_text("def double(x):\n    return 2 * x\n" * 50, encoding="utf-8")
    monkeypatch.setattr(bench_tokenizer, "ROOT", tmp_path)
    page = tmp_path / "RESULTS.md"
    options = ["--input", str(tmp_path / "data/pretrain/val.txt"), "--megabytes", "1", "--rounds", "1"]
    bench_tokenizer.main([*options, "--vocab_size", "400", "--write", str(page)])
    printed, complaints = capfd.readouterr()
    figures = json.loads(printed.splitlines()[-1])
    assert complaints == "" and "Starting merges" not in printed
    assert {kind.rpartition(",")[0] for kind in figures["encoding"]} == {"val", "sample data", "made here"}
    rows = [row for entry in figures["encoding"].values() for row in entry["rows"].items()]
    assert all(row["different"] == 0 and row["megabytes_per_second"] > 0 for _, row in rows)
    assert {"ours, arrays", "gigatoken, arrays", "tokenizers"} <= {who for who, _ in rows}
    assert set(figures["patterns"]) == set(bench_tokenizer.PATTERNS) and figures["seconds"] > 0
    assert all(isinstance(goal["met"], bool) for goal in figures["goals"])
    assert "| ours, arrays |" in page.read_text(encoding="utf-8") and "All of this took" in printed
