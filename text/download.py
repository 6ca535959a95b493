"""Public sets, converted to this project's formats with their source and licence beside them.

    python -m text.download alpaca-zh --output_dir data/public          # needs the package `datasets` and a network
    python -m text.download alpaca-zh --from_dir ~/copies/alpaca-zh     # a copy that is there already: needs neither

`HF_ENDPOINT=https://hf-mirror.com` before the command takes a mirror of Hugging Face, `--hub modelscope` takes
ModelScope. Licences are what the sets' pages said in 2026; read them before you publish anything.
"""

from __future__ import annotations

import contextlib
import gzip
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

from command_line import UserError, option, parse_config, replacing, require_writable_folder, run_main
from text.text_files import RECORD_ENDINGS, iter_rows, resolve_files

Row = dict[str, Any]


@dataclass(frozen=True)
class PublicSet:
    """A published set.

    Attributes:
        repo, config: its names on Hugging Face.
        splits: what is taken, {split as published: our file name}.
        licence: as its page states it.
        convert: a row → a record of ours, None where there is nothing in it.
    """

    repo: str
    licence: str
    convert: Callable[[Row], Row | None]
    config: str | None = None
    splits: tuple[tuple[str, str], ...] = (("train", "train"),)


def _fields(**names: str) -> Callable[[Row], Row | None]:
    """Takes fields under new names, like `_fields(response="output")`; empty ones are left out."""

    def convert(row: Row) -> Row | None:
        record = {ours: row[theirs] for ours, theirs in names.items() if row.get(theirs)}
        return record or None

    return convert


def _multiple_choice(question: str, answer: str) -> Callable[[Row], Row | None]:
    """A question with its choices A to D as an instruction, and the letter as the response."""

    def convert(row: Row) -> Row | None:
        if not row.get(answer):  # the answers of a test split that is kept secret
            return None
        choices = "\n".join(f"{letter}. {row[letter]}" for letter in "ABCD")
        return {"instruction": f"{row[question]}\n{choices}", "response": row[answer]}

    return convert


text, alpaca = _fields(text="text"), _fields(instruction="instruction", input="input", response="output")
SETS = {
    "tinystories": PublicSet("roneneldan/TinyStories", "CDLA-Sharing-1.0", text,
                             splits=(("train", "train"), ("validation", "val"))),
    "fineweb-edu-sample": PublicSet("HuggingFaceFW/fineweb-edu", "ODC-By 1.0", text, config="sample-10BT"),
    "wikipedia-zh": PublicSet("wikimedia/wikipedia", "CC BY-SA 3.0, GFDL", text, config="20231101.zh"),
    "skypile-sample": PublicSet("Skywork/SkyPile-150B", "Skywork Community License", text),
    "alpaca-en": PublicSet("tatsu-lab/alpaca", "CC BY-NC 4.0", alpaca),
    "alpaca-zh": PublicSet("shibing624/alpaca-zh", "CC BY 4.0", alpaca),
    "belle": PublicSet("BelleGroup/train_0.5M_CN", "GPL-3.0", alpaca),
    "coig-cqia": PublicSet("m-a-p/COIG-CQIA", "see its page: each source has its own", alpaca),
    "ultrafeedback": PublicSet("HuggingFaceH4/ultrafeedback_binarized", "MIT",
                               _fields(prompt="prompt", chosen="chosen", rejected="rejected"),
                               splits=(("train_prefs", "train"), ("test_prefs", "test"))),
    "hh-rlhf": PublicSet("Anthropic/hh-rlhf", "MIT", _fields(chosen="chosen", rejected="rejected"),
                         splits=(("train", "train"), ("test", "test"))),
    "gsm8k": PublicSet("openai/gsm8k", "MIT", _fields(instruction="question", response="answer"), config="main",
                       splits=(("train", "train"), ("test", "test"))),
    "ceval": PublicSet("ceval/ceval-exam", "CC BY-NC-SA 4.0", _multiple_choice("question", "answer"), config="*",
                       splits=(("dev", "dev"), ("val", "val"))),
    "cmmlu": PublicSet("haonan-li/cmmlu", "CC BY-NC 4.0", _multiple_choice("Question", "Answer"), config="*",
                       splits=(("dev", "dev"), ("test", "test"))),
}  # fmt: skip


@dataclass
class DownloadConfig:
    """Options of `python -m text.download`."""

    name: str = option("", "which set", choices=tuple(SETS))
    output_dir: str = option("data/public", "the set comes into a folder of its name in it")
    from_dir: str = option("", "a copy that is there already: parquet, JSON, JSONL or CSV files as published")
    limit: int = option(0, "take the first records only; 0: all", at_least=0)
    hub: str = option("huggingface", "where to download", choices=("huggingface", "modelscope"))
    repo: str = option("", "another name of the set there, such as one of ModelScope's")


def rows_of_folder(folder: Path, split: str) -> Iterator[Row]:
    """The rows of a downloaded copy: of the files that have the split's name in theirs, or of all if none has."""
    files = resolve_files(folder, RECORD_ENDINGS)
    named = [file for file in files if split in file.relative_to(folder).as_posix().lower().replace("-", "_")]
    if not named and any(word in file.stem for file in files for word in ("train", "test", "val", "dev")):
        return
    for file in named or (files if split == "train" else ()):
        yield from iter_rows(file)


def rows_of_hub(public: PublicSet, split: str, config: DownloadConfig) -> Iterator[Row]:
    """The rows as they come over the network.

    Raises:
        UserError: a package or the network is missing.
    """
    repo = config.repo or public.repo
    try:
        if config.hub == "modelscope":
            from modelscope import dataset_snapshot_download
        else:
            import datasets
    except ImportError as error:
        package = "modelscope" if config.hub == "modelscope" else "datasets"
        raise UserError(
            f"downloading needs {package} ({error}); `pip install {package}`, or name a copy with --from_dir"
        ) from None
    try:
        if config.hub == "modelscope":
            yield from rows_of_folder(Path(dataset_snapshot_download(repo)), split)
            return
        names = datasets.get_dataset_config_names(repo) if public.config == "*" else [public.config]
        for name in names:
            yield from datasets.load_dataset(repo, name, split=split, streaming=True)
    except UserError:  # of a file that has come
        raise
    except Exception as error:  # the packages let many kinds of errors through from what they stand on
        where, others = os.environ.get("HF_ENDPOINT", "https://huggingface.co"), "try --hub modelscope"
        if config.hub == "modelscope":
            where, others = "ModelScope", "check --repo, its name there, try --hub huggingface"
        elif "HF_ENDPOINT" not in os.environ:
            others = "try HF_ENDPOINT=https://hf-mirror.com or --hub modelscope"
        reason = str(error).strip().split("\n")[0][:200]
        raise UserError(
            f"{repo} cannot be downloaded from {where} ({type(error).__name__}: {reason}); {others}, or copy the files "
            "from another machine and name their folder with --from_dir"
        ) from None


def fetch(config: DownloadConfig) -> dict[str, int]:
    """Write the set; {file: records}.

    Raises:
        UserError: it cannot be read, or there is nothing in it.
    """
    public, folder = SETS[config.name], Path(config.output_dir) / config.name
    if config.from_dir and not Path(config.from_dir).is_dir():
        raise UserError(f"--from_dir {config.from_dir} is no folder; name the one with the set's files")
    require_writable_folder(folder)
    written: dict[str, int] = {}
    remedy = "free some space or choose another --output_dir"
    with contextlib.ExitStack() as moves:  # made when all is there: no part of a set stands alone
        for split, name in public.splits:
            rows: Iterable[Row]
            if config.from_dir:
                rows = rows_of_folder(Path(config.from_dir), split)
            else:
                rows = rows_of_hub(public, split, config)
            records = islice(filter(None, map(public.convert, rows)), config.limit or None)
            first = next(records, None)
            if first is None:
                continue
            path = folder / f"{name}.jsonl.gz"
            written[path.name] = 0
            with gzip.GzipFile("", "wb", 6, moves.enter_context(replacing(path, remedy)), mtime=0) as out:
                for record in chain([first], records):
                    out.write(_line(record))
                    written[path.name] += 1
        if not written:
            where = config.from_dir or config.repo or public.repo
            wanted = ", ".join(sorted(_wanted_fields(public)))
            raise UserError(f"{where} holds no record of {config.name} (with fields like {wanted}); check --from_dir")
        source = {
            "name": config.name,
            "source": config.from_dir or f"{config.hub}: {config.repo or public.repo}",
            "published": f"https://huggingface.co/datasets/{public.repo}",
            "licence": public.licence,
            "records": written,
        }
        about = moves.enter_context(replacing(folder / "SOURCE.json", remedy))
        about.write(json.dumps(source, ensure_ascii=False, indent=1).encode() + b"\n")
    return written


def _line(record: Row) -> bytes:
    return json.dumps(record, ensure_ascii=False).encode() + b"\n"


def _wanted_fields(public: PublicSet) -> set[str]:
    """The fields that a converter looks at."""

    class Asked(dict):
        def get(self, name: str, default: object = None) -> str:
            return self[name]

        def __getitem__(self, name: str) -> str:
            asked.add(name)
            return "A"

    asked: set[str] = set()
    public.convert(Asked())
    return asked


def main(argv: list[str] | None = None) -> None:
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv and not argv[0].startswith("-"):  # python -m text.download NAME
        argv.insert(0, "--name")
    config = parse_config(DownloadConfig, argv, description="Fetch a public set and convert it.")
    public = SETS[config.name]
    written = fetch(config)
    for name, count in written.items():
        print(f"{Path(config.output_dir) / config.name / name}: {count:,} records")
    print(f"licence: {public.licence} (https://huggingface.co/datasets/{public.repo})")


if __name__ == "__main__":
    run_main(main)
