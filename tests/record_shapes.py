"""Small data sets in every published shape, for tests and for anyone who wants to see one of each.

`python tests/record_shapes.py FOLDER` writes a file of each kind.
"""

import csv
import json
import sys
from pathlib import Path

COUNTRIES = [("法国", "巴黎"), ("意大利", "罗马"), ("日本", "东京"), ("埃及", "开罗"), ("France", "Paris"),
             ("Italy", "Rome"), ("Japan", "Tokyo"), ("Egypt", "Cairo"), ("Spain", "Madrid"),
             ("Kenya", "Nairobi")]  # fmt: skip


def facts(n):
    """(question, answer, wrong answer), all questions different."""
    for number in range(n):
        country, capital = COUNTRIES[number % len(COUNTRIES)]
        other = COUNTRIES[(number + 1) % len(COUNTRIES)][1]
        yield f"{number}. {country}?", f"{capital}.", f"{other}."


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def human(text):
    return {"from": "human", "value": text}


def gpt(text):
    return {"from": "gpt", "value": text}


WEATHER = {"name": "weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}}
CALL = {"name": "weather", "arguments": {"city": "Paris"}}

INSTRUCTIONS = {
    "plain": lambda q, a: {"instruction": q, "response": a},
    "alpaca": lambda q, a: {"instruction": "Answer.", "input": q, "output": a, "history": [["hi", "hello"]]},
    "sharegpt": lambda q, a: {"conversations": [human("hi"), gpt("hello"), human(q), gpt(a)], "system": "Be brief."},
    "openai": lambda q, a: {"messages": [user(q), assistant(a)]},
    "trl": lambda q, a: {"prompt": q, "completion": a},
    "trl_chat": lambda q, a: {"prompt": [user(q)], "completion": [assistant(a)]},
    "gsm8k": lambda q, a: {"question": q, "answer": f"It is {a}\n#### {a}"},
    "orca": lambda q, a: {"id": "1", "system_prompt": "Be brief.", "question": q, "response": a},
    "dolly": lambda q, a: {"instruction": q, "context": "Capitals.", "response": a, "category": "qa"},
    "sharegpt_tools": lambda q, a: {
        "conversations": [human(q), {"from": "function_call", "value": json.dumps(CALL)},
                          {"from": "observation", "value": "18 °C"}, gpt(a)],
        "tools": json.dumps([WEATHER]),
    },
    "openai_tools": lambda q, a: {
        "messages": [
            user(q),
            {"role": "assistant", "content": None, "tool_calls": [
                {"id": "1", "type": "function", "function": {**CALL, "arguments": json.dumps(CALL["arguments"])}}]},
            {"role": "tool", "tool_call_id": "1", "content": "18 °C"},
            assistant(a),
        ],
        "tools": [{"type": "function", "function": WEATHER}],
    },
    "weighted": lambda q, a: {"messages": [user("hi"), {**assistant("no"), "weight": 0}, user(q), assistant(a)]},
}  # fmt: skip
PREFERENCES = {
    "pairs": lambda q, a, b: {"instruction": q, "chosen": a, "rejected": b},
    "llama_factory": lambda q, a, b: {"conversations": [human(q)], "chosen": gpt(a), "rejected": gpt(b)},
    "trl_pairs": lambda q, a, b: {"prompt": q, "chosen": a, "rejected": b},
    "trl_chat_pairs": lambda q, a, b: {"prompt": [user(q)], "chosen": [assistant(a)], "rejected": [assistant(b)]},
    "trl_implicit": lambda q, a, b: {"chosen": [user(q), assistant(a)], "rejected": [user(q), assistant(b)]},
    "binarized": lambda q, a, b: {
        "prompt": q, "chosen": [user(q), assistant(a)], "rejected": [user(q), assistant(b)],
        "messages": [user(q), assistant(a)], "score_chosen": 8.0, "score_rejected": 3.0,
    },
    "hh_rlhf": lambda q, a, b: {
        "chosen": f"\n\nHuman: hi\n\nAssistant: hello\n\nHuman: {q}\n\nAssistant: {a}",
        "rejected": f"\n\nHuman: hi\n\nAssistant: hello\n\nHuman: {q}\n\nAssistant: {b}",
    },
    "ranking": lambda q, a, b: {"instruction": q, "responses": [a, "Maybe.", b]},
    "scored": lambda q, a, b: {"instruction": q, "responses": [b, a, "?"], "scores": [2, 9, 2]},
    "ultrafeedback": lambda q, a, b: {
        "source": "x", "instruction": q, "models": ["m", "n"],
        "completions": [{"model": "m", "response": b, "overall_score": 3.5, "annotations": {}},
                        {"model": "n", "response": a, "overall_score": 9.0, "annotations": {}}],
    },
}  # fmt: skip
UNPAIRED = {
    "kto": lambda q, a, good: {"prompt": q, "completion": a, "label": good},
    "kto_chat": lambda q, a, good: {"prompt": [user(q)], "completion": [assistant(a)], "label": good},
    "kto_tag": lambda q, a, good: {"messages": [user(q), assistant(a)], "kto_tag": good},
}


def records(name, n=24):
    """`n` records of one shape."""
    if name in INSTRUCTIONS:
        return [INSTRUCTIONS[name](question, answer) for question, answer, _ in facts(n)]
    if name in PREFERENCES:
        return [PREFERENCES[name](*fact) for fact in facts(n)]
    make = UNPAIRED[name]
    return [make(q, bad if k % 2 else good, k % 2 == 0) for k, (q, good, bad) in enumerate(facts(n))]


def write_all(folder, n=24):
    """A file of each shape: lists and JSONL in turn, one `.csv` and, where pyarrow is there, one `.parquet`."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for number, name in enumerate([*INSTRUCTIONS, *PREFERENCES, *UNPAIRED]):
        made = records(name, n)
        lines = "\n".join(json.dumps(record, ensure_ascii=False) for record in made)
        ending, content = (".jsonl", lines) if number % 2 else (".json", json.dumps(made, ensure_ascii=False))
        (folder / f"{name}{ending}").write_text(content, encoding="utf-8")
    lines = [f"The capital of {country} is {capital}. {country}的首都是{capital}。" for country, capital in COUNTRIES]
    (folder / "text.txt").write_text("\n".join(lines * n), encoding="utf-8")
    with (folder / "table.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, ["instruction", "input", "output"])
        writer.writeheader()
        writer.writerows({"instruction": q, "input": "", "output": a} for q, a, _ in facts(n))
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        return
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records("gsm8k", n)), folder / "questions.parquet")


if __name__ == "__main__":
    write_all(sys.argv[1])
