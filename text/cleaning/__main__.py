"""The command: `python -m text.cleaning --input raw/ --output clean.jsonl.gz --report report.html`."""

from __future__ import annotations

import time
from dataclasses import asdict

from command_line import parse_config, run_main
from text.cleaning.pipeline import CleaningConfig, run_cleaning
from text.cleaning.report import summary_lines, write_report


def main(argv: list[str] | None = None) -> None:
    config = parse_config(CleaningConfig, argv, description="clean text for training")
    begin = time.perf_counter()
    statistics = run_cleaning(config)
    seconds = time.perf_counter() - begin
    for line in summary_lines(statistics):
        print(line)
    if config.report:
        write_report(config.report, statistics, config, asdict(config))
        print(f"report: {config.report}")
    print(f"written: {config.output} in {seconds:.1f} s")


if __name__ == "__main__":
    run_main(main)
