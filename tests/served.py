"""What the tests of the service share: a small random model, and real servers that answer with it."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from contextlib import contextmanager
from pathlib import Path

import torch

from byte_level_bpe import ByteLevelBPETokenizer
from checkpoint import save_checkpoint
from gpt_model import GPTConfig, GPTModel

REPOSITORY = Path(__file__).parent.parent
CONTEXT = 2048
LONG_GENERATION = {"prefix": "解释", "max_gen_len": 1900, "temperature": 0}  # a second or two


def save_random_model(path, chat_template=None):
    """A checkpoint with a small trained tokenizer and random weights, as an instruction-tuned model."""
    torch.manual_seed(0)
    tokenizer = ByteLevelBPETokenizer(320)
    tokenizer.train(["解释什么是机器学习。 What is machine learning?"] * 4)
    if chat_template:
        tokenizer.chat_template = chat_template
    config = GPTConfig.for_architecture(
        "modern", vocab_size=tokenizer.vocab_size, d_model=64, n_layers=3, n_heads=2, max_seq_len=CONTEXT
    )
    state = GPTModel.from_config(config).state_dict()
    return save_checkpoint(path, model_state=state, config=config, tokenizer=tokenizer, stage="sft")


class Server:
    """A service in a process of its own, as `python -m inference.api_service` starts it.

    Attributes:
        process, log, url: of the server; the log is a file.
    """

    def __init__(self, log, *options, environment=(), wrap=()):
        self.log = Path(log)
        command = [*wrap, sys.executable, "-m", "inference.api_service", "--port", "0", "--num_threads", "1", *options]
        environment = {**os.environ, "OMP_WAIT_POLICY": "passive", **dict(environment)}
        with self.log.open("w") as file:
            self.process = subprocess.Popen(command, cwd=REPOSITORY, env=environment, stdout=file, stderr=file)
        self.url = self._address()

    def _address(self):
        deadline = time.monotonic() + 120
        while "listening on " not in self.text and self.process.poll() is None:
            assert time.monotonic() < deadline, self.text
            time.sleep(0.05)
        found = re.findall(r"listening on (http://[0-9.:]+)", self.text)
        return found[-1] if found else None

    @property
    def text(self):
        """What it has logged."""
        return self.log.read_text()

    @property
    def address(self):
        """Host and port."""
        host, port = self.url.removeprefix("http://").split(":")
        return host, int(port)

    def wait_until_ready(self):
        """Poll /ready."""
        deadline = time.monotonic() + 120
        while self.get("/ready")[0] != 200:
            assert time.monotonic() < deadline and self.process.poll() is None, self.text
            time.sleep(0.05)
        return self

    def get(self, path, **headers):
        """Status and JSON (or text) of a GET."""
        return self.call(path, None, **headers)[::2]

    def post(self, path, body, **headers):
        """Status, headers and JSON of a POST."""
        return self.call(path, body if isinstance(body, bytes) else json.dumps(body).encode(), **headers)

    def call(self, path, content, timeout=120, **headers):
        """Status, headers and JSON (or text) of an answer."""
        headers = {"Content-Type": "application/json", **{k.replace("_", "-"): v for k, v in headers.items()}}
        request = urllib.request.Request(self.url + path, content, headers)
        try:
            with urllib.request.urlopen(request, timeout=timeout) as response:
                status, headers, content = response.status, response.headers, response.read()
        except urllib.error.HTTPError as error:
            status, headers, content = error.code, error.headers, error.read()
        is_json = headers.get("content-type", "").startswith("application/json")
        return status, headers, json.loads(content) if is_json else content.decode()

    def wait_for(self, **counts):
        """Poll /health until it says what is given."""
        deadline = time.monotonic() + 120
        while not counts.items() <= (state := self.get("/health")[1]).items():
            assert time.monotonic() < deadline, f"expected {counts}, the service says {state}"
        return state

    def connect(self):
        """A raw connection."""
        return socket.create_connection(self.address, timeout=120)

    def send(self, connection, body, path="/generate", behind=b""):
        """A request over a raw connection, which does not wait for the answer."""
        content = json.dumps(body).encode()
        head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(content)}\r\n\r\n"
        connection.sendall(head.encode() + content + behind)

    def stop(self, signal_number=signal.SIGTERM, timeout=120):
        """The exit status after a signal."""
        if self.process.poll() is None:
            self.process.send_signal(signal_number)
        return self.process.wait(timeout=timeout)


@contextmanager
def running(log, *options, **more):
    """A server that is ready; it has to end cleanly."""
    server = Server(log, *options, **more)
    try:
        yield server.wait_until_ready()
        assert server.stop() == 0, server.text
    finally:
        server.process.kill()
        server.process.wait()


def read_response(connection):
    """Status and JSON of a response on a raw connection, or None where it is closed without one."""
    head, body = b"", b""
    while not head.endswith(b"\r\n\r\n"):  # byte by byte, as another response may follow
        byte = connection.recv(1)
        if not byte:
            return None
        head += byte
    length = int(re.search(rb"(?i)content-length: *([0-9]+)", head)[1])
    while len(body) < length:
        body += connection.recv(length - len(body))
    return int(head.split()[1]), json.loads(body)
