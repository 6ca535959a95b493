"""The course in docs/: each page has all of its parts, its code is that of the project, and its solutions hold."""

import re
from pathlib import Path

import pytest
import torch
from test_docs import DOCS, LINK_TO_CODE, blocks

INDEX = (DOCS / "README.md").read_text(encoding="utf-8")
PAGES = [DOCS / name for name in re.findall(r"^\d+\. \[[^\]]+\]\((\w+\.md)\)", INDEX, re.MULTILINE)]
WITH_EXERCISES = [*PAGES, DOCS / "evaluation.md", DOCS / "look_inside.md"]


def section(page, heading):
    """What stands under a heading of the second level."""
    text = page.read_text(encoding="utf-8")
    return re.search(rf"^## {heading}\n(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL)[1]


def solutions(page):
    """What the folded parts of the exercises hold, in order."""
    found = re.findall(
        r"^<details>\n<summary>Solution</summary>\n(.*?)^</details>$", section(page, "Exercises"), re.M | re.S
    )
    return [re.findall(r"^```python\n(.*?)^```$", text, re.M | re.S) for text in found]


EXERCISES = [(page, number) for page in WITH_EXERCISES for number in range(len(solutions(page)))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_page_of_the_course_is_whole(page):
    """A formula, lines of the source as they stand there, a command, what to expect, three exercises."""
    assert "```math\n" in page.read_text(encoding="utf-8")
    assert blocks(page, "bash")
    assert section(page, "What you should see").strip()
    assert [len(code) for code in solutions(page)] == [1, 1, 1]
    code = section(page, "The code")
    sources = [(DOCS / path).read_text(encoding="utf-8") for _, path in LINK_TO_CODE.findall(code)]
    sources = ["\n".join(line.strip() for line in source.splitlines()) for source in sources]
    (excerpt,) = re.findall(r"^```\w+\n(.*?)^```$", code, re.MULTILINE | re.DOTALL)
    for run in re.split(r"^\.\.\.$", excerpt, flags=re.MULTILINE):  # three dots stand for what is left out
        lines = "\n".join(line.strip() for line in run.strip().splitlines())
        assert any(lines in source for source in sources), lines


@pytest.mark.parametrize("page,number", EXERCISES, ids=[f"{page.stem}-{number + 1}" for page, number in EXERCISES])
def test_solution_holds(page, number, tmp_path, monkeypatch):
    """The solution runs and asserts its claim, whatever stands in the working folder."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    (code,) = solutions(page)[number]
    assert re.search(r"^\s*(assert |torch\.testing\.assert_)", code, re.MULTILINE)
    exec(compile(code, f"{page.name}, exercise {number + 1}", "exec"), {"__name__": Path(page).stem})


def test_index_leads_to_every_page():
    """Every page of docs/ is in the index, and the course in the order of the pipeline."""
    linked = re.findall(r"\]\((\w+\.md)\)", INDEX)
    assert {path.name for path in DOCS.glob("*.md") if ".zh-CN" not in path.name} - {*linked, "README.md"} == set()
    assert [page.stem for page in PAGES] == [
        *("tokenizer", "attention", "positions", "block", "pretraining", "sft", "lora", "reward_model", "ppo", "grpo"),
        *("dpo", "kto", "distillation", "seq2seq", "experts", "quantization", "kv_cache", "serving", "distributed"),
    ]
