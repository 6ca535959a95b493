"""How fast is cleaning? Megabytes a second of one core and of all, with and without the search for similar documents.

    python benchmarks/bench_cleaning.py --write benchmarks/RESULTS.md

The text is made here, Chinese and English by turns, in documents of 100 to 20,000 characters with the dirt of web pages
in every tenth; --input takes yours instead. Each row is the whole command: reading, cleaning, comparing, writing.
MB/s a core are megabytes for each second that a processor worked, in all processes together, so that other programs
on the machine disturb them little.
"""

from __future__ import annotations

import json
import os
import random
import sys
import tempfile
import time
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from command_line import option, parse_config, run_main  # noqa: E402
from text.cleaning.pipeline import CleaningConfig, run_cleaning  # noqa: E402
from text.text_files import iter_documents, resolve_files  # noqa: E402

GOALS = {"without similar documents": 10.0, "with similar documents": 3.0}  # MB/s a core
DIRT = ("点击关注公众号领取资料", "Copyright © 2019 Example Inc. All rights reserved.", "<p>&nbsp;</p>", "★☆★☆★☆★☆★☆★☆")


@dataclass
class BenchConfig:
    """Settings of the benchmark."""

    input: list[str] = option(list, "text to clean; none: it is made here")
    megabytes: int = option(60, "how much text is made", at_least=1)
    num_workers: int = option(os.cpu_count() or 1, "processes of the rows that use more than one", at_least=1)
    write: str = option("", "a Markdown page that takes the table; empty: none")


def make_text(path: Path, megabytes: int) -> None:
    """Documents of words as frequent as Zipf's law has them, so that they are no easier to compare than real ones."""
    generator = random.Random(0)
    characters = [chr(code) for code in generator.sample(range(0x4E00, 0x8000), 3000)]
    words = ["".join(generator.choices("etaoinshrdlucmfw", k=generator.randint(2, 9))) for _ in range(20_000)]
    weights = {
        len(pool): list(accumulate(1 / rank for rank in range(3, len(pool) + 3))) for pool in (characters, words)
    }
    written = 0
    with path.open("w", encoding="utf-8") as file:
        while written < megabytes * 1_000_000:
            chinese = generator.random() < 0.5
            length = int(100 * 200 ** generator.random())
            pool = characters if chinese else words
            chosen = generator.choices(pool, cum_weights=weights[len(pool)], k=length if chinese else length // 6)
            sentences = []
            while chosen:
                size = generator.randint(8, 40)
                piece, chosen = chosen[:size], chosen[size:]
                sentences.append("".join(piece) + "。" if chinese else " ".join(piece).capitalize() + ". ")
            text = "".join(sentence + "\n" * (generator.random() < 0.2) for sentence in sentences)
            if generator.random() < 0.1:
                text = f"{text}\n{generator.choice(DIRT)}"
            line = json.dumps({"text": text}, ensure_ascii=False) + "\n"
            written += len(line.encode())
            file.write(line)


def cpu_seconds() -> float:
    """What this process and its children that have ended have used."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def main(argv: list[str] | None = None) -> None:
    # Here, because every process reads this file's head, and none of them needs PyTorch
    from benchmarks.tables import Table, about, in_a_sentence, write_section

    config = parse_config(BenchConfig, argv, description="measure the cleaning")
    figures: dict = {"goals": [], "rows": {}}
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        if not config.input:
            make_text(Path(folder) / "made.jsonl", config.megabytes)
            config.input = [str(Path(folder) / "made.jsonl")]
        files = [file for path in config.input for file in resolve_files(path)]
        size = sum(len(text.encode()) for file in files for text in iter_documents(file)) / 1e6
        for title, threshold in (("without similar documents", 0.0), ("with similar documents", 0.8)):
            for workers in sorted({1, config.num_workers}):
                options = CleaningConfig(
                    input=config.input, output=f"{folder}/out.jsonl", near_duplicates=threshold, num_workers=workers
                )
                begin, cpu = time.perf_counter(), cpu_seconds()
                statistics = run_cleaning(options)
                rate, per_core = size / (time.perf_counter() - begin), size / (cpu_seconds() - cpu)
                kept = statistics["kept"]["documents"] / statistics["read"]["documents"]
                name = f"{title}, {workers} process{'es' * (workers > 1)}"
                figures["rows"][name] = {"megabytes_per_second": rate, "per_cpu_second": per_core, "kept": kept}
                rows.append((name, f"{rate:.1f}", f"{per_core:.1f}", f"{kept:.1%}"))
                if workers == 1:
                    goal = GOALS[title]
                    figures["goals"].append(
                        {
                            "goal": f"{title}, MB/s a core",
                            "at_least": goal,
                            "measured": per_core,
                            "met": per_core >= goal,
                        }
                    )
    figures |= {"megabytes": size, **about("ftfy", "google-re2", "rensa", "numpy")}
    table = Table(
        "Cleaning",
        f"{size:.0f} MB of text. {in_a_sentence(figures)}",
        ("", "MB/s", "MB/s a core", "documents kept"),
        rows,
    )
    print(table.plain())
    if config.write:
        write_section(Path(config.write), "cleaning", table.markdown())
    print(json.dumps(figures))


if __name__ == "__main__":
    run_main(main)
