"""What the READMEs promise: every command in them is run, in order, by a reader who has an empty clone and little time.

The English and the Chinese README hold the same commands, so they are run once. `SCALED_DOWN` and `INSTEAD` say, in
full, where what is run differs from what is written; everything else is run as it stands.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
import torch
from test_layers import layer_of

from gpt_model import GPTModel
from pipeline import SIZES, free_port
from pretrain_trainer import PretrainConfig
from text.conversation_data import parse_conversation, parse_preference

ROOT = Path(__file__).resolve().parent.parent
ENGLISH = (ROOT / "README.md").read_text(encoding="utf-8")
CHINESE = (ROOT / "README.zh-CN.md").read_text(encoding="utf-8")

# Arguments that are appended to a command, by its beginning; of several beginnings that fit, the longest counts.
SHORT = "--max_steps 2 --num_threads 1"
MODEL = "--d_model 32 --n_layers 1 --n_heads 2 --n_kv_heads 1 --sample_tokens 4"
SCALED_DOWN = {
    "python byte_level_bpe.py": "--vocab_size 512",
    "python pretrain_trainer.py": f"{MODEL} {SHORT}",
    "python pretrain_trainer.py --train_data_dir data/pretrain/train": f"{MODEL} {SHORT} --batch_size 2",
    "python pretrain_trainer.py --depth": f"{SHORT} --depth 1 --batch_size 2 --grad_accum_steps 1 --sample_tokens 4",
    "python pretrain_trainer.py --preset small": f"{MODEL} {SHORT} --batch_size 2 --max_seq_len 64",
    "python pretrain_trainer.py --preset small --output_dir models/small --resume": "--max_steps 3",  # beside the above
    "torchrun": f"{MODEL} {SHORT} --batch_size 2",
    "python seq2seq_trainer.py": f"{SHORT} --d_model 32 --batch_size 4 --num_beams 1 --val_fraction 0.001",
    "python finetune.py": f"{SHORT} --batch_size 4",
    "python finetune.py --mode ppo": f"{SHORT} --batch_size 4 --rollout_batch_size 4 --max_gen_len 4",
    "python finetune.py --mode rlhf": f"{SHORT} --batch_size 4 --rollout_batch_size 4 --max_gen_len 4 --ppo_epochs 1",
    "python finetune.py --mode grpo": f"{SHORT} --batch_size 4 --rollout_batch_size 8 --group_size 4 --max_gen_len 4",
    "python finetune.py --mode distill": f"{SHORT} --batch_size 4 --n_layers 1 --d_model 16",
    "python evaluator.py": "--max_samples 4 --max_gen_len 4 --num_threads 1",
    "python -m evaluation.ngram_baseline": "--max_samples 4 --max_gen_len 4",
    "python -m evaluation.side_by_side": "--max_samples 4 --max_gen_len 4 --num_threads 1",
    "python -m inference.inspect_model": "--num_threads 1 --max_gen_len 4",
    "python -m inference.quantizer": "--num_threads 1 --text_tokens 256",
    "python -m inference.kv_cache_infer": "--num_threads 1 --max_gen_len 4",
    "python -m inference.kv_cache_infer --model_path models/pretrain": "--num_threads 1 --max_gen_len 40",
    "curl": "--fail --silent --show-error",
    "locust": "--headless -u 2 -r 2 -t 2s",
}

# Commands that are not run as they are written: what is run in their place, and why.
PLAN_THE_STAGES = """python -c '
import sys, pipeline
config = pipeline.parse_config(pipeline.PipelineConfig, sys.argv[1:], description="")
pipeline.settle(config)
print(*(" ".join(stage.command) for stage in pipeline.build_stages(config)), sep="\\n")
'"""
INSTEAD = {
    "python -m exchange.import_model": (
        "python -m exchange.import_model --help #",
        "the model is downloaded first; tests/test_exchange_real_model.py goes this way where it is there",
    ),
    "bash run_training.sh": (
        PLAN_THE_STAGES,
        "a whole run is too long here (.ci/run makes one, with --smoke); the arguments are read and the stages planned",
    ),
    "bash run_tests.sh": ("bash -n run_tests.sh #", "this test is part of it"),
    "bash benchmarks/gpu.sh": ("bash -n benchmarks/gpu.sh #", "no GPU; tests/test_benchmarks.py runs it with --smoke"),
    "python data/build_sample_data.py": (
        "python data/build_sample_data.py --help #",
        "tests/test_sample_data.py runs it and compares its files byte for byte",
    ),
    "cd docker && docker-compose up": (
        "cd docker && docker-compose config --quiet #",
        "it would install torch in an image; the configuration is checked, where docker-compose is installed",
    ),
}

# What a command has promised to leave behind or to say, by its beginning.
LEAVES = {
    "python byte_level_bpe.py": ["models/bpe_tokenizer/tokenizer.json", "models/bpe_tokenizer/merges.txt"],
    "python pretrain_trainer.py": [
        "models/pretrain/pretrain_best.pth",
        "models/pretrain/checkpoints/step_00000002.pth",
        "models/pretrain/metrics.jsonl",
        "models/pretrain/curves.png",
        "models/pretrain/samples.txt",
    ],
    "python pretrain_trainer.py --depth": ["models/depth6/pretrain_best.pth"],
    "python finetune.py --mode sft": ["models/sft/sft_best.pth", "models/sft/metrics.jsonl", "models/sft/curves.png"],
    "python finetune.py --mode reward": ["models/reward/reward_best.pth"],
    "python finetune.py --mode ppo": ["models/ppo/ppo_best.pth"],
    "python finetune.py --mode rlhf": ["models/rlhf/ppo_best.pth", "models/rlhf/reward/reward_best.pth"],
    "python finetune.py --mode grpo": ["models/grpo/grpo_best.pth"],
    "python finetune.py --mode dpo": ["models/dpo/dpo_best.pth"],
    "python finetune.py --mode kto": ["models/kto/kto_best.pth"],
    "python finetune.py --mode sft --pretrained_model": ["models/sft_lora/sft_best.pth"],
    "python -m alignment.lora_export": ["models/sft_lora/merged.pth"],
    "python finetune.py --mode distill": ["models/distill/distill_best.pth"],
    "python evaluator.py --model_path models/pretrain": ["models/pretrain/pretrain_best_eval.json"],
    "python evaluator.py --model_path models/sft": ["models/sft/sft_best_eval.json"],
    "python evaluator.py --model_path models/reward": ["models/reward/reward_best_eval.json"],
    "python -m evaluation.ngram_baseline": ["models/ngram_eval.json"],
    "python -m evaluation.side_by_side": ["models/rlhf/ppo_best_beside_sft_best.html"],
    "python -m inference.quantizer": ["models/sft/sft_best_int8.pth"],
    "python -m inference.inspect_model": ["models/sft/sft_best_inside.html"],
    "python byte_level_bpe.py --input my_texts": ["models/mine/bpe_tokenizer/tokenizer.json"],
    "python pretrain_trainer.py --train_data_dir my_texts": ["models/mine/pretrain/pretrain_best.pth"],
    "python finetune.py --mode sft --data_path my_data": ["models/mine/sft/sft_best.pth"],
    "torchrun": ["models/two_ranks/pretrain_best.pth"],
    "python seq2seq_trainer.py": ["models/seq2seq/translate_best.pth", "models/seq2seq/translations.json"],
}
SAYS = {
    "curl http://localhost:8000/health": '"status":"healthy"',
    "curl -X POST": '"generated_text"',
    "python pretrain_trainer.py --preset small --output_dir models/small --resume": "step 2 of 3",
}


def blocks(readme, language):
    """The contents of a README's fenced blocks of one language."""
    fenced = re.findall(r"^```(\w*)\n(.*?)^```$", readme, re.MULTILINE | re.DOTALL)  # all, or an end is a beginning
    return [content for kind, content in fenced if kind == language]


def commands_of(readme):
    """Every command in the ```bash blocks, in order: continued lines joined, comments and extra spaces removed."""
    lines = "".join(blocks(readme, "bash")).replace("\\\n", " ").splitlines()
    lines = [re.sub(r"(^|\s+)# .*", "", line) for line in lines]
    return [re.sub(r"\s{2,}", " ", line).strip() for line in lines if line.strip()]


def entry_for(command, table, default):
    """The entry of the longest beginning that fits."""
    fitting = [beginning for beginning in table if command.startswith(beginning)]
    return table[max(fitting, key=len)] if fitting else default


def to_run(command):
    """What is run for a command of the README."""
    if (replacement := entry_for(command, INSTEAD, None)) is not None:
        beginning = max((b for b in INSTEAD if command.startswith(b)), key=len)
        return replacement[0] + command.removeprefix(beginning)
    extra = entry_for(command, SCALED_DOWN, "")
    if "--resume auto" in command:  # a run goes on with the settings it began with
        extra = f"{entry_for(command.split(' --resume')[0], SCALED_DOWN, '')} {extra}"
    return f"{command} {extra}".strip()


class Reader:
    """Someone with a fresh copy of the repository who types in one command after another."""

    def __init__(self, folder):
        ignored = [line.rstrip("/") for line in (ROOT / ".gitignore").read_text().split()]
        shutil.copytree(ROOT, folder, ignore=shutil.ignore_patterns(".git", *ignored))
        self.folder, self.port, self.service = folder, 8000, None
        (folder / ".venv").symlink_to(sys.prefix)
        self.environment = {
            **os.environ,
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "OMP_WAIT_POLICY": "passive",
            "CUDA_VISIBLE_DEVICES": "",
            "NUM_THREADS": "1",  # of the service
        }

    def bring_data(self):
        """Text, instructions, questions and preferences of the reader's own, in the shapes that the README shows."""
        (self.folder / "my_texts").mkdir()
        (self.folder / "my_data").mkdir()
        lines = (self.folder / "data/pretrain/train.txt").read_text(encoding="utf-8").splitlines(keepends=True)
        (self.folder / "my_texts" / "novel.txt").write_text("".join(lines[:200]), encoding="utf-8")
        instructions, preferences = (json.loads(block) * 10 for block in blocks(ENGLISH, "json"))
        named = {"instructions": instructions, "questions": instructions, "preferences": preferences}
        for name, records in named.items():
            (self.folder / "my_data" / f"{name}.json").write_text(json.dumps(records), encoding="utf-8")

    def types(self, command):
        """Run a command as the shell of a reader does; a service goes on in the background."""
        if command.startswith("uvicorn"):
            self.port = free_port()  # from here on
        command = to_run(command).replace("8000", str(self.port))
        if command.startswith("uvicorn"):
            return self.start_service(command)
        result = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", command],
            cwd=self.folder,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=300,
        )
        output = f"{result.stdout}\n{result.stderr}"
        assert result.returncode == 0, f"{command}\nexit status {result.returncode}\n{output}"
        assert "Traceback" not in output, f"{command}\n{output}"
        return output

    def start_service(self, command):
        self.service = subprocess.Popen(command.split(), cwd=self.folder, env=self.environment)
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and self.service.poll() is None:
            try:
                with urllib.request.urlopen(f"http://localhost:{self.port}/ready", timeout=5) as reply:
                    return reply.read().decode()
            except OSError:
                time.sleep(0.1)
        raise AssertionError(f"{command}\ndid not start")

    def leaves(self):
        if self.service is not None:
            self.service.terminate()
            self.service.wait(timeout=30)


@pytest.fixture(scope="module")
def reader(tmp_path_factory):
    """One reader, and one copy of the repository, for all commands: they build on each other."""
    reader = Reader(tmp_path_factory.mktemp("reader") / "clone")
    reader.bring_data()
    yield reader
    reader.leaves()


@pytest.mark.parametrize("command", [pytest.param(c, id=c.split(" -H")[0]) for c in commands_of(ENGLISH)])
def test_command_does_what_the_readme_says(reader, command):
    """The command exits with status 0, without a traceback, and what it promises to leave is there."""
    for tool in ("docker-compose", "curl"):  # whatever else is needed, the requirements bring
        if tool in command and shutil.which(tool) is None:
            pytest.skip(f"{tool} is not installed here")
    output = reader.types(command)
    for path in entry_for(command, LEAVES, []):
        assert (reader.folder / path).is_file(), f"{command} has not made {path}\n{output}"
    assert entry_for(command, SAYS, "") in output


def test_python_example_runs(reader):
    """The Python lines of the README run after its commands and print an answer."""
    (code,) = blocks(ENGLISH, "python")
    assert reader.types(f"python - <<'END'\n{code}\nEND") is not None


def test_tables_of_this_test_fit_the_readme():
    """No entry of the tables above is left over from a command that the README no longer has."""
    commands = commands_of(ENGLISH)
    for beginning in [*SCALED_DOWN, *INSTEAD, *LEAVES, *SAYS]:
        assert any(command.startswith(beginning) for command in commands), beginning


def test_both_languages_hold_the_same_commands():
    """Commands, Python lines, formats and headings' number agree; only the words around them differ."""
    assert commands_of(ENGLISH) == commands_of(CHINESE)
    for language in ("python", "json"):
        assert blocks(ENGLISH, language) == blocks(CHINESE, language)
    english, chinese = (re.findall(r"^(#+) ", readme, re.MULTILINE) for readme in (ENGLISH, CHINESE))
    assert english == chinese


@pytest.mark.parametrize("name", ["CONTRIBUTING", "CHANGELOG"])
def test_other_pages_of_the_root_are_alike_in_both_languages(name):
    """Headings, items, commands, code and links; and every link leads somewhere."""
    english, chinese = ((ROOT / f"{name}{ending}").read_text(encoding="utf-8") for ending in (".md", ".zh-CN.md"))
    for pattern in (r"^(#+) ", r"^(- (?:\*\*)?)", r"^```bash\n.*?^```$", r"`[^`\n]+`"):
        found = [re.findall(pattern, text, re.MULTILINE | re.DOTALL) for text in (english, chinese)]
        assert sorted(found[0]) == sorted(found[1]), pattern
    targets = [re.findall(r"\]\(([^)#]+)\)", text) for text in (english, chinese)]
    assert len(targets[0]) == len(targets[1])
    assert [target for target in sum(targets, []) if not (ROOT / target).is_file()] == []


def test_design_command_lines_are_in_the_readme():
    """The command lines that users rely on are there, letter for letter."""
    for command in (
        "python pretrain_trainer.py",
        "python byte_level_bpe.py --input data/pretrain/train.txt --vocab_size 4096 --output_dir models/bpe_tokenizer",
        "uvicorn inference.api_service:app --host 0.0.0.0 --port 8000",
        "locust -f inference/load_test.py -u 50 -r 10 -t 10m --host http://localhost:8000",
        "cd docker && docker-compose up -d",
    ):
        assert command in commands_of(ENGLISH)


@pytest.mark.parametrize("readme", [ENGLISH, CHINESE], ids=["en", "zh"])
def test_links_lead_somewhere(readme):
    """Every link inside the repository names a file that is there."""
    for target in re.findall(r"\]\(([^)#]+)\)", readme):
        assert "://" in target or (ROOT / target).is_file(), target


def test_formats_shown_are_the_formats_read():
    """Every record in the section on data formats is accepted by the readers of instructions and of preferences."""
    instructions, preferences = (json.loads(block) for block in blocks(ENGLISH, "json"))
    assert [len(parse_conversation(record, "README")) for record in instructions] == [2, 2, 5, 2, 2, 2]
    assert [len(parse_preference(record, "README")["answers"]) for record in preferences] == [2, 2, 3, 2, 2, 2]


def map_of(readme):
    """The first column of the map of the house."""
    (drawing,) = [block for block in blocks(readme, "") if "run_training.sh" in block]
    return [line.split()[0] for line in drawing.splitlines() if line.strip()]


def test_map_shows_the_house_as_it_is():
    """The map names only what is there, every module of the root and every folder of modules, in the layers' order."""
    names = map_of(ENGLISH)
    assert names == map_of(CHINESE)
    assert [name for name in names if not (ROOT / name).exists() and name != "models/"] == []
    there = {path.name for path in ROOT.glob("*.py")} | {f"{path.parent.name}/" for path in ROOT.glob("*/__init__.py")}
    assert there - set(names) == set(), "modules that the map does not show"
    layers = [layer_of(name.removesuffix(".py").rstrip("/")) for name in names if name in there]
    assert layers == sorted(layers)


@pytest.mark.parametrize("readme", [ENGLISH, CHINESE], ids=["en", "zh"])
def test_presets_have_the_sizes_that_the_table_says(readme):
    """Layers, width, heads, context, tokens a step, vocabulary and parameters of every preset."""
    rows = [line.strip("| ").split(" | ") for line in readme.splitlines() if re.match(r"\| `\w+` \| \d+ × ", line)]
    assert [row[0].strip("`") for row in rows] == list(PretrainConfig.presets)
    for name, shape, heads, context, step_tokens, vocabulary, parameters, *_ in rows:
        name, vocabulary = name.strip("`"), int(vocabulary.replace(",", ""))
        config = PretrainConfig(**PretrainConfig.presets[name])
        assert shape == f"{config.n_layers} × {config.d_model:,}"
        assert heads == f"{config.n_heads} ({config.n_kv_heads})"
        assert context == f"{config.max_seq_len:,}"
        assert step_tokens == f"{config.batch_size * config.grad_accum_steps * config.max_seq_len:,}"
        assert vocabulary == int(SIZES[name]["tokenizer"][1] if name in SIZES else 32_000)
        with torch.device("meta"):
            count = GPTModel.from_config(config.model_config(vocabulary, pad_token_id=1)).num_parameters()
        assert parameters == f"{count / 1e6:.1f} M"
