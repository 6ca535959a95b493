"""The benchmarks run from end to end, compare like with like, and leave out what is not installed."""

import copy
import json
import os
import subprocess
import sys
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import numpy as np
import psutil
import pytest
import record_shapes
import torch

from benchmarks import bench_gpu, bench_inference, bench_service, bench_speculation, contestants, real_data
from benchmarks.model_files import LeftOut, ModelFiles
from benchmarks.peer_programs import PROGRAMS, Setting
from benchmarks.peers import Ours, Transformers, check_logits, synthetic_tokenizer
from benchmarks.tables import Table, write_section
from checkpoint import save_checkpoint
from command_line import UserError

ROOT = Path(__file__).resolve().parent.parent
PROMPT = [5, 17, 3, 44, 21, 60, 2, 9]


def figures_of_a_quick_run(capsys, *options):
    bench_inference.main(["--preset", "tiny", "--quick", *options])
    lines = capsys.readouterr().out.splitlines()
    return json.loads(lines[-1]), "\n".join(lines[:-1])


def test_a_quick_run_measures_everything_and_ends_with_one_line_of_json(capsys, tmp_path):
    page = tmp_path / "RESULTS.md"
    figures, text = figures_of_a_quick_run(capsys, "--num_threads", "1", "--write", str(page))
    assert {"decoding", "prefill", "cache", "streams", "latency", "overhead"} <= set(figures)
    assert figures["threads"] == 1 and figures["versions"]["torch"] == torch.__version__
    assert figures["decoding"]["ours INT8"]["tokens_per_second"] > 0
    assert all(goal["met"] == (goal["measured"] >= goal["at_least"]) for goal in figures["goals"] if goal["measured"])
    assert "ours INT8" in text and "| ours INT8 |" in page.read_text()


def test_drafts_are_measured_beside_none(capsys, tmp_path, random_model, tokenizer):
    model = random_model("modern", vocab_size=len(tokenizer), max_seq_len=128)
    path, page = str(tmp_path / "model.pth"), tmp_path / "RESULTS.md"
    save_checkpoint(path, model_state=model.state_dict(), config=model.config, tokenizer=tokenizer, stage="sft")
    options = f"--model_path {path} --draft_model {path} --shape false --write {page} --rounds 2 --num_threads 1"
    bench_speculation.main(f"{options} --n_questions 2 --max_gen_len 12".split())
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [row["drafter"] for row in figures["answers"]] == ["none", "lookup", "draft model"] * 2
    assert all(row["tokens_per_second"] > 0 for row in figures["answers"])
    assert "| model.pth | int8 | lookup |" in page.read_text()


def test_peers_that_are_not_installed_are_left_out(capsys, monkeypatch):
    monkeypatch.setattr(contestants, "find_spec", lambda name: None)
    figures, text = figures_of_a_quick_run(capsys)
    assert not any(name.startswith(("transformers", "llama.cpp")) for name in figures["decoding"])
    goal = next(goal for goal in figures["goals"] if goal["goal"] == "decoding FP32 ÷ llama.cpp F32")
    assert goal["measured"] is None and goal["met"] is None and "left out" in text


def test_a_peer_that_fails_is_left_out_with_the_reason(tmp_path):
    """Whatever it stumbles over, here a file that is missing; or its process ends."""
    where, setting = (tmp_path / "missing.pth", tmp_path), Setting(1, context=256, n_streams=2, stream_context=32)
    process = contestants.Process(1)
    with pytest.raises(LeftOut, match="missing.pth"):
        process.call(contestants._open_peer, "one", "transformers", "FP32", where, setting, PROMPT, np.zeros(8))
    with pytest.raises(BrokenProcessPool):
        process.call(os._exit, 1)
    process.close()


def test_processes_end_with_the_one_that_started_them():
    """Killed as well: nobody is left behind with gigabytes of weights."""
    script = "import os, time; from benchmarks.contestants import Process\nif __name__ == '__main__':\n"
    script += "    print(Process(1).call(os.getpid), flush=True); time.sleep(600)"
    with subprocess.Popen([sys.executable, "-c", script], cwd=ROOT, stdout=subprocess.PIPE, text=True) as started:
        process = psutil.Process(int(started.stdout.readline()))
        assert process.is_running()
        started.kill()
    process.wait(timeout=60)


def test_transformers_gets_our_weights(random_model):
    pytest.importorskip("transformers")
    for tied in (True, False):
        model = random_model("gpt2", tie_embeddings=tied)
        ours, theirs = Ours(model), Transformers(model)
        assert check_logits("transformers", theirs, ours.prefill(PROMPT), PROMPT, 1e-5) < 1e-5
        assert theirs.generate(PROMPT, 12) == ours.generate(PROMPT, 12)


@pytest.mark.parametrize("architecture", ["gpt2", "modern"])
@pytest.mark.parametrize("program", [each for each in PROGRAMS if each.module != "transformers"], ids=lambda p: p.name)
def test_a_peer_gets_our_weights(random_model, tmp_path, program, architecture):
    """Every kind of weights that it is measured with, alone and in a batch; what it cannot do, it says."""
    pytest.importorskip(program.module)
    sizes = dict(vocab_size=600, d_model=256, d_ff=512, max_seq_len=256)  # blocks of 256 weights
    model = random_model(architecture, tie_embeddings=True, **sizes)
    files = ModelFiles.of_weights(model, synthetic_tokenizer(600), tmp_path)
    expected = Ours(model).prefill(PROMPT)
    for weights, bits in program.bits.items():
        try:
            theirs = program.open(files, weights, Setting(1, context=256, n_streams=2, stream_context=32))
        except LeftOut as reason:
            assert "GPT-2" in str(reason) or "pip install" in str(reason)
            continue
        check_logits(program.name, theirs, expected, PROMPT, contestants.LIMITS[bits])
        alone, turned = theirs.generate(PROMPT, 6), theirs.generate(PROMPT[::-1], 6)
        together = theirs.generate_all([PROMPT, PROMPT[::-1]], 6)
        assert [tokens[0] for tokens in together] == [alone[0], turned[0]]
        assert [len(tokens) for tokens in together] == [6, 6]


def test_of_a_peer_that_shows_tokens_only_the_token_is_compared(random_model):
    expected = Ours(random_model("gpt2")).prefill(PROMPT)

    class Shows:
        def __init__(self, rank):
            self.token = int(np.argsort(-expected)[rank])

        def prefill(self, prompt):
            return self.token

    assert check_logits("the best", Shows(0), expected, PROMPT, 0.01) is None
    with pytest.raises(AssertionError, match="less likely than ours"):
        check_logits("the worst", Shows(-1), expected, PROMPT, 0.01)


def test_a_contestant_with_other_weights_is_refused(random_model):
    model, other = random_model("gpt2"), random_model("gpt2", seed=1)
    expected = Ours(model).prefill(PROMPT)
    with pytest.raises(AssertionError, match="the other computes another model"):
        check_logits("the other", Ours(other), expected, PROMPT, 0.05)
    with pytest.raises(AssertionError, match="nan"):
        check_logits("broken", Ours(model), np.full_like(expected, np.nan), PROMPT, 0.05)


def test_exchanged_weights_show_in_the_logits_of_the_benchmark():
    torch.manual_seed(0)
    model = bench_inference.random_model(bench_inference.BenchmarkConfig(512, 64, 2, 2, 256))
    expected, broken = Ours(model).prefill(PROMPT), copy.deepcopy(model)
    attention = broken.layers[1].attention
    attention.query_proj, attention.key_proj = attention.key_proj, attention.query_proj
    with pytest.raises(AssertionError):
        check_logits("broken", Ours(broken), expected, PROMPT, contestants.EXACT)


@pytest.mark.parametrize("size", [300, 2000, 50257])
def test_the_synthetic_tokenizer_has_a_text_for_every_id(size):
    tokenizer = synthetic_tokenizer(size)
    assert len(tokenizer) == size
    letters = [tokenizer.decode([index]) for index in range(257, size)]
    assert len(set(letters)) == size - 257 and all(letter.isascii() and letter for letter in letters)


def test_a_section_of_a_page_is_replaced_and_the_rest_stays(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("# Results\n")
    write_section(page, "speed", "old \\1")
    write_section(page, "other", "stays")
    write_section(page, "speed", "new")
    text = page.read_text()
    assert text.startswith("# Results\n") and "old" not in text and text.index("new") < text.index("stays")


def test_a_table_reads_the_same_in_the_terminal_and_in_markdown():
    table = Table("Title", "Note.", ["row", "tokens/s"], [["ours", "12"], ["theirs", "3"]])
    assert table.plain().splitlines()[-2:] == ["ours          12", "theirs         3"]
    assert table.markdown().splitlines()[-2:] == ["| ours | 12 |", "| theirs | 3 |"]


def test_impossible_settings_are_refused_before_any_work():
    with pytest.raises(UserError, match="--max_seq_len must be at least 256, not .*; --rounds must be at least 1"):
        bench_inference.main(["--rounds", "0", "--max_seq_len", "8"])


def test_the_gpus_benchmark_runs_through_a_gpus_code_on_a_cpu(tmp_path):
    """Every part, by the command of the day on which there is a GPU; what is measured means nothing."""
    page = tmp_path / "RESULTS.md"
    environment = {**os.environ, "PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": ""}
    command = ["bash", "benchmarks/gpu.sh", "--smoke", "--write", str(page)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    figures = json.loads(done.stdout.splitlines()[-1])
    assert figures["decoding"]["INT8, graphs"]["tokens_per_second"] > 0 and figures["prefill"]["BF16"] > 0
    assert set(figures["streams"]["INT4"]) == {"1", "16", "64", "256"} and figures["training"]["tiny"]["memory_mib"] > 0
    assert 0 < figures["alignment"]["grpo"]["generating"] < 1 and "### PPO and GRPO" in page.read_text()


def test_without_a_gpu_the_gpus_benchmark_says_so(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="there is no CUDA GPU here; --smoke"):
        bench_gpu.main([])


def test_a_folder_of_published_shapes_goes_through_every_stage(tmp_path, capsys):
    """What was read, left out and cut stands in the table; a file that is refused is a row with the reason."""
    data = tmp_path / "data"
    data.mkdir()
    for name in ("gsm8k", "hh_rlhf", "kto"):
        (data / f"{name}.json").write_text(json.dumps(record_shapes.records(name, 8)))
    (data / "pictures.json").write_text(json.dumps([{**record_shapes.records("plain", 1)[0], "images": ["a.png"]}]))
    real_data.main(["--data", str(data), "--max_steps", "1", "--vocab_size", "300", "--max_seq_len", "128"])
    lines = capsys.readouterr().out.splitlines()
    result = json.loads(lines[-1])
    stages = {(row["file"], row["stage"]): row for row in result["rows"]}
    assert result["crashes"] == 0 and len(stages) == 2 + 4 + 5 + 3 + 3
    refused = {place for place, row in stages.items() if "refused" in row}
    assert refused == {("pictures.json", stage) for stage in ("sft", "distill", "grpo")}
    assert 'has "images", which a model of text cannot take in' in stages["pictures.json", "sft"]["refused"]
    kto = stages["kto.json", "sft"]
    assert kto["left_out"] == {"called bad by their label": 4} and kto["read"] == 8 and kto["steps"] == 1
    assert any(line.startswith("hh_rlhf.json") and "HH-RLHF" in line and " ppo " in line for line in lines)


def test_the_services_benchmark_compares_and_ends_with_one_line_of_json(capsys):
    bench_service.main(["--quick", "--num_threads", "1", "--parts", "speed", "forms"])
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert figures["speed"]["ratio"] > 0 and figures["forms"]["JSON schema"] > 0
