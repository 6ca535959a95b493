"""The page that goes out with a model: what it is, what it was trained on and how well it does, how to use it."""

from __future__ import annotations

import json
from typing import Any

from command_line import UserError
from exchange.outgoing import Outgoing

STAGES = {
    "pretrain": "a base model: it continues texts and has not learned to answer",
    "sft": "fine-tuned to answer questions",
}


def model_card(model: Outgoing, architecture: str, kind: str) -> str:
    """The card, in Markdown with the head that Hugging Face's pages have."""
    config, content = model.config, model.content
    n_weights = sum(tensor.numel() for name, tensor in model.state.items() if name.endswith(("weight", "bias")))
    if config.tie_embeddings:
        n_weights -= model.state["lm_head.weight"].numel()
    came_from = content.get("imported", {}).get("from")
    lines = [
        "---",
        "library_name: transformers",
        "pipeline_tag: text-generation",
        "---",
        f"# {model.path.stem}",
        "",
        f"{architecture}, {n_weights / 1e6:.1f} million parameters, {kind}, context {config.max_seq_len} tokens, "
        f"{STAGES.get(content['stage'], 'aligned with preferences (' + content['stage'] + ')')}.",
        *([f"It goes back to {came_from}, whose licence holds for it, too.", ""] if came_from else [""]),
        "## How it was made",
        "",
        f"Stage `{content['stage']}`, {content['step']} optimiser steps. The command, which names the data:",
        "",
        "```",
        content.get("command", ""),
        "```",
        "",
        f"Versions: {', '.join(f'{name} {version}' for name, version in content.get('versions', {}).items())}.",
        "",
        *_scores(model),
        "## Use",
        "",
        "```python",
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        'tokenizer = AutoTokenizer.from_pretrained(".")',
        'model = AutoModelForCausalLM.from_pretrained(".")',
        *_use(model),
        "```",
        "",
    ]
    return "\n".join(lines)


def _use(model: Outgoing) -> list[str]:
    if not model.is_chat_model:
        return [
            'ids = tokenizer("The capital", return_tensors="pt")',
            "print(tokenizer.decode(model.generate(**ids, max_new_tokens=50)[0]))",
        ]
    return [
        'messages = [{"role": "user", "content": "…"}]',
        "ids = tokenizer.apply_chat_template(",
        '    messages, add_generation_prompt=True, return_tensors="pt", return_dict=True',
        ")",
        "answer = model.generate(**ids, max_new_tokens=100)",
        'print(tokenizer.decode(answer[0, ids["input_ids"].shape[1]:], skip_special_tokens=True))',
    ]


def _scores(model: Outgoing) -> list[str]:
    """What was measured in training, and by the evaluator if its file lies beside the checkpoint."""
    found: dict[str, Any] = dict(model.content.get("metrics", {}))
    path = model.path.with_name(f"{model.path.stem}_eval.json")
    try:
        scores = json.loads(path.read_text(encoding="utf-8")).get("scores", {}) if path.is_file() else {}
    except (ValueError, AttributeError) as error:
        raise UserError(f"{path} is damaged ({error}); delete it, or run evaluator.py again") from None
    found |= scores
    rows = [f"| {name} | {value:.4g} |" for name, value in found.items() if isinstance(value, int | float)]
    if not rows:
        return ["## Scores", "", "None were recorded.", ""]
    return ["## Scores", "", "| score | value |", "|---|---|", *rows, ""]
