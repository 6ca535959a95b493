"""Nobody waits in silence: a bar on a terminal, lines elsewhere, and a file of all that was said."""

import fcntl
import os
import pty
import re
import select
import struct
import sys
import termios
import threading
from contextlib import contextmanager, redirect_stderr

import pytest

import progress
from byte_level_bpe import ByteLevelBPETokenizer
from command_line import UserError, run_main
from progress import Progress, clock, listening, told_from_outside, tracked


class Spoken(threading.Event):
    """A stream that tells when a line has come."""

    def __init__(self):
        super().__init__()
        self.text = ""

    def write(self, text):
        self.text += text
        self.set()
        return len(text)

    def flush(self):
        pass

    def isatty(self):
        return False


@pytest.fixture
def impatient(monkeypatch):
    """Half a minute passes at once."""
    monkeypatch.setattr(progress, "LINE_SECONDS", 0.001)


@contextmanager
def terminal():
    """Standard error is a real terminal; a function that gives what was drawn on it."""
    main, side = pty.openpty()
    fcntl.ioctl(side, termios.TIOCSWINSZ, struct.pack("4H", 24, 100, 0, 0))  # rows and columns

    def drawn():
        content = b""
        while select.select([main], [], [], 0)[0]:
            content += os.read(main, 100_000)
        return content.decode()

    with os.fdopen(side, "w") as stream, redirect_stderr(stream):
        yield drawn
    os.close(main)


def test_without_a_terminal_there_is_a_line_now_and_then(impatient):
    """Also while a single step goes on and on, as nothing has to be counted for it."""
    with redirect_stderr(Spoken()) as spoken, Progress("pretrain", 800, done=100) as run:
        assert spoken.wait(60)
        run.update(loss=2.34567, lr=0.001)
        spoken.clear()
        assert spoken.wait(60)
    first, *_, last = spoken.text.splitlines()
    assert re.fullmatch(r"pretrain: step 100 of 800, 0:0\d so far", first)
    assert re.fullmatch(r"pretrain: step 101 of 800, 0:0\d so far, \d+:\d\d to go, loss 2.346, lr 0.001", last)
    assert not run._thread.is_alive()


def test_short_work_says_nothing(capsys):
    assert list(tracked([1, 2], "adding", "number")) == [1, 2]
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        (dict(unit="B"), "reading: 2.50MB, 0:00 so far"),
        (dict(unit="B", total=5_000_000), "reading: 2.50MB of 5.00MB, 0:00 so far, 0:00 to go"),
        (dict(unit="document"), "reading: 2,500,000 documents, 0:00 so far"),
        (dict(unit=""), "reading: 0:00 so far"),
    ],
)
def test_a_line_says_what_is_known(settings, line):
    work = Progress("reading", shown=False, **settings)
    work.update(2_500_000)
    assert work.line() == line


def test_times_are_read_as_on_a_clock():
    times = {0: "0:00", 59.6: "1:00", 187: "3:07", 3600: "1:00:00", 90061: "25:01:01"}
    assert [clock(seconds) for seconds in times] == list(times.values())


def test_on_a_terminal_there_is_a_bar(capsys):
    """And sentences go to standard output, past it."""
    with terminal() as screen:
        with Progress("pretrain", 2, leave=True) as run:
            run.update(loss=2.34567)
            run.say("step 1: saved")
            run.update(loss=2.0)
        drawn = screen()
    assert "pretrain: 100%" in drawn and "2/2" in drawn and "loss 2" in drawn
    assert capsys.readouterr().out == "step 1: saved\n"


def test_the_tokenizer_tells_of_both_of_its_phases(impatient, capfd):
    """Reading, here held up until a line has come; and merging, while which its library lets no other thread run."""

    def texts():
        yield "a text of some words"
        spoken.wait(60)
        yield "another one"

    with redirect_stderr(Spoken()) as spoken:
        ByteLevelBPETokenizer(300).train(texts(), show_progress=True)
    assert "reading text: 20.0B, 0:0" in spoken.text
    with told_from_outside("learning merges"):
        said = ""
        while "learning merges: 0:0" not in said:  # nothing of this process has a part in it
            said += capfd.readouterr().err


# ------------------------------------------------------------------------------------------------------- the transcript


def stamped(path):
    """What was said, without the times, each of which has to be there."""
    lines = path.read_text(encoding="utf-8").splitlines()
    assert all(re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d  ", line) for line in lines)
    return [line[21:] for line in lines]


def test_what_was_said_is_kept_from_the_beginning_to_the_error(tmp_path, capsys, monkeypatch):
    """Both streams, also what was said before the folder was known and after the work had failed."""
    monkeypatch.setattr(sys, "argv", ["train.py", "--data", "my text"])

    def main():
        print("no size was given")
        with listening() as transcript:
            transcript.move_to(tmp_path / "run.log")
            print("step 1", "of 2")
            print("warning: slow", file=sys.stderr)
        raise UserError("the disk is full")

    with pytest.raises(SystemExit):
        run_main(main)
    said = ["no size was given", "step 1 of 2", "warning: slow", "error: the disk is full"]
    assert stamped(tmp_path / "run.log") == ["$ train.py --data 'my text'", *said]
    assert capsys.readouterr() == ("no size was given\nstep 1 of 2\n", "warning: slow\nerror: the disk is full\n")
    print("afterwards")
    assert len(stamped(tmp_path / "run.log")) == 5


def test_of_a_bar_its_last_state_is_kept(tmp_path, capsys):
    with terminal(), listening() as transcript:
        transcript.move_to(tmp_path / "run.log")
        with Progress("sft", 3, leave=True) as run:
            run.update()
            run.say("half-way")
            run.update(2)
    command, sentence, bar = stamped(tmp_path / "run.log")
    assert sentence == "half-way"
    assert bar.startswith("sft: 100%") and "\r" not in bar


def test_a_later_run_of_the_same_program_has_a_file_of_its_own(tmp_path):
    with listening() as transcript:
        for name in ("reward", "ppo"):
            print(f"training {name}")
            transcript.move_to(tmp_path / name)
            print(f"{name}: done")
    assert stamped(tmp_path / "reward")[1:] == ["training reward", "reward: done", "training ppo"]
    assert stamped(tmp_path / "ppo") == ["ppo: done"]
