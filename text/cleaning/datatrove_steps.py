"""The same cleaning on many machines, as steps of `datatrove`: on this machine, on Slurm, or on Ray.

    python -m text.cleaning.datatrove_steps --input raw/ --output clean.jsonl.gz --executor slurm --tasks 64

Each task of the first step cleans files of its own, so a large file is better cut into several before; one task
compares all parts; the last ones write. All of them must see --work_dir. The output is that of
`python -m text.cleaning`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from datatrove.executor import LocalPipelineExecutor, RayPipelineExecutor, SlurmPipelineExecutor
from datatrove.pipeline.base import PipelineStep

from command_line import option, parse_config, replacing, run_main
from text.cleaning import pipeline
from text.cleaning.report import summary_lines, write_report


@dataclass
class DatatroveConfig(pipeline.CleaningConfig):
    """Options of `python -m text.cleaning.datatrove_steps`."""

    executor: str = option("local", "what runs the tasks", choices=("local", "slurm", "ray"))
    tasks: int = option(2, "into how many the cleaning is cut", at_least=1)
    logging_dir: str = option("", "where datatrove keeps its log and what is done; default: beside the output")
    slurm_time: str = option("04:00:00", "time limit of a task")
    slurm_partition: str = option("cpu", "where Slurm runs it")


class CleanFiles(PipelineStep):
    """Makes the parts of every world_size-th file."""

    name, type = "clean files", "🧹 - CLEANING"

    def __init__(self, config: DatatroveConfig, folder: str) -> None:
        super().__init__()
        self.config, self.folder = config, folder

    def run(self, data: Any = None, rank: int = 0, world_size: int = 1) -> Iterator:
        cleaner = pipeline.Cleaner(self.config)
        files = list(enumerate(pipeline.input_files(self.config)))
        for number, file in files[rank::world_size]:
            for name, documents in pipeline.documents_by_part(file, number, self.config):
                part = pipeline.Part(Path(self.folder), name)
                if not part.is_there:
                    part.write(cleaner.clean(documents))
                self.stat_update("parts")
        yield from ()


class Compare(PipelineStep):
    """Finds doubles among all parts; a single task."""

    name, type = "compare", "🫂 - DEDUPS"

    def __init__(self, config: DatatroveConfig, folder: str) -> None:
        super().__init__()
        self.config, self.folder = config, folder

    def run(self, data: Any = None, rank: int = 0, world_size: int = 1) -> Iterator:
        comparison = pipeline.compare(all_parts(self.folder), self.config)
        np.savez(Path(self.folder) / "comparison.npz", **vars(comparison))
        yield from ()


class WriteParts(PipelineStep):
    """Writes the pieces of every world_size-th part."""

    name, type = "write parts", "💽 - WRITER"

    def __init__(self, config: DatatroveConfig, folder: str) -> None:
        super().__init__()
        self.config, self.folder = config, folder

    def run(self, data: Any = None, rank: int = 0, world_size: int = 1) -> Iterator:
        with np.load(Path(self.folder) / "comparison.npz") as arrays:
            comparison = pipeline.Comparison(**arrays)
        tasks = pipeline.write_tasks(all_parts(self.folder), comparison, self.config)
        for number, task in enumerate(tasks):
            if number % world_size == rank:
                with replacing(task[0].path(".written")) as file:
                    file.write(json.dumps(pipeline.write_part(*task), ensure_ascii=False).encode())
        yield from ()


class Finish(PipelineStep):
    """Puts the output together and writes the report; a single task."""

    name, type = "finish", "💽 - WRITER"

    def __init__(self, config: DatatroveConfig, folder: str) -> None:
        super().__init__()
        self.config, self.folder = config, folder

    def run(self, data: Any = None, rank: int = 0, world_size: int = 1) -> Iterator:
        parts = all_parts(self.folder)
        written = [json.loads(part.path(".written").read_text(encoding="utf-8")) for part in parts]
        statistics = pipeline.finish(parts, written, self.config)
        print("\n".join(summary_lines(statistics)))
        if self.config.report:
            write_report(self.config.report, statistics, self.config, asdict(self.config))
        yield from ()


def all_parts(folder: str) -> list[pipeline.Part]:
    """In the order in which one machine makes them."""
    return [pipeline.Part(Path(folder), path.stem) for path in sorted(Path(folder).glob("part-*.json"))]


def executors(config: DatatroveConfig) -> list:
    """One for each step; each waits for the one before it."""
    files = pipeline.input_files(config)
    folder = str(pipeline.open_work_folder(config, files).resolve())
    steps = ((CleanFiles, config.tasks), (Compare, 1), (WriteParts, config.tasks), (Finish, 1))
    chain: list = []
    for step, tasks in steps:  # what is done already, the parts themselves tell
        kind, more = LocalPipelineExecutor, {"depends": chain[-1] if chain else None, "skip_completed": False}
        if config.executor == "slurm":
            kind = SlurmPipelineExecutor
            more |= {"time": config.slurm_time, "partition": config.slurm_partition, "job_name": step.name}
        elif config.executor == "ray":
            kind = RayPipelineExecutor
        else:
            more["workers"] = min(tasks, config.num_workers or tasks)
        logs = config.logging_dir or f"{config.output}.datatrove"
        chain.append(kind([step(config, folder)], tasks=tasks, logging_dir=f"{logs}/{len(chain)}", **more))
    return chain


def main(argv: list[str] | None = None) -> None:
    config = parse_config(DatatroveConfig, argv, description="clean text with datatrove's executors")
    executors(config)[-1].run()


if __name__ == "__main__":
    run_main(main)
