"""Does alignment do what it promises? Every algorithm from the same SFT model, with several seeds, on the sample world.

    bash run_training.sh                                            # leaves the models that this starts from
    python benchmarks/bench_alignment.py --models_dir models --num_threads 2

    ppo, grpo, dpo, kto   from the SFT model, full training and (as ppo+lora, …) with low-rank adapters
    sft+lora              from the pretrained model, beside the SFT model that was trained in full
    student               a small model on a sixth of the instruction data alone, and
    distill               the same student on the same data with the SFT model as its teacher

Each run is the command line that a user would type. Its model then answers the held-out questions of data/sft greedily:
`exact` is the share of right answers, `preferred` the share that answer_checker prefers (right, whole and polite).
`kl` is the divergence from the SFT model in nats an answer, over answers sampled at temperature 1. `cpu s` are the
processor's seconds of the whole training process, on all cores together.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from alignment.log_probabilities import token_log_probs  # noqa: E402
from benchmarks.tables import Table, about, in_a_sentence, write_section  # noqa: E402
from checkpoint import load_checkpoint, load_model  # noqa: E402
from command_line import UserError, option, parse_config, require_file, run_main  # noqa: E402
from gpt_model import GPTModel  # noqa: E402
from inference.request import encode_prompt  # noqa: E402
from inference.text_generation import generate_texts  # noqa: E402
from text.conversation_data import load_conversations  # noqa: E402

LORA_RANKS = {"sft": 6}  # what makes less than 5 % of the parameters together with the embedding's adapter; else 4
STUDENT = ["--d_model", "96", "--n_layers", "2", "--n_heads", "2", "--epochs", "18", "--data_path", "{data}"]


@dataclass
class BenchConfig:
    """Settings of the benchmark."""

    models_dir: str = option("models", "what run_training.sh has left: a pretrained, an SFT and a reward model")
    runs: str = option(
        "ppo,grpo,dpo,kto,ppo+lora,grpo+lora,dpo+lora,sft+lora,student,distill", "what to run, by commas"
    )
    seeds: str = option("0,1,2", "seeds of ppo, grpo, dpo and kto, by commas; the other runs take the first")
    max_steps: int = option(0, "steps of each run; 0 means as many as the defaults say", at_least=0)
    max_questions: int = option(0, "held-out questions; 0 means all", at_least=0)
    num_threads: int = option(2, "CPU threads", at_least=1)
    output_dir: str = option("", "where to keep the runs; empty: nowhere")
    write: str = option("", "a Markdown page that takes the table; empty: none")

    def validate(self) -> list[str]:
        """What is wrong with the settings, a sentence each."""
        unknown = [name for name in self.runs.split(",") if name.split("+")[0] not in COMMANDS]
        complaints = [f"--runs {name} is not known; it must be of {', '.join(sorted(COMMANDS))}" for name in unknown]
        if not all(seed.isdecimal() for seed in self.seeds.split(",")):
            complaints.append(f"--seeds {self.seeds} must be whole numbers, separated by commas")
        return complaints


def _preference_data() -> list[str]:
    return ["--pairwise_data", "data/sft/rlhf_pairwise.json", "--val_pairwise_data", "data/sft/rlhf_pairwise_test.json"]


# How each algorithm is started, but for seeds, threads and folders; {models} is --models_dir, {data} a part of the data
COMMANDS: dict[str, list[str]] = {
    "ppo": ["--mode", "ppo", *_preference_data(), "--sft_model", "{models}/sft/sft_best.pth"]
    + ["--reward_model", "{models}/reward/reward_best.pth", "--sft_data", "data/sft/sft_data.json"],
    "grpo": ["--mode", "grpo", "--sft_model", "{models}/sft/sft_best.pth"],
    "dpo": ["--mode", "dpo", *_preference_data(), "--sft_model", "{models}/sft/sft_best.pth"]
    + ["--sft_data", "data/sft/sft_data.json"],
    "kto": ["--mode", "kto", *_preference_data(), "--sft_model", "{models}/sft/sft_best.pth"]
    + ["--sft_data", "data/sft/sft_data.json"],
    "sft": ["--mode", "sft", "--pretrained_model", "{models}/pretrain/pretrain_best.pth"],
    "student": ["--mode", "distill", "--teacher_model", "{models}/sft/sft_best.pth", "--alpha", "0", *STUDENT],
    "distill": ["--mode", "distill", "--teacher_model", "{models}/sft/sft_best.pth", *STUDENT],
}
SEVERAL_SEEDS = ("ppo", "grpo", "dpo", "kto")


def run_script(what: str, command: list[str]) -> None:
    """Run one of the project's scripts and wait for it."""
    done = subprocess.run([sys.executable, *command], cwd=ROOT, text=True, capture_output=True)
    if done.returncode:
        raise UserError(f"{what} failed: {done.stderr.strip()[-2000:]}")


def run_algorithm(name: str, seed: str, config: BenchConfig, folder: Path) -> tuple[Path, float]:
    """Train; returns the best model's path and the processor's seconds of the whole process."""
    algorithm, *variant = name.split("+")
    little_data = folder.with_name("a_sixth_of_sft_data.json")
    records = json.loads(Path("data/sft/sft_data.json").read_text(encoding="utf-8"))
    little_data.write_text(json.dumps(records[::6], ensure_ascii=False), encoding="utf-8")
    command = [argument.format(models=config.models_dir, data=little_data) for argument in COMMANDS[algorithm]]
    command += ["--seed", seed, "--num_threads", str(config.num_threads), "--output_dir", str(folder)]
    command += ["--lora_rank", str(LORA_RANKS.get(algorithm, 4))] if variant else []
    command += ["--max_steps", str(config.max_steps)] if config.max_steps else []
    before = os.times()
    run_script(f"training {name}", ["finetune.py", *command])
    (best,) = folder.glob("*_best.pth")
    after = os.times()
    return best, after.children_user + after.children_system - before.children_user - before.children_system


def ask(model_path: Path, config: BenchConfig, folder: Path) -> dict[str, float]:
    """Scores of the model's greedy answers to the held-out questions."""
    result = folder / "answers.json"
    command = ["evaluator.py", "--model_path", str(model_path), "--model_type", "sft"]
    command += ["--test_data_path", "data/sft/sft_test.json", "--output_path", str(result)]
    command += ["--max_samples", str(config.max_questions)] if config.max_questions else []
    run_script(f"evaluating {model_path}", [*command, "--num_threads", str(config.num_threads)])
    return json.loads(result.read_text(encoding="utf-8"))["scores"]


@torch.no_grad()
def divergence(policy: GPTModel, reference: GPTModel, tokenizer: object, prompts: list[list[dict]]) -> float:
    """Mean of Σ log π(token) − log π_ref(token) over sampled answers: the KL divergence in nats an answer."""
    answers = generate_texts(policy, tokenizer, prompts, chat=True, temperature=1.0, seed=0)
    total = 0.0
    for prompt, answer in zip(prompts, answers, strict=True):
        prompt_ids = encode_prompt(tokenizer, prompt, chat=True)
        ids = torch.tensor([prompt_ids + answer.token_ids])  # (1, T)
        mask, first = torch.ones_like(ids), len(prompt_ids)
        ours, theirs = (token_log_probs(model, ids, mask, first=first)[0] for model in (policy, reference))  # (1, R)
        total += float((ours - theirs).sum())
    return total / len(prompts)


def trained_share(model_path: Path) -> float:
    """Adapter weights as a share of the model's; 1 for a model that was trained in full."""
    content = load_checkpoint(model_path)
    if "lora" not in content:
        return 1.0
    model, _, _ = load_model(model_path)
    return sum(tensor.numel() for tensor in content["model"].values()) / model.num_parameters()


def measure(name: str, seed: str, model_path: Path, seconds: float, config: BenchConfig, folder: Path) -> dict:
    """One row of the table."""
    scores = ask(model_path, config, folder)
    row = {"run": name, "seed": int(seed), "cpu_seconds": round(seconds, 1), "kl": None}
    row |= {"exact": scores["exact"], "preferred": scores["preferred"], "trained": trained_share(model_path)}
    if name.split("+")[0] in SEVERAL_SEEDS:
        policy, tokenizer, _ = load_model(model_path)
        reference, _, _ = load_model(Path(config.models_dir) / "sft" / "sft_best.pth")
        questions = load_conversations("data/sft/sft_test.json")[:: 3 if not config.max_questions else 1]
        questions = questions[: config.max_questions or None]
        row["kl"] = divergence(policy, reference, tokenizer, [messages[:-1] for messages in questions])
    return row


def as_table(rows: list[dict]) -> Table:
    """All rows, for people."""
    header = ["run", "seed", "exact", "preferred", "KL, nats an answer", "parameters trained", "cpu s"]
    cells = [
        [row["run"], str(row["seed"]), f"{row['exact']:.1%}", f"{row['preferred']:.1%}"]
        + ["–" if row["kl"] is None else f"{row['kl']:.2f}", f"{row['trained']:.1%}", f"{row['cpu_seconds']:.0f}"]
        for row in rows
    ]
    note = (
        "Answers to the held-out questions of the sample world, greedy; every algorithm starts from the same SFT model."
    )
    return Table("Alignment", note, header, cells)


def main(argv: list[str] | None = None) -> None:
    """Run everything, print a line for each run and, at the end, one JSON object."""
    config = parse_config(BenchConfig, argv, description=__doc__.splitlines()[0])
    os.chdir(ROOT)
    torch.set_num_threads(config.num_threads)
    sft_model = require_file(Path(config.models_dir) / "sft" / "sft_best.pth", "the SFT model", "run run_training.sh")
    facts = about()
    print(in_a_sentence(facts), flush=True)
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(config.output_dir or scratch)
        root.mkdir(parents=True, exist_ok=True)

        def add(name: str, seed: str, model_path: Path, seconds: float) -> None:
            rows.append(measure(name, seed, model_path, seconds, config, root))
            print(json.dumps(rows[-1]), file=sys.stderr, flush=True)  # at once, as the runs are long

        add("sft", "0", sft_model, 0.0)
        for name in config.runs.split(","):
            seeds = config.seeds.split(",")
            for seed in seeds if name in SEVERAL_SEEDS else seeds[:1]:
                add(name, seed, *run_algorithm(name, seed, config, root / f"{name}_{seed}"))
    table = as_table(rows)
    print(table.plain())
    if config.write:
        write_section(Path(config.write), "alignment", f"## Alignment\n\n{in_a_sentence(facts)}\n\n{table.markdown()}")
    print(json.dumps({"benchmark": "alignment", **facts, "rows": rows}))


if __name__ == "__main__":
    run_main(main)
