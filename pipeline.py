"""The whole way, from text to a served model and a report; `run_training.sh` sets up the environment and calls this.

Every stage is one of the repository's own command lines, run as a process of its own. What a stage was made of (its
command and the content of its inputs) is recorded beside what it made: a finished stage is skipped while that record
holds, an interrupted one continues from its last checkpoint, and one whose inputs have changed starts anew.
"""

from __future__ import annotations

import hashlib
import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import alignment.ppo
import alignment.reward_model
import alignment.sft
import finetune
from alignment.stage import say_accounts
from byte_level_bpe import ByteLevelBPETokenizer
from command_line import Interrupted, UserError, option, parse_config, replacing, run_main
from data_loader import GPTSFTDataset, RecordData
from evaluation.answer_report import parse_question
from evaluation.report import write_report
from pretrain_trainer import PretrainConfig
from text.account import WARNED_SHARE, Account
from text.chat_template import TEMPLATES
from text.conversation_data import (
    RecordOptions,
    load_conversations,
    load_records,
    parse_columns,
    parse_conversation,
    parse_preference,
)
from text.text_files import RECORD_ENDINGS, iter_documents, resolve_files
from training.run_folder import set_earlier_run_aside

# What each size changes on the stages' own command lines. The times are for the sample data.
SIZES: dict[str, dict[str, list[str]]] = {
    "smoke": {
        "tokenizer": ["--vocab_size", "1024"],
        "pretrain": ["--d_model", "64", "--n_layers", "2", "--n_heads", "2", "--n_kv_heads", "1", "--max_steps", "30"],
        "sft": ["--max_steps", "20"],
        "reward": ["--max_steps", "10"],
        "ppo": ["--max_steps", "2", "--rollout_batch_size", "32", "--batch_size", "32", "--max_gen_len", "16"]
        + ["--critic_warmup_steps", "0"],
        "evaluate": ["--max_samples", "36"],
    },
    "tiny": {
        "tokenizer": ["--vocab_size", "2048"],
        "pretrain": ["--preset", "tiny", "--epochs", "4"],
        "sft": [],
        "reward": [],
        "ppo": ["--max_gen_len", "48", "--epochs", "1"],
        "evaluate": [],
    },
    "small": {
        "tokenizer": ["--vocab_size", "8192"],
        "pretrain": ["--preset", "small"],
        "sft": ["--lr", "5e-4", "--batch_size", "32"],
        "reward": ["--lr", "2e-4"],
        "ppo": ["--lr", "1e-4", "--max_gen_len", "48"],
        "evaluate": [],
    },
    "gpt2": {
        "tokenizer": ["--vocab_size", "32000"],
        "pretrain": ["--preset", "gpt2"],
        "sft": ["--optimizer", "adamw", "--lr", "3e-5", "--batch_size", "16", "--grad_accum_steps", "2"],
        "reward": ["--optimizer", "adamw", "--lr", "1e-5", "--batch_size", "16"],
        "ppo": ["--lr", "3e-6", "--batch_size", "16", "--max_gen_len", "48"],
        "evaluate": [],
    },
}
SIZES["moe"] = {**SIZES["tiny"], "pretrain": ["--preset", "moe"]}
LONGEST_CONTEXT = 1024  # that is chosen without being asked for
QUESTIONS = (  # the first is the request that README and the service's page show
    "解释什么是机器学习",
    "Explain what a neural network is.",
    "法国的首都是哪里？",
    "What is 27 + 48?",
    "用一句话概括：放学以后，小明在公园画了一幅画。天上飘着几朵云。回家的路上下起了雨。",
)


@dataclass
class PipelineConfig(RecordOptions):
    """Settings of all stages together."""

    preset: str = option(
        "tiny", "size of everything: tiny and moe suit two CPU cores, the others a GPU", choices=tuple(SIZES)
    )
    smoke: bool = option(False, "a two-minute check of every stage, in models/smoke; the model it makes is useless")
    models_dir: str = option("models", "folder for everything that is made")
    train_data: str = option("data/pretrain/train", "pretraining text")
    val_data: str = option("data/pretrain/val", "validation text; empty, or with your own text: a share of that")
    sft_data: str = option("data/sft/sft_data.json", "instruction data")
    sft_test: str = option("data/sft/sft_test.json", "held-out questions")
    pairwise_data: str = option("data/sft/rlhf_pairwise.json", "preference data")
    pairwise_test: str = option(
        "data/sft/rlhf_pairwise_test.json", "held-out preferences; empty, or with your own pairs: a share of those"
    )
    max_seq_len: int = option(
        0, "context, in tokens; 0: the preset's, or a longer one if your records need it", at_least=0
    )
    chat_template: str = option("plain", "how conversations are written, see byte_level_bpe.py", choices=TEMPLATES)
    num_threads: int = option(0, "CPU threads; 0 means one for each core", at_least=0)
    port: int = option(0, "port of the service while it is tried; 0 means any free one", at_least=0, at_most=65535)
    serve: bool = option(False, "leave the service running in the foreground at the end, on port 8000 or --port")


def settle(config: PipelineConfig) -> None:
    """What follows from the options given: a smoke run's size and folder; your own data is not judged by the sample's.

    Raises:
        UserError: own instructions without test questions.
    """
    if config.smoke:
        config.preset = "smoke"
        if "models_dir" not in config.given:
            config.models_dir = "models/smoke"
    if "train_data" in config.given and "val_data" not in config.given:
        config.val_data = ""
    if "pairwise_data" in config.given and "pairwise_test" not in config.given:
        config.pairwise_test = ""
    if "sft_data" in config.given and "sft_test" not in config.given:
        raise UserError("--sft_data is your own; name the questions to test with in --sft_test, too")


@dataclass
class Stage:
    """One command line, what it reads and what it leaves.

    Attributes:
        name: a word for records and messages.
        title: what the user reads.
        command: arguments after `python`.
        inputs: files whose content the result depends on.
        outputs: files that are there once the stage is done.
        resumable: whether the command understands `--resume auto`, with checkpoints in this folder.
    """

    name: str
    title: str
    command: list[str]
    inputs: list[Path]
    outputs: list[Path]
    resumable: Path | None = None
    seconds: float = field(default=0.0, init=False)


def build_stages(config: PipelineConfig) -> list[Stage]:
    """All stages in order, for the given settings."""
    root, sizes = Path(config.models_dir), SIZES[config.preset]
    tokenizer, pretrain = root / "bpe_tokenizer", root / "pretrain" / "pretrain_best.pth"
    sft, reward = root / "sft" / "sft_best.pth", root / "reward" / "reward_best.pth"
    ppo = root / "rlhf" / "ppo_best.pth"
    text = resolve_files(config.train_data)
    val_text = resolve_files(config.val_data) if config.val_data else []
    threads = ["--num_threads", str(config.num_threads)] if config.num_threads else []
    pairs = resolve_files(config.pairwise_data, RECORD_ENDINGS)
    pairs_options = ["--pairwise_data", config.pairwise_data]
    if config.pairwise_test:
        pairs += resolve_files(config.pairwise_test, RECORD_ENDINGS)
        pairs_options += ["--val_pairwise_data", config.pairwise_test]
    conversations = resolve_files(config.sft_data, RECORD_ENDINGS)
    questions = resolve_files(config.sft_test, RECORD_ENDINGS)
    of_records = ["--columns", config.columns] if config.columns else []
    of_records += ["--skip_bad_records"] if config.skip_bad_records else []
    val_options = ["--val_data_dir", config.val_data] if config.val_data else ["--val_fraction", "0.05"]

    def quantize(model: Path) -> Stage:
        small = model.with_name(f"{model.stem}_int8.pth")
        command = ["-m", "inference.quantizer", "--model_path", str(model), "--output_path", str(small)]
        command += ["--text", config.sft_test, *of_records]
        title = f"quantizing {model.name} to INT8"
        return Stage(f"quantize-{model.stem}", title, command, [model, *questions], [small])

    def evaluate(model: Path, label: str, name: str = "", *options: str) -> Stage:
        path = model.with_name(f"{model.stem}{name}_eval.json")
        command = ["evaluator.py", "--model_path", str(model), "--test_data_path", config.sft_test]
        command += ["--model_type", "sft", "--output_path", str(path), *sizes["evaluate"], *options]
        command += [*of_records, *threads]
        return Stage(f"evaluate-{model.stem}{name}", f"asking {label}", command, [model, *questions], [path])

    perplexity = pretrain.with_name("pretrain_best_text_eval.json")
    score_text = Stage(
        "evaluate-text",
        "scoring the pretrained model on held-out text",
        ["evaluator.py", "--model_path", str(pretrain), "--test_data_path", config.val_data]
        + ["--model_type", "pretrain", "--output_path", str(perplexity), *sizes["evaluate"], *threads],
        [pretrain, *val_text],
        [perplexity],
    )
    ngram = root / "ngram_eval.json"
    return [
        Stage(
            "tokenizer",
            "training the tokenizer",
            ["byte_level_bpe.py", "--input", config.train_data, "--output_dir", str(tokenizer), *sizes["tokenizer"]]
            + (["--chat_template", config.chat_template] if config.chat_template != "plain" else []),
            text,
            [tokenizer / "tokenizer.json"],
        ),
        Stage(
            "pretrain",
            "pretraining",
            ["pretrain_trainer.py", "--train_data_dir", config.train_data, *val_options]
            + ["--tokenizer_dir", str(tokenizer), "--output_dir", str(pretrain.parent)]
            + ["--shard_dir", str(root / "token_shards"), *sizes["pretrain"], *context_options(config), *threads],
            [*text, *val_text, tokenizer / "tokenizer.json"],
            [pretrain],
            pretrain.parent / "checkpoints",
        ),
        Stage(
            "sft",
            "supervised fine-tuning",
            ["finetune.py", "--mode", "sft", "--data_path", config.sft_data, "--pretrained_model", str(pretrain)]
            + ["--output_dir", str(sft.parent), *of_records, *sizes["sft"], *threads],
            [*conversations, pretrain],
            [sft],
            sft.parent / "checkpoints",
        ),
        Stage(
            "reward",
            "training the reward model",
            ["finetune.py", "--mode", "reward", *pairs_options, "--sft_model", str(sft)]
            + ["--output_dir", str(reward.parent), *of_records, *sizes["reward"], *threads],
            [*pairs, sft],
            [reward],
            reward.parent / "checkpoints",
        ),
        Stage(
            "ppo",
            "PPO",
            ["finetune.py", "--mode", "ppo", *pairs_options, "--sft_model", str(sft), "--reward_model", str(reward)]
            + ["--output_dir", str(ppo.parent), "--sft_data", config.sft_data, *of_records, *sizes["ppo"], *threads],
            [*pairs, *conversations, sft, reward],
            [ppo],
            ppo.parent / "checkpoints",
        ),
        quantize(sft),
        quantize(ppo),
        *([score_text] if config.val_data else []),  # what pretraining sets aside by itself, it scores by itself
        Stage(
            "evaluate-ngram",
            "asking a 5-gram model, for comparison",
            ["-m", "evaluation.ngram_baseline", "--tokenizer_dir", str(tokenizer)]
            + ["--train_data_dir", config.train_data, "--sft_data_path", config.sft_data]
            + ["--test_data_path", config.sft_test, "--output_path", str(ngram)]
            + [*of_records, *sizes["evaluate"]],
            [*text, *conversations, *questions, tokenizer / "tokenizer.json"],
            [ngram],
        ),
        evaluate(pretrain, "the pretrained model"),
        evaluate(sft, "the SFT model"),
        evaluate(sft, "the SFT model, with sampled answers", "_sampled", "--temperature", "1.0"),
        evaluate(ppo, "the PPO model"),
        evaluate(ppo, "the PPO model, with sampled answers", "_sampled", "--temperature", "1.0"),
        evaluate(ppo.with_name("ppo_best_int8.pth"), "the INT8 model"),
    ]


# ---------------------------------------------------------------------------------- what is known before any training


def settings_of(config_class: type, arguments: list[str]) -> Any:
    """What a stage's own command line will make of its arguments."""
    return parse_config(config_class, arguments, description="")


def context_options(config: PipelineConfig) -> list[str]:
    """The context on pretraining's command line, with as many tokens a step as the preset has; none for its own."""
    preset = settings_of(PretrainConfig, SIZES[config.preset]["pretrain"])
    if config.max_seq_len in (0, preset.max_seq_len):
        return []
    batch_size = max(1, preset.batch_size * preset.max_seq_len // config.max_seq_len)
    return ["--max_seq_len", str(config.max_seq_len), "--batch_size", str(batch_size)]


def check_records(config: PipelineConfig) -> None:
    """Read the records of all stages once, and the beginning of the text, before anything is made of them.

    Raises:
        UserError: a file that cannot be read, a malformed record, or none of use.
    """
    for path in filter(None, (config.train_data, config.val_data)):
        next(iter_documents(path))
    read_by = (
        (config.sft_data, parse_conversation),
        (config.sft_test, parse_question),
        (config.pairwise_data, parse_preference),
        (config.pairwise_test, parse_preference),
    )
    for path, parse in read_by:
        if not path:
            continue
        account = Account(path, skips_bad_records=config.skip_bad_records)
        if not load_records(path, parse, account, parse_columns(config.columns)):
            reasons = ", ".join(account.left_out)
            raise UserError(f"{path} has no record of use ({reasons}); {account.bad.first or 'give others'}")
        print(*account.sentences()[:1], sep="\n", flush=True)


def data_of_stages(
    config: PipelineConfig, tokenizer: ByteLevelBPETokenizer, context: int, quiet: bool = True
) -> list[RecordData]:
    """What the stages will make of their records in a model of this context.

    Raises:
        UserError: nothing fits in one of them, or too little to hold some out.
    """
    commands = {stage.name: stage.command for stage in build_stages(config)}
    pretraining = settings_of(PretrainConfig, commands["pretrain"][1:])
    pretraining.max_seq_len = context
    model = pretraining.model_config(len(tokenizer), tokenizer.pad_token_id)
    made: list[RecordData] = []
    for name, module in (("sft", alignment.sft), ("reward", alignment.reward_model), ("ppo", alignment.ppo)):
        mode, arguments = finetune.split_mode(commands[name][1:])
        settings = settings_of(finetune.MODES[mode][0], arguments)
        settings.max_seq_len = context
        made += module.load_data(settings, model, tokenizer, quiet=quiet)
    account = Account(config.sft_test, "questions", "give shorter ones", config.skip_bad_records)
    questions = load_conversations(config.sft_test, account, columns=parse_columns(config.columns))
    made.append(GPTSFTDataset(questions, tokenizer, context, account))
    if not quiet:
        say_accounts(made[-1:])
    return made


def settle_context(config: PipelineConfig, tokenizer: ByteLevelBPETokenizer) -> None:
    """Choose the context where the user did not, and say what every stage will make of its records in it.

    The preset's is doubled, up to `LONGEST_CONTEXT`, until no stage loses more than 5 % of its records or of their
    answers' tokens.

    Raises:
        UserError: nothing fits in one of the stages, or too little to hold some out.
    """
    preset = settings_of(PretrainConfig, SIZES[config.preset]["pretrain"]).max_seq_len

    def lost(context: int) -> float:
        try:
            return max(data.account.lost_share for data in data_of_stages(config, tokenizer, context))
        except UserError:  # nothing fits, or too little
            return 1.0

    context = config.max_seq_len or preset
    if not config.max_seq_len:
        at_first = lost(context)
        if at_first > WARNED_SHARE:
            while context < LONGEST_CONTEXT and lost(context) > WARNED_SHARE:
                context *= 2
        config.max_seq_len = context
        if context > preset:
            print(
                f"context: {context} tokens in place of the preset's {preset}, in which {at_first:.0%} of a stage's "
                "data would be lost; --max_seq_len chooses another",
                flush=True,
            )
    data_of_stages(config, tokenizer, context, quiet=False)


# --------------------------------------------------------------------------------------------------- running a stage


def content_hash(path: Path) -> str:
    """SHA-256 of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def run_stage(stage: Stage, records: Path) -> None:
    """Run a stage unless what it made is still valid; leaves a record of what it was made of.

    Raises:
        UserError: the stage failed; it has said why itself.
        Interrupted: a signal came.
    """
    made_of = {"command": stage.command, "inputs": {str(path): content_hash(path) for path in stage.inputs}}
    record_path = records / f"{stage.name}.json"
    record = json.loads(record_path.read_text(encoding="utf-8")) if record_path.is_file() else {}
    unchanged = record.get("made_of") == made_of
    # A stage that comes out the same as before leaves those after it unchanged: content is compared, not time
    if unchanged and "seconds" in record and all(path.is_file() for path in stage.outputs):
        stage.seconds = record["seconds"]
        print(f"{stage.title}: done before ({', '.join(map(str, stage.outputs))})", flush=True)
        return
    command = [sys.executable, *stage.command]
    if stage.resumable is not None:
        if not unchanged:
            set_earlier_run_aside(stage.resumable.parent, stage.name)
        command += ["--resume", "auto"]
    write_record(record_path, {"made_of": made_of})  # without seconds: begun, with checkpoints of these inputs
    start = time.time()
    print(f"{stage.title}: {shlex.join(['python', *stage.command])}", flush=True)
    status = run_command(command)
    if status != 0:
        if status in (130, -signal.SIGINT, -signal.SIGTERM):
            raise Interrupted("interrupted; the same command continues here")
        raise UserError(f"{stage.title} failed (see above); mend it and run the same command, which continues here")
    stage.seconds = round(time.time() - start, 1)
    write_record(record_path, {"made_of": made_of, "seconds": stage.seconds})


def run_command(command: list[str]) -> int:
    """Run a process and wait for it; SIGTERM to this process goes on to it."""
    process = subprocess.Popen(command)
    previous = signal.signal(signal.SIGTERM, lambda number, frame: process.terminate())
    try:
        return process.wait()
    except KeyboardInterrupt:  # a terminal sends Ctrl-C to the child as well: let it save
        return process.wait() and 130
    finally:
        signal.signal(signal.SIGTERM, previous)


def write_record(path: Path, record: dict) -> None:
    """Note in a small JSON file what a stage was made of."""
    with replacing(path, "free some space or choose another --models_dir") as file:
        file.write(json.dumps(record, indent=1).encode())


# ------------------------------------------------------------------------------------------------------- the service


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextmanager
def running_service(model: Path, port: int, log_path: Path) -> Iterator[str]:
    """Start the service, wait until it answers, give its address, and stop it."""
    command = [sys.executable, "-m", "uvicorn", "inference.api_service:app", "--host", "127.0.0.1", "--port", str(port)]
    address = f"http://127.0.0.1:{port}"
    with log_path.open("w", encoding="utf-8") as log:
        process = subprocess.Popen(command, env={**os.environ, "MODEL_PATH": str(model)}, stdout=log, stderr=log)
        try:
            deadline = time.time() + 120
            while True:
                if process.poll() is not None or time.time() > deadline:
                    raise UserError(f"the service did not start; {log_path} says why")
                try:
                    with urllib.request.urlopen(f"{address}/ready", timeout=5):
                        break
                except (urllib.error.URLError, OSError):
                    time.sleep(0.2)
            yield address
        finally:
            process.terminate()
            process.wait(timeout=30)


def ask(address: str, question: str) -> str:
    """One question to the service."""
    body = json.dumps({"prefix": question, "max_gen_len": 48, "top_k": 50, "temperature": 0}).encode()
    request = urllib.request.Request(f"{address}/generate", body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as reply:
        return json.loads(reply.read())["generated_text"]


def try_service(model: Path, port: int, log_path: Path) -> list[dict[str, str]]:
    """Ask the served model `QUESTIONS` through `POST /generate` and show the answers."""
    exchanges = []
    print(f"serving: {model} on port {port}", flush=True)
    with running_service(model, port, log_path) as address:
        for question in QUESTIONS:
            answer = ask(address, question)
            exchanges.append({"question": question, "answer": answer})
            print(f"  POST {address}/generate  {question}\n    → {answer.strip()}", flush=True)
    return exchanges


# --------------------------------------------------------------------------------------------------------------- main


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    config = parse_config(PipelineConfig, argv, description="Train, align, evaluate, quantize and serve a GPT.")
    settle(config)
    root, start = Path(config.models_dir), time.time()
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # threads that spin would slow down whatever else runs
    check_records(config)
    stages = build_stages(config)
    for number in range(len(stages)):
        print(f"\n[{number + 1}/{len(stages) + 1}] ", end="", flush=True)
        run_stage(stages[number], root / "pipeline")
        if stages[number].name == "tokenizer":  # from here on, lengths are known
            settle_context(config, ByteLevelBPETokenizer.from_pretrained(root / "bpe_tokenizer"))
            stages[number + 1 :] = build_stages(config)[number + 1 :]
    print(f"\n[{len(stages) + 1}/{len(stages) + 1}] ", end="", flush=True)
    model = root / "rlhf" / "ppo_best.pth"
    exchanges = try_service(model, config.port or free_port(), root / "service.log")
    report = write_report(root, exchanges, [(stage.title, stage.seconds) for stage in stages])
    print(f"\nall of it in {time.time() - start:.0f} s", end="")
    uvicorn = os.path.relpath(Path(sys.executable).with_name("uvicorn"))  # the user's shell has not activated .venv
    serve = f"MODEL_PATH={model} {uvicorn} inference.api_service:app --port 8000"
    print(f"\nreport: {report}\nserve it: {serve}", flush=True)
    if config.serve:
        os.environ["MODEL_PATH"] = str(model)
        port = str(config.port or 8000)
        sys.exit(run_command([sys.executable, "-m", "uvicorn", "inference.api_service:app", "--port", port]))


if __name__ == "__main__":
    run_main(main)
