"""The folder of a run: one run at a time, and what an earlier one left there is set aside, whole and numbered."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from command_line import UserError, holding

# What every run leaves; beside it `<stage>_best*`, with what was made of the best model since
LEFT_BY_RUNS = ("checkpoints", "metrics.jsonl", "run.log", "curves.png", "tensorboard")
LEFT_BY_RUNS += ("samples.txt", "samples.jsonl", "translations.json")


@contextlib.contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Refuse a second run while one is writing into this folder.

    Raises:
        UserError: another process trains into it, or it cannot be made.
    """
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(holding(folder, wait=False))
        except BlockingIOError:
            raise UserError(
                f"another process is training into {folder}; wait for its end or choose another --output_dir"
            ) from None
        except OSError as error:
            raise UserError(f"cannot write to {folder} ({error.strerror}); choose another --output_dir") from error
        yield


def set_earlier_run_aside(folder: Path, stage: str, *more: str) -> None:
    """Move what an earlier run left into `earlier/1`, `earlier/2`, …, and say so. Nothing is deleted.

    What else is in the folder stays. A move that was interrupted is completed by the next one, so that a run stays
    together.

    Args:
        stage: the name of the best checkpoint, without `_best`.
        more: names of files that this stage leaves besides.
    """
    found = [folder / name for name in (*LEFT_BY_RUNS, *more) if (folder / name).exists()]
    found += sorted(folder.glob(f"{stage}_best*"))
    earlier = folder / "earlier"
    moving = earlier / "moving"
    if not found and not moving.exists():
        return
    try:
        moving.mkdir(parents=True, exist_ok=True)
        for path in found:
            path.replace(moving / path.name)
        number = 1 + max((int(path.name) for path in earlier.iterdir() if path.name.isdecimal()), default=0)
        moving.rename(earlier / str(number))
    except OSError as error:
        raise UserError(
            f"what an earlier run left in {folder} cannot be set aside ({error.strerror}); choose another --output_dir"
        ) from error
    files = [path for path in (earlier / str(number)).rglob("*") if path.is_file()]
    size = sum(path.stat().st_size for path in files) / 2**20
    there = f"{earlier / str(number)} ({len(files)} files, {size:.1f} MiB)"
    print(f"starting anew; the earlier run is now in {there}", flush=True)
