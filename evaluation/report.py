"""`models/report.html`: what the pipeline made, how good each stage is, and the same prompts answered by each model.

The page is one file without scripts or links to elsewhere; it can be mailed.
"""

from __future__ import annotations

import base64
import json
import platform
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any

import jinja2
import torch

from command_line import replacing
from training.run_log import read_metrics

MODELS = (  # label, evaluation file, what it is
    ("5-gram", "ngram_eval.json", "counts of the same training text, for comparison"),
    ("base", "pretrain/pretrain_best_eval.json", "after pretraining"),
    ("SFT", "sft/sft_best_eval.json", "after supervised fine-tuning"),
    ("PPO", "rlhf/ppo_best_eval.json", "after alignment with preferences"),
    ("INT8", "rlhf/ppo_best_int8_eval.json", "the PPO model with INT8 weights"),
)
SAMPLED = (
    ("SFT, sampled", "sft/sft_best_sampled_eval.json", "temperature 1 instead of the likeliest token"),
    ("PPO, sampled", "rlhf/ppo_best_sampled_eval.json", "temperature 1 instead of the likeliest token"),
)
RUNS = (("Pretraining", "pretrain"), ("SFT", "sft"), ("Reward model", "reward"), ("PPO", "rlhf"))
SHOWN_ANSWERS = ("base", "SFT", "PPO", "INT8")

PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>Your own GPT: report</title>
<style>
  :root { color-scheme: light dark; --line: #8884; --soft: #8881; --good: #2a8f5a; }
  body { font: 15px/1.55 system-ui, "Noto Sans SC", "PingFang SC", "Microsoft YaHei", sans-serif;
         max-width: 72rem; margin: 2rem auto; padding: 0 1.2rem; }
  h1 { margin-bottom: .2rem } h2 { margin-top: 2.6rem; border-bottom: 1px solid var(--line); padding-bottom: .2rem }
  table { border-collapse: collapse; width: 100%; font-size: .93em } .wide { overflow-x: auto }
  th, td { padding: .32rem .6rem; border-bottom: 1px solid var(--line); text-align: left; vertical-align: top }
  td.n, th.n { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap }
  .bar { background: linear-gradient(90deg, #3b82f655 var(--p), transparent var(--p)) }
  .right { color: var(--good) } .note { opacity: .75; font-size: .92em }
  img { width: 100%; background: #fff; border-radius: 6px; border: 1px solid var(--line) }
  .sentence { font-size: 1.06em; background: var(--soft); padding: .7rem 1rem; border-radius: 8px }
</style>
<h1>Your own GPT</h1>
<p class="note">{{ machine }} · {{ today }} · finished stages took {{ stage_total }} in all</p>
<p class="sentence">{{ headline }}</p>

<h2>Scores on held-out questions</h2>
<div class="wide"><table>
<tr><th>model<th>what it is<th class="n">exactly right<th class="n">preferred<th class="n">polite
<th class="n">ends by itself<th class="n">BLEU<th class="n">ROUGE-L<th class="n">tokens an answer</tr>
{% for row in score_rows %}<tr><td><b>{{ row.label }}</b><td>{{ row.what }}
{% for key in ("exact", "preferred", "polite", "ended") %}
{% if key not in row.scores %}<td class="n">–{% else %}
<td class="n bar" style="--p:{{ (100 * row.scores[key]) | round(1) }}%">{{ "%.1f" | format(100 * row.scores[key]) }} %
{% endif %}{% endfor %}
<td class="n">{{ "%.3f" | format(row.scores.bleu) }}<td class="n">{{ "%.3f" | format(row.scores["rouge-l"]) }}
<td class="n">{{ "%.1f" | format(row.scores.mean_tokens) }}</tr>
{% endfor %}</table></div>
<p class="note">{{ n_questions }} questions{% if sample %}, none of which is in the training data: held out by operands,
by passage, by phrasing or by combination of fact and phrasing{% endif %}. <i>Exactly right</i>: the answer without
courtesies is the expected sentence, character for character. <i>Preferred</i>: right, complete, polite, not repetitive,
not rude; a program decides. BLEU and ROUGE compare with the plain answer, so courtesies lower them.</p>

{% if text %}<p>On held-out text the pretrained model has a perplexity of
{{ "%.2f" | format(text.perplexity) }} a token,
{{ "%.3f" | format(text.bits_per_byte) }} bits a byte ({{ "{:,}".format(text.bytes) }} bytes).</p>{% endif %}

<h2>By skill</h2>
<div class="wide"><table><tr><th>skill{% for label in skill_labels %}<th class="n">{{ label }}{% endfor %}</tr>
{% for skill, cells in skill_rows %}<tr><td>{{ skill }}{% for value in cells %}
<td class="n {{ 'bar' if value is not none }}" style="--p:{{ 100 * (value or 0) }}%">
{{ "%.0f %%" | format(100 * value) if value is not none else "–" }}{% endfor %}</tr>
{% endfor %}</table></div>

<h2>The same prompts</h2>
<div class="wide"><table><tr><th>prompt{% for label in answer_labels %}<th>{{ label }}{% endfor %}</tr>
{% for prompt, cells in answer_rows %}<tr><td><b>{{ prompt }}</b>{% for cell in cells %}
<td{% if cell.exact %} class="right"{% endif %}>{{ cell.text }}{% endfor %}</tr>
{% endfor %}</table></div>
<p class="note">Green: exactly right. The base model has never seen the prompt's form.</p>

{% if exchanges %}<h2>Asked through the service</h2>
<table><tr><th>POST /generate<th>generated_text</tr>
{% for exchange in exchanges %}<tr><td>{{ exchange.question }}<td>{{ exchange.answer }}</tr>
{% endfor %}</table>{% endif %}

<h2>Learning curves</h2>
{% for run in runs %}<h3>{{ run.title }}</h3><p class="note">{{ run.sentence }}</p>
<img alt="curves of {{ run.title }}" src="data:image/png;base64,{{ run.image }}">
{% endfor %}

<h2>Time</h2>
<table><tr><th>stage<th class="n">seconds</tr>
{% for title, seconds in stages %}<tr><td>{{ title }}<td class="n">{{ "%.1f" | format(seconds) }}</tr>
{% endfor %}</table>
</html>
"""


def load_json(path: Path) -> dict[str, Any] | None:
    """The content of a JSON file, or None if it is not there."""
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def choose_prompts(predictions: Sequence[dict[str, Any]], how_many: int = 16) -> list[int]:
    """Positions of some questions, spread over skills and languages."""
    first_of = {}
    for position, prediction in enumerate(predictions):
        first_of.setdefault((prediction.get("skill"), prediction.get("language")), position)
    positions = sorted(first_of.values())
    step = max(1, len(positions) // how_many)
    return (positions[::step] if len(positions) > 1 else list(range(len(predictions))))[:how_many]


def headline(scores: dict[str, dict[str, float]], kl: float | None) -> str:
    """The outcome in a sentence."""
    parts = []
    if "SFT" in scores:
        parts.append(f"The SFT model answers {scores['SFT']['exact']:.1%} of the held-out questions exactly right")
    if "5-gram" in scores:
        so_far = parts[-1] if parts else "The models are ready"
        parts[-1:] = [f"{so_far} (a 5-gram model {scores['5-gram']['exact']:.1%})"]
    if {"SFT", "PPO"} <= set(scores):
        changes = [
            f"{what} answers by {100 * (scores['PPO'][key] - scores['SFT'][key]):+.1f} points"
            for key, what in (("preferred", "preferred"), ("exact", "exact"))
            if key in scores["PPO"] and key in scores["SFT"]  # only records with an "answer" can be preferred
        ]
        divergence = "" if kl is None else f" at a divergence of {kl:.2f} nats an answer"
        parts.append(f"PPO changes {' and '.join(changes)}{divergence}")
    if {"PPO", "INT8"} <= set(scores):
        change = 100 * (scores["INT8"]["exact"] - scores["PPO"]["exact"])
        parts.append(f"INT8 changes exact answers by {change:+.1f} points")
    return "; ".join(parts) + "."


def describe_run(folder: Path) -> str:
    """What a run's metrics say, in a sentence."""
    records = read_metrics(folder / "metrics.jsonl")
    validated = [record for record in records if record.get("val_loss") is not None or "val_reward" in record]
    parts = [f"{records[-1]['step']} steps"]
    for key, label in (
        ("val_loss", "last validation loss {:.4f}"),
        ("val_bpb", "{:.4f} bits a byte"),
        ("val_accuracy", "held-out pairs ranked right: {:.1%}"),
        ("val_reward", "held-out reward {:+.2f} standard deviations"),
        ("val_kl", "KL to the SFT model {:.2f} nats an answer"),
    ):
        if validated and validated[-1].get(key) is not None:
            parts.append(label.format(validated[-1][key]))
    return ", ".join(parts) + "."


def write_report(
    root: str | Path, exchanges: Sequence[dict[str, str]], stages: Sequence[tuple[str, float]]
) -> Path:
    """Write `report.html` from what the stages left in `root`.

    Args:
        root: the models' folder.
        exchanges: `{"question", "answer"}` as asked through the service.
        stages: title and seconds of every stage.
    """
    root = Path(root)
    found = [(label, what, load_json(root / name)) for label, name, what in MODELS]
    found = [(label, what, evaluation) for label, what, evaluation in found if evaluation]
    sampled = [(label, what, load_json(root / name)) for label, name, what in SAMPLED]
    by_label = {label: evaluation for label, _, evaluation in found}
    rows = [
        {"label": label, "what": what, "scores": evaluation["scores"]}
        for label, what, evaluation in [*found, *(entry for entry in sampled if entry[2])]
    ]
    skills = sorted({skill for _, _, evaluation in found for skill in evaluation.get("by_skill", {})})
    answers = [(label, by_label[label]["predictions"]) for label in SHOWN_ANSWERS if label in by_label]
    positions = choose_prompts(answers[0][1]) if answers else []
    policy = [record for record in read_metrics(root / "rlhf" / "metrics.jsonl") if "val_kl" in record]
    best = max(policy, key=lambda record: record["val_objective"], default={})
    runs = [
        {
            "title": title,
            "sentence": describe_run(root / name),
            "image": base64.b64encode((root / name / "curves.png").read_bytes()).decode(),
        }
        for title, name in RUNS
        if (root / name / "curves.png").is_file()
    ]
    seconds = sum(seconds for _, seconds in stages)
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    page = jinja2.Environment(autoescape=True, trim_blocks=True).from_string(PAGE)
    html = page.render(
        machine=f"{platform.machine()}, {torch.get_num_threads()} threads, {gpu}, "
        f"Python {platform.python_version()}, PyTorch {torch.__version__}",
        today=date.today().isoformat(),
        stage_total=f"{int(seconds // 60)} min {int(seconds % 60):02d} s",
        headline=headline({label: evaluation["scores"] for label, evaluation in by_label.items()}, best.get("val_kl")),
        score_rows=rows,
        text=(load_json(root / "pretrain" / "pretrain_best_text_eval.json") or {}).get("scores"),
        n_questions=len(answers[0][1]) if answers else 0,
        sample=any("by_held_out" in evaluation for _, _, evaluation in found),  # proven by the sample data's builder
        skill_labels=[label for label, _, _ in found],
        skill_rows=[
            (skill, [evaluation.get("by_skill", {}).get(skill, {}).get("exact") for _, _, evaluation in found])
            for skill in skills
        ],
        answer_labels=[label for label, _ in answers],
        answer_rows=[
            (
                answers[0][1][position]["instruction"],
                [
                    {"text": predictions[position]["prediction"], "exact": predictions[position].get("exact")}
                    for _, predictions in answers
                ],
            )
            for position in positions
        ],
        exchanges=exchanges,
        runs=runs,
        stages=stages,
    )
    path = root / "report.html"
    with replacing(path, "free some space or choose another --models_dir") as file:
        file.write(html.encode())
    return path
