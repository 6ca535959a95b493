"""Ranks for the tests: processes that find what torchrun would give them, but import torch together, before they part.

That torchrun itself starts a training is tested with the README's command.
"""

import importlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import torch.distributed as dist


def run_on_ranks(n_ranks, module, *arguments, cwd=None):
    """Call `work_as_a_rank(*arguments)` of a module of tests/ in `n_ranks` processes at once; each has to succeed."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
    command = [sys.executable, __file__, str(n_ranks), module, *map(str, arguments)]
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-4000:]


def main(n_ranks, module, *arguments):
    work = importlib.import_module(module).work_as_a_rank  # which computes nothing yet, so that it is safe to fork
    ranks, (port_to_read, port_to_write) = [], os.pipe()
    for rank in range(int(n_ranks)):
        if (pid := os.fork()) == 0:
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": n_ranks}
            os.environ |= {"LOCAL_WORLD_SIZE": n_ranks, "MASTER_ADDR": "localhost"}
            os.environ |= {"MASTER_PORT": os.read(port_to_read, 5).decode(), "TORCHELASTIC_USE_AGENT_STORE": "True"}
            work(*arguments)
            return
        ranks.append(pid)
    store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)  # chooses a free port
    os.write(port_to_write, f"{store.port:05}".encode() * len(ranks))
    while ranks:
        pid, status = os.wait()
        ranks.remove(pid)
        if status:  # the others would wait for it
            for other in ranks:
                os.kill(other, signal.SIGKILL)
            sys.exit(1)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    main(*sys.argv[1:])
