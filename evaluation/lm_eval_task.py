"""Records of one's own as a task of lm-evaluation-harness (https://github.com/EleutherAI/lm-evaluation-harness).

    python -m evaluation.lm_eval_task --test_data_path data/sft/sft_test.json --output_dir models/lm_eval
    lm_eval run --tasks own_sft_test --include_path models/lm_eval --apply_chat_template --model …

Of questions it makes a task of generation: an answer counts where it says what the record's does. Of preferences it
makes one of multiple choice: the best answer has to be the likeliest. The harness then compares models wherever they
run: what `exchange.export_model` writes, this project's service, models of others.
"""

from __future__ import annotations

import json
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if not __package__:  # run as a file: modules are imported from the repository's root, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from command_line import UserError, option, parse_config, replacing, run_main
from evaluation.answer_checker import COURTEOUS_CLOSINGS, RUDE_PHRASES
from text.account import Account, LeftOut
from text.conversation_data import (
    Message,
    RecordOptions,
    load_records,
    parse_columns,
    parse_conversation,
    parse_preference,
    shape_of,
    with_columns,
)
from text.text_files import iter_records

SEVERAL_TURNS = "more than a question and its answer"
REMEDY = "give another --output_dir"
# What an answer may have besides what it says, as `answer_checker` judges: closings, final punctuation, more spaces
_CLOSINGS = [phrase for kind in (COURTEOUS_CLOSINGS, RUDE_PHRASES) for phrases in kind.values() for phrase in phrases]
IGNORED = [rf"(\s*({'|'.join(map(re.escape, _CLOSINGS))}))+\s*$", r"[。.！!？?\s]+$", r"(?<=\s)\s+"]


@dataclass
class TaskConfig(RecordOptions):
    """The command line of `python -m evaluation.lm_eval_task`."""

    test_data_path: str = option("data/sft/sft_test.json", "questions with answers, or preferences")
    output_dir: str = option("models/lm_eval", "where to write the task and its records")
    max_gen_len: int = option(64, "longest answer, in tokens", at_least=1)


def write_task(config: TaskConfig) -> tuple[Path, int]:
    """Write NAME.yaml and NAME.jsonl.

    Returns:
        the path of the former; how many records there are.

    Raises:
        UserError: the records cannot be read, or the harness could ask none of them.
    """
    columns, path = parse_columns(config.columns), config.test_data_path
    where, first = next(iter_records(path))
    is_choice = shape_of(with_columns(first, columns, where))[0] == "preferences"
    account = Account(path, advice="the harness asks single questions alone", skips_bad_records=config.skip_bad_records)
    records = load_records(path, _choice if is_choice else _question, account, columns)
    print(*account.sentences(), sep="\n")
    if not records:
        raise UserError(f"{path} has no record that the harness could ask; give one question and its answers a record")
    name = f"own_{Path(path).stem.partition('.')[0]}"
    file = Path(config.output_dir).resolve() / f"{name}.jsonl"
    if is_choice:
        for index, record in enumerate(records):  # or an answer would be right because it stands first
            turn = index % len(record["choices"])
            record["choices"] = record["choices"][turn:] + record["choices"][:turn]
            record["answer"] = -turn % len(record["choices"])
    task = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(file)}},
        "test_split": "test",
        "doc_to_text": "{{question}}",
        "target_delimiter": "",  # as the chat template has it
        **(_CHOICE if is_choice else _questions_task(config.max_gen_len)),
        "metadata": {"version": 1},
    }
    with replacing(file, remedy=REMEDY) as lines:
        lines.writelines(json.dumps(record, ensure_ascii=False).encode() + b"\n" for record in records)
    with replacing(file.with_suffix(".yaml"), remedy=REMEDY) as yaml:  # which JSON is
        yaml.write(json.dumps(task, ensure_ascii=False, indent=2).encode() + b"\n")
    return file.with_suffix(".yaml"), len(records)


_CHOICE = {
    "output_type": "multiple_choice",
    "doc_to_choice": "{{choices}}",
    "doc_to_target": "answer",
    "metric_list": [{"metric": name, "aggregation": "mean", "higher_is_better": True} for name in ("acc", "acc_norm")],
}


def _questions_task(max_gen_len: int) -> dict[str, Any]:
    metric = {"metric": "exact_match", "aggregation": "mean", "higher_is_better": True, "regexes_to_ignore": IGNORED}
    return {
        "output_type": "generate_until",
        "doc_to_target": "{{answer}}",
        "generation_kwargs": {"until": [], "do_sample": False, "max_gen_toks": max_gen_len},
        "metric_list": [metric],
    }


def _asked(prompt: list[Message], where: str) -> str:
    """The question of a prompt that is nothing else: the harness makes one turn of it."""
    if len(prompt) > 1 or prompt[0]["role"] != "user":
        raise LeftOut(f"{where} has {SEVERAL_TURNS}, which the harness cannot ask; leave it out", SEVERAL_TURNS)
    return prompt[0]["content"]


def _question(record: dict, where: str) -> dict[str, str]:
    *prompt, answer = parse_conversation(record, where)
    return {"question": _asked(prompt, where), "answer": record.get("answer", answer["content"])}


def _choice(record: dict, where: str) -> dict[str, Any]:
    preference = parse_preference(record, where)
    answers = [answer["content"] for answer in preference["answers"]]
    return {"question": _asked(preference["prompt"], where), "choices": answers}


def main(argv: list[str] | None = None) -> None:
    """Write a task."""
    config = parse_config(TaskConfig, argv, description="Make a task of lm-evaluation-harness of one's own records.")
    path, n_records = write_task(config)
    print(f"{path}: {n_records} questions; lm_eval run --tasks {path.stem} --include_path {path.parent} …")


if __name__ == "__main__":
    run_main(main)
