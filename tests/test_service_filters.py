"""Filters in the service: what is blocked says so, whole or streamed, and gives its place to others."""

import json
import re

import pytest
from fastapi.testclient import TestClient
from served import save_random_model

from inference.api_service import app

MESSAGE = "请换个话题。"
REPEATABLE = {"max_tokens": 200, "temperature": 1, "seed": 3}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("filters")
    (folder / "words.txt").write_text("forbidden thing\n违禁词\n", encoding="utf-8")
    (folder / "message.txt").write_text(MESSAGE, encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def client(folder, tmp_path_factory):
    model = save_random_model(tmp_path_factory.mktemp("models") / "sft_best.pth")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"MODEL_PATH": model, "NUM_THREADS": "1", "FILTERS": folder}.items():
            patch.setenv(name, str(value))
        with TestClient(app, raise_server_exceptions=False) as client:
            while client.get("/ready").status_code != 200:
                continue
            yield client


def chat(client, text, **more):
    body = {"messages": [{"role": "user", "content": text}], **REPEATABLE, **more}
    return client.post("/v1/chat/completions", json=body)


def streamed(client, text, **more):
    """The text and the finish reason of a streamed answer."""
    events = chat(client, text, stream=True, **more).text.splitlines()
    lines = [line[6:] for line in events if line.startswith("data: {")]
    choices = [choice for line in lines for choice in json.loads(line)["choices"]]
    return "".join(c["delta"].get("content") or "" for c in choices), choices[-1]["finish_reason"]


@pytest.fixture(scope="module")
def clean(client):
    """What the model says."""
    return chat(client, "你好").json()["choices"][0]["message"]["content"]


@pytest.mark.parametrize("text", ["a f0rbidden-thing", "違 禁 词"])
def test_a_blocked_question_is_answered_with_the_message(client, text):
    choice = chat(client, text, n=2).json()["choices"]
    assert [(c["message"]["content"], c["finish_reason"]) for c in choice] == [(MESSAGE, "content_filter")] * 2
    assert streamed(client, text) == (MESSAGE, "content_filter")
    reply = client.post("/generate", json={"prefix": text}).json()
    assert (reply["generated_text"], reply["finish_reason"]) == (MESSAGE, "content_filter")
    for prompt in (text, client.post("/tokenize", json={"prompt": text}).json()["tokens"]):
        reply = client.post("/v1/completions", json={"prompt": prompt, "echo": True}).json()["choices"][0]
        assert reply["finish_reason"] == "content_filter" and reply["text"].endswith(MESSAGE)


def test_what_the_assistant_said_before_is_no_question(client):
    messages = [{"role": "assistant", "content": "违禁词"}, {"role": "user", "content": "你好"}]
    reply = client.post("/v1/chat/completions", json={"messages": messages, **REPEATABLE}).json()
    assert reply["choices"][0]["finish_reason"] == "length"


def test_clean_answers_are_unchanged(client, clean):
    assert streamed(client, "你好") == (clean, "length")
    reply = chat(client, "你好", logprobs=True).json()["choices"][0]
    assert "".join(token["token"] for token in reply["logprobs"]["content"]) == clean or "\ufffd" in clean


def test_a_blocked_answer_ends_at_once(client, clean, folder):
    """The list is edited while the service runs; nothing of the phrase leaves, neither as text nor as tokens."""
    phrase = re.search(r"(?<![A-Za-z0-9])[A-Za-z]{4,}(?![A-Za-z0-9])", clean)[0]
    list_of_words = folder / "words.txt"
    before = list_of_words.read_text(encoding="utf-8")
    try:
        list_of_words.write_text(f"{before}{phrase}\n", encoding="utf-8")
        client.app_state["service"].filters.reload_if_changed()
        reply = chat(client, "你好", logprobs=True).json()["choices"][0]
        assert (reply["message"]["content"], reply["finish_reason"]) == (MESSAGE, "content_filter")
        assert reply["logprobs"] is None
        text, reason = streamed(client, "你好")
        assert reason == "content_filter" and text.endswith(MESSAGE)
        assert clean.startswith(text.removesuffix(MESSAGE).removesuffix("\n\n"))
        assert phrase not in text
        assert client.get("/health").json()["running"] == 0
        metrics = client.get("/metrics").text
        blocked = re.findall(r'^service:blocked_total\{.*part="answer"\} (\S+)', metrics, re.MULTILINE)
        assert blocked == ["2.0"]
    finally:
        list_of_words.write_text(before, encoding="utf-8")
        client.app_state["service"].filters.reload_if_changed()
