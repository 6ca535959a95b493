"""Processes that do the same thing at once, one of them killed in the middle: what every cache has to stand.

They import together, before they part. A test runs a script of its own that imports this file.
"""

import os
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def run_script(script, *arguments):
    """Run a Python script that finds the project and the tests; it has to succeed. Returns what it printed."""
    found = {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", script, *map(str, arguments)]
    done = subprocess.run(command, env={**os.environ, **found}, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def pause_instead(*arguments):
    """Stands in for a function in the middle of the work; the process gets no further."""
    while True:
        signal.pause()


def three_at_once(work, pause_in_the_middle, is_there):
    """One process that pauses in the middle, then two that do it all; the first is killed while they are at work.

    Args:
        work: what each process does.
        pause_in_the_middle: called in the first process before its work, so that it stops half-way.
        is_there: whether the first one is half-way.
    """

    def start(*steps):
        if pid := os.fork():
            return pid
        try:
            for step in steps:
                step()
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)

    children = [start(pause_in_the_middle, work)]
    while not is_there():
        if os.waitpid(children[0], os.WNOHANG)[0]:
            sys.exit("the first process ended before it was killed")
        time.sleep(0.002)
    children += [start(work), start(work)]
    os.kill(children[0], signal.SIGKILL)
    endings = [os.waitpid(pid, 0)[1] for pid in children]
    assert endings == [signal.SIGKILL, 0, 0], endings
