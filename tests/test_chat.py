"""The conversation in a terminal: a real terminal, keys and Ctrl-C included; and the shortest client's mistakes."""

import codecs
import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from checkpoint import save_checkpoint
from command_line import UserError
from inference import chat
from inference.request import RequestFailed

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, tokenizer, random_model):
    """A model that never ends an answer at temperature 0."""
    model = random_model("modern", vocab_size=len(tokenizer), max_seq_len=2048)
    with torch.no_grad():
        model.token_embedding.weight[tokenizer.eos_token_id] = 0
        model.lm_head.weight[tokenizer.eos_token_id] = 0
    path = tmp_path_factory.mktemp("chat") / "sft.pth"
    save_checkpoint(path, model_state=model.state_dict(), config=model.config, tokenizer=tokenizer, stage="sft")
    return path


class Terminal:
    """A program in a terminal of its own."""

    def __init__(self, arguments, folder):
        self.screen, far = pty.openpty()
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "XDG_CACHE_HOME": str(folder), "TERM": "xterm"}
        command = [sys.executable, "-m", "inference.chat", *arguments, "--num_threads", "1"]
        self.process = subprocess.Popen(
            command, stdin=far, stdout=far, stderr=far, cwd=folder, env=environment, start_new_session=True
        )
        os.close(far)
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")  # a character may arrive byte by byte
        self.text = ""

    def wait_for(self, pattern):
        """Read until the pattern has come; what was read until then is forgotten."""
        deadline = time.monotonic() + 120
        while not (found := re.search(pattern, self.text)):
            there = select.select([self.screen], [], [], max(0.0, deadline - time.monotonic()))[0]
            assert there, f"{pattern!r} did not come after {self.text!r}"
            self.text += self.decoder.decode(os.read(self.screen, 4096))
        self.text, before = self.text[found.end() :], self.text[: found.end()]
        return before

    def type(self, text):
        os.write(self.screen, text.encode())


@pytest.mark.skipif(sys.platform == "win32", reason="there are no pseudo-terminals here")
def test_a_conversation_in_a_terminal(checkpoint, tmp_path):
    """Ctrl-C ends an answer and not the program; pasted lines are one message; commands do what they say."""
    terminal = Terminal(["--model_path", str(checkpoint), "--temperature", "0"], tmp_path)
    try:
        terminal.wait_for("/help lists.*\n.*> ")
        terminal.type("/system 简短回答。\n")
        terminal.wait_for("system message: 简短回答。.*\n.*> ")
        terminal.type("你好\n")
        terminal.wait_for(r"你好\r\n.{20}")
        terminal.process.send_signal(signal.SIGINT)
        terminal.wait_for(r"…\r\n.*first after \d+ ms.*\n.*> ")
        terminal.type("first line\nsecond line\n")
        terminal.wait_for(r"second line\r\n[^>]{20}")
        terminal.process.send_signal(signal.SIGINT)
        terminal.wait_for("first after.*\n.*> ")
        terminal.process.send_signal(signal.SIGINT)
        terminal.wait_for("Ctrl-D or /quit leaves.*\n.*> ")
        terminal.type("/save said.json\n")
        terminal.wait_for("4 messages are in said.json.*\n.*> ")
        terminal.type("/nonsense\n")
        terminal.wait_for("error: there is no command /nonsense.*\n.*> ")
        terminal.type("/quit\n")
        assert terminal.process.wait(timeout=60) == 0
    finally:
        terminal.process.kill()
        os.close(terminal.screen)
    ((record,),) = [json.loads((tmp_path / "said.json").read_text(encoding="utf-8"))]
    roles = [message["role"] for message in record["messages"]]
    assert roles == ["system", "user", "assistant", "user", "assistant"]
    assert record["messages"][3]["content"] == "first line\nsecond line"
    history = tmp_path / "own-gpt" / "chat_history"
    assert "first line" in history.read_text(encoding="utf-8")
    assert history.stat().st_mode & 0o077 == 0


class Echo:
    """Answers with how many messages it was given; takes at most `limit`."""

    name = "echo"

    def __init__(self, limit=9):
        self.limit = limit

    def answer(self, messages):
        if len(messages) > self.limit:
            raise chat.ContextFull
        if messages[-1]["content"] == "fail":
            raise RequestFailed("broken")
        yield from ("\x1b[31m", str(len(messages)))


def test_oldest_turns_are_forgotten_when_the_context_is_full(capsys):
    conversation = chat.Conversation(Echo(limit=3), "be brief")
    for text in ("one", "two", "three"):
        conversation.ask(text)
    assert [message["content"][-3:] for message in conversation.whole] == ["ief", "ree", "31m2"[-3:]]
    assert capsys.readouterr().err.count("are forgotten") == 2
    conversation = chat.Conversation(Echo(limit=0), "")
    conversation.ask("too long")
    assert "longer than the model's context" in capsys.readouterr().err
    assert conversation.messages == []


def test_nothing_of_the_model_reaches_the_terminal_but_text(capsys):
    chat.Conversation(Echo(), "").ask("hello")
    assert capsys.readouterr().out == "[31m1\n"


def test_commands(tmp_path, capsys):
    conversation = chat.Conversation(Echo(), "")
    with pytest.raises(UserError, match="no question yet"):
        conversation.obey("/again")
    conversation.ask("hello")
    conversation.obey("/again")
    assert len(conversation.messages) == 2
    conversation.ask("fail")
    assert len(conversation.messages) == 2 and "broken" in capsys.readouterr().err
    with pytest.raises(UserError, match="cannot be written"):
        conversation.obey(f"/save {tmp_path}")
    with pytest.raises(UserError, match="needs a path"):
        conversation.obey("/save")
    conversation.obey("/reset")
    assert conversation.messages == []
    with pytest.raises(EOFError):
        conversation.obey("/quit")


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--url", "localhost:8000"], "must begin with http"),
        (["--url", "http://127.0.0.1:9"], "cannot be reached"),
        (["--model_path", "nowhere.pth"], "nowhere.pth"),
    ],
)
def test_mistakes_are_told_in_a_sentence(arguments, complaint):
    with pytest.raises(UserError, match=complaint):
        chat.main(arguments)


def test_the_shortest_client_says_where_it_found_nobody():
    demo = subprocess.run(
        [sys.executable, ROOT / "api_demo.py", "?", "http://127.0.0.1:9"], capture_output=True, text=True, timeout=60
    )
    assert demo.returncode == 2 and demo.stderr.startswith("error: http://127.0.0.1:9 gives no answer")
