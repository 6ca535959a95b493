"""The pages in docs/ tell of the code that is there: commands, options, metrics, symbols; in both languages alike."""

import ast
import importlib
import json
import re
import shlex
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import torch

import finetune
from alignment.reward_function import call_reward, load_reward
from byte_level_bpe import ByteLevelBPETokenizer
from checkpoint import load_model, save_checkpoint
from command_line import UserError, parse_config
from gpt_model import GPTConfig, GPTModel
from inference.service.settings import ServiceSettings
from pretrain_trainer import GPTTrainer
from training import run_log

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
ENGLISH = sorted(page for page in DOCS.glob("*.md") if not page.name.endswith(".zh-CN.md"))
ALL_PAGES = sorted(DOCS.glob("*.md"))

# Options of programs that are not ours
TORCHRUN = ["standalone", "nnodes", "nproc_per_node", "rdzv_id", "rdzv_backend", "rdzv_endpoint"]
OTHERS = ["no", "tensor"]  # of pip and vLLM, likewise
DOCKER = ["profile", "scale"]
LOCUST = ["tags"]
LM_EVAL = ("apply_chat_template", "include_path", "model", "model_args")
SBATCH = ["nodes", "ntasks", "gpus", "cpus", "signal", "requeue"]  # those with hyphens by their first word

WITHOUT_OPTIONS = ("api_demo.py", "inference/load_test.py")  # Locust reads those of its own


def by_name(pages):
    return pytest.mark.parametrize("page", pages, ids=lambda page: page.name)


def chinese(page):
    return page.with_name(page.name.replace(".md", ".zh-CN.md"))


def blocks(page, language):
    """The contents of a page's fenced blocks of one language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


FIRST_CELL = r"^\|([^|]*)\|"  # of a table's row


def names_in(text):
    """What stands between backticks, in order."""
    return re.findall(r"`([^`]+)`", text)


def settings_of(script):
    """The class of settings that a script's command line is made from."""
    if script == "inference/api_service.py":
        return ServiceSettings
    name = re.findall(r"= parse_config\((\w+),", (ROOT / script).read_text(encoding="utf-8"))[-1]  # that of `main`
    return getattr(importlib.import_module(script.removesuffix(".py").replace("/", ".")), name)


def scripts():
    """Every script that reads its options by `parse_config`, but for finetune.py, which has several sets of them."""
    folders = (ROOT, ROOT / "benchmarks", *(path.parent for path in ROOT.glob("[!.]*/**/__init__.py")))
    there = [path for folder in folders for path in folder.glob("*.py")]
    found = [path for path in there if re.search(r" = parse_config\(\w+, argv,", path.read_text(encoding="utf-8"))]
    return {str(path.relative_to(ROOT)) for path in found} - {"command_line.py", "finetune.py"}


def python_commands(page):
    """(script, arguments) of each command in the ```bash blocks that runs a script of this project."""
    lines = "".join(blocks(page, "bash")).replace("\\\n", " ").splitlines()
    for words in (shlex.split(line, comments=True) for line in lines):
        for place, word in enumerate(words):
            script = words[place + 1].replace(".", "/") + ".py" if word == "-m" else word
            if word == "-m" and (ROOT / script.removesuffix(".py") / "__main__.py").is_file():
                script = f"{script.removesuffix('.py')}/__main__.py"
            if script.endswith(".py"):
                yield script, words[place + (2 if word == "-m" else 1) :]
                break


# -- commands and options ----------------------------------------------------------------------------------------------


@by_name(ENGLISH)
def test_commands_are_understood(page, monkeypatch):
    """Every command of a page is one that bash can read and whose arguments the script accepts."""
    monkeypatch.setenv("WORLD_SIZE", "16")  # --parallel is compared with it: as many ranks as the largest launch has
    for block in blocks(page, "bash"):
        subprocess.run(["bash", "-n"], input=block, text=True, check=True)
    for script, arguments in python_commands(page):
        if script in WITHOUT_OPTIONS:
            continue
        if script == "finetune.py":
            mode, arguments = finetune.split_mode(arguments)
            parse_config(finetune.MODES[mode][0], arguments, description="")
        else:
            parse_config(settings_of(script), arguments, description="")


RUN_AS_FILES = """
import runpy, sys
for file in sys.argv[1:]:
    sys.path[0], sys.argv = file.rpartition("/")[0], [file, "--help"]  # what `python FILE --help` starts with
    for name in [name for name in sys.modules if name.partition(".")[0] in ("inference", "alignment", "evaluation")]:
        del sys.modules[name]
    try:
        runpy.run_path(file, run_name="__main__")
    except SystemExit as exit_:
        assert exit_.code in (0, None), (file, exit_.code)
"""


def test_scripts_inside_folders_run_as_files(tmp_path):
    """`python inference/quantizer.py` does what `python -m inference.quantizer` does, from any working folder."""
    names = [path for folder in ("inference", "alignment", "evaluation") for path in (ROOT / folder).glob("*.py")]
    names = sorted(str(path) for path in names if 'if __name__ == "__main__"' in path.read_text(encoding="utf-8"))
    assert {"api_service", "kv_cache_infer", "load_test", "lora_export"} <= {Path(name).stem for name in names}
    done = subprocess.run(
        [sys.executable, "-c", RUN_AS_FILES, *names], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.lower().count("usage:") == len(names)


def test_reward_function_shown_is_one_that_grpo_takes(tmp_path):
    """The example of a reward function loads by its path, and pays for the right answer."""
    (code,) = blocks(DOCS / "grpo.md", "python")
    (tmp_path / "my_rewards.py").write_text(code, encoding="utf-8")
    reward = load_reward(f"{tmp_path}/my_rewards.py:reward")
    right, wrong = call_reward(reward, ["2 + 3?"] * 2, ["2 + 3 = 5.", "I am not sure."], [{"answer": "5"}] * 2)
    assert right > 0.9 > 0 > wrong


@by_name(ALL_PAGES)
def test_options_exist(page):
    """Every --option that a page names is one of some script, or of a program that starts ours."""
    settings = [config for config, _, _ in finetune.MODES.values()] + [settings_of(script) for script in scripts()]
    settings.append(ServiceSettings)
    known = {field.name.rstrip("_") for config in settings for field in fields(config)} | {"mode", "preset", "help"}
    named = set(re.findall(r"(?<![\w-])--([a-z]\w*)", page.read_text(encoding="utf-8")))
    assert named - known - {*TORCHRUN, *SBATCH, *DOCKER, *LOCUST, *LM_EVAL, *OTHERS} == set()


def test_code_for_readers_of_the_articles_runs(tmp_path, monkeypatch, capsys):
    """Trainer, checkpoint and cache as the page shows them; weights of the articles' names become a checkpoint."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(run_log, "plot_metrics", lambda *_: None)
    (tmp_path / "my_texts").mkdir()
    texts = [f"hello world, this is document {number}" for number in range(60)]
    (tmp_path / "my_texts" / "a.txt").write_text("\n".join(texts), encoding="utf-8")
    tokenizer = ByteLevelBPETokenizer(vocab_size=300)
    tokenizer.train(texts)
    tokenizer.save("models/bpe_tokenizer")
    names = {"query_proj": "w_q", "key_proj": "w_k", "value_proj": "w_v", "output_proj": "w_o"}
    model = GPTModel(vocab_size=len(tokenizer), d_model=32, n_layers=2, n_heads=2, max_seq_len=32)
    weights = {".".join(names.get(p, p) for p in name.split(".")): w for name, w in model.state_dict().items()}
    torch.save({"model_state_dict": weights, "epoch": 3}, "their_model.pth")
    with pytest.raises(UserError, match="docs/from_the_articles.md"):
        load_model("their_model.pth")
    with pytest.raises(TypeError, match="docs/from_the_articles.md"):
        GPTTrainer(model)
    for code in blocks(DOCS / "from_the_articles.md", "python"):
        exec(compile(code, "from_the_articles.md", "exec"), {})
    printed = capsys.readouterr().out.splitlines()
    assert float(printed[-1].removeprefix("tensor(").split(",")[0].rstrip(")")) < 1e-4
    ids = torch.tensor([tokenizer.encode("hello")["input_ids"]])
    assert torch.equal(load_model("models/theirs.pth")[0](ids)["logits"], model.eval()(ids)["logits"])


# -- links -------------------------------------------------------------------------------------------------------------


LINK_TO_CODE = re.compile(r"\[`([^`]+)`\]\(([^)\s]+\.(?:py|c|h))\)")


def definitions(source):
    """The names that are defined in a Python file; methods and fields under `name` and `Class.name`."""
    found = set()

    def visit(body, prefix):
        for node in body:
            targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
            names = [getattr(node, "name", None), *(getattr(target, "id", None) for target in targets)]
            found.update(key for name in filter(None, names) for key in (name, prefix + name))
            if isinstance(node, ast.ClassDef):
                visit(node.body, f"{prefix}{node.name}.")

    visit(ast.parse(source).body, "")
    return found


def astray(text, folder):
    """The links of a text to a symbol in a file that has no such symbol.

    A symbol is a function, class, method (`PPOLoop.judge`), field, constant or option (`--beta`) that the file defines,
    not merely mentions; or any piece of code that stands in it.
    """
    wrong = []
    for symbol, path in LINK_TO_CODE.findall(text):
        source = (folder / path).read_text(encoding="utf-8") if (folder / path).is_file() else ""
        if path.endswith(".py") and re.fullmatch(r"(--)?[\w.]+", symbol):
            there = symbol.removeprefix("--") in definitions(source)
        else:
            there = symbol in source
        if not there:
            wrong.append(f"{symbol} in {path}")
    return wrong


@by_name(ALL_PAGES)
def test_symbols_stand_where_links_lead(page):
    """Each link of a symbol leads to the file that defines it."""
    text = page.read_text(encoding="utf-8")
    assert astray(text, page.parent) == []
    assert re.findall(r"\]\([^)]*#L\d+\)", text) == [], "line numbers drift"


@by_name(ALL_PAGES)
def test_links_lead_somewhere(page):
    """Every link inside the repository names a file that is there."""
    for target in re.findall(r"\]\(([^)#\s]+)", page.read_text(encoding="utf-8")):
        assert "://" in target or (page.parent / target).is_file(), target


def test_links_astray_are_named(tmp_path):
    """A name that is defined elsewhere, or only in another class, is astray; a piece of code must stand there."""
    (tmp_path / "a.py").write_text("from b import g\nclass A:\n    beta: int = 1\n    def f(self): return g(1)\n")
    right = "[`A`](a.py) [`A.f`](a.py) [`f`](a.py) [`--beta`](a.py) [`return g(1)`](a.py)"
    assert astray(right, tmp_path) == []
    wrong = "[`g`](a.py) [`B.f`](a.py) [`--gamma`](a.py) [`return g(2)`](a.py) [`A`](b.py)"
    named = ["g in a.py", "B.f in a.py", "--gamma in a.py", "return g(2) in a.py", "A in b.py"]
    assert astray(wrong, tmp_path) == named


# -- two languages -----------------------------------------------------------------------------------------------------


@by_name(ENGLISH)
def test_both_languages_say_the_same(page):
    """Headings, commands, formulas, links, names in tables and options agree; only the words around them differ."""
    english, other = (p.read_text(encoding="utf-8") for p in (page, chinese(page)))

    def skeleton(text):
        links = re.findall(r"(`[^`]+`)?\]\(([^)\s]+)\)", text)
        return {
            "headings": re.findall(r"^(#+) ", text, re.MULTILINE),
            "blocks": re.findall(r"^```\w+\n.*?^```$", text, re.MULTILINE | re.DOTALL),
            "tables": [names_in(cell) for cell in re.findall(FIRST_CELL, text, re.MULTILINE)],
            "options": sorted(set(re.findall(r"(?<![\w-])--[a-z]\w*", text))),
            "links": sorted((symbol, target.replace(".zh-CN.md", ".md")) for symbol, target in links),
        }

    assert skeleton(english) == skeleton(other)
    assert english.count(f"]({chinese(page).name})") == 1
    assert other.count(f"]({page.name})") == 1


# -- metrics -----------------------------------------------------------------------------------------------------------

TINY = "--num_threads 1 --device cpu --precision fp32 --max_steps 1 --log_interval 1 --batch_size 2 --output_dir out"
PAIRS = "--pairwise_data pairs.json --val_pairwise_data pairs.json --sft_model base.pth"
SFT = "--sft_data data.json"
RUNS = {
    "sft": "--mode sft --pretrained_model base.pth --data_path data.json --val_data_path data.json",
    "reward_model": f"--mode reward {PAIRS}",
    "ppo": f"--mode rlhf {PAIRS} {SFT} --rollout_batch_size 2 --max_gen_len 4",
    "grpo": "--mode grpo --sft_model base.pth --data_path data.json --rollout_batch_size 2 --group_size 2",
    "dpo": f"--mode dpo {PAIRS} {SFT}",
    "kto": f"--mode kto {PAIRS} {SFT} --grad_accum_steps 4",
    "distillation": "--mode distill --teacher_model base.pth --data_path data.json --val_data_path data.json",
}


@pytest.fixture
def folder(tmp_path, monkeypatch, tokenizer):
    """A working folder with a small model, some instructions and some preferences."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(run_log, "plot_metrics", lambda *_: None)  # the curves of these runs interest no one
    config = GPTConfig.for_architecture(
        "modern", vocab_size=len(tokenizer), d_model=32, n_layers=2, n_heads=2, max_seq_len=64
    )
    torch.manual_seed(0)
    weights = GPTModel.from_config(config).state_dict()
    save_checkpoint("base.pth", model_state=weights, config=config, tokenizer=tokenizer, stage="sft")
    records = [{"instruction": f"{n} + 1", "response": f"{n + 1}", "answer": f"{n + 1}"} for n in range(4)]
    (tmp_path / "data.json").write_text(json.dumps(records))
    pairs = [{"instruction": f"{n} + 1", "chosen": f"{n + 1}", "rejected": "?"} for n in range(4)]
    (tmp_path / "pairs.json").write_text(json.dumps(pairs))
    return tmp_path


def metrics_of(page):
    """The names in the first column of the table under the heading "Metrics"."""
    text = page.read_text(encoding="utf-8")
    section = re.search(r"^## (?:Metrics|metrics.jsonl)\n(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL)[1]
    return {name for cell in re.findall(FIRST_CELL, section, re.MULTILINE) for name in names_in(cell)}


@pytest.mark.parametrize("name", RUNS)
def test_metrics_are_those_of_a_run(folder, name):
    """A page tells of every figure that its algorithm records, or training.md does; and of none that it does not."""
    finetune.main(f"{RUNS[name]} {TINY}".split())
    recorded = {key for record in run_log.read_metrics("out/metrics.jsonl") for key in record}
    told = metrics_of(DOCS / f"{name}.md")
    assert told - recorded == set()
    assert recorded - told - metrics_of(DOCS / "training.md") == set()
