"""Load test of the generation service, with Locust.

    locust -f inference/load_test.py -u 50 -r 10 -t 10m --host http://localhost:8000
    locust -f inference/load_test.py --headless -u 50 -r 10 -t 1m --host http://localhost:8000
    python inference/load_test.py -u 50 -r 10 -t 10m --host http://localhost:8000     # the same

Each simulated user asks a question, with changing sampling settings (requests of all kinds are computed together),
checks that the answer has the promised shape, thinks for a moment and asks again. Half of the questions go to the chat
API and are streamed: the time to the first token and the times between tokens are statistics of their own. Now and then
it looks at `/health`, which has to stay quick however busy the model is. A full queue (429) is counted under a name of
its own: it is how the service protects itself, but the user was not served, so it is a failure too.

`--tags openai` asks for nothing but what other servers with OpenAI's API have, too. The variable API_KEY is sent to a
service that asks for a key.
"""

import json
import os
import random
import sys
import time
from collections.abc import Iterable
from pathlib import Path

from locust import HttpUser, between, tag, task
from locust.clients import ResponseContextManager

TEST_QUESTIONS = Path(__file__).parent.parent / "data" / "sft" / "sft_test.json"
FALLBACK_QUESTIONS = ["解释什么是机器学习", "法国的首都是哪里?", "What is the capital of Japan?", "What is 17 plus 25?"]
MAX_QUESTIONS = 200
MAX_TOKENS = 32
SETTINGS = [
    {"temperature": 0},
    {"temperature": 0.8, "top_k": 50},
    {"temperature": 1.0, "top_k": 0, "top_p": 0.9, "repetition_penalty": 1.1, "stop": "\n"},
]
CHAT_SETTINGS = [
    {"temperature": 0},
    {"temperature": 0.8, "seed": 1},
    {"temperature": 1.0, "top_p": 0.9, "stop": ["\n"]},
]
HEALTH_SECONDS = 1.0  # slower than this while the model is busy means that the event loop is blocked


def load_questions(path: Path = TEST_QUESTIONS) -> list[str]:
    """Up to `MAX_QUESTIONS` questions of the test set, always the same; a few fixed ones where it is missing."""
    if not path.is_file():
        return FALLBACK_QUESTIONS
    records = json.loads(path.read_text(encoding="utf-8"))
    questions = [record["instruction"] for record in records]
    return random.Random(0).sample(questions, min(MAX_QUESTIONS, len(questions)))


def complaint_about(answer: object, prefix: str) -> str | None:
    """What is wrong with the service's answer to `prefix`, or None where it keeps the contract."""
    if not isinstance(answer, dict):
        return "the answer is not a JSON object"
    if answer.get("prefix") != prefix:
        return "the answer does not repeat the prefix that was asked"
    if not isinstance(answer.get("generated_text"), str):
        return "the answer has no generated_text"
    return None


def read_stream(lines: Iterable[str]) -> tuple[list[float], str | None]:
    """When the pieces of a streamed answer came, in seconds; and what is wrong with it, or None.

    Args:
        lines: of the body, as they arrive.
    """
    times, data, reason = [], "", None
    try:
        for line in lines:
            if not line.startswith("data: "):
                continue
            data = line.removeprefix("data: ")
            if data == "[DONE]":
                break
            chunk = json.loads(data)
            if "error" in chunk:
                return times, f"the stream ended with an error: {chunk['error']['message']}"
            for choice in chunk["choices"]:
                reason = choice["finish_reason"] or reason
                if choice["delta"].get("content"):
                    times.append(time.perf_counter())
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        return times, f"the stream has an event that is no chunk of an answer ({error!r})"
    if data != "[DONE]":
        return times, "the stream ended without [DONE]"
    return times, None if reason else "the stream has no finish_reason"


class GPTInferenceUser(HttpUser):
    """Someone who asks short questions, one after the other."""

    wait_time = between(0.5, 2.0)  # seconds
    questions = load_questions()

    def on_start(self) -> None:
        """Show the key, where one is set."""
        if key := os.environ.get("API_KEY"):
            self.client.headers["Authorization"] = f"Bearer {key}"

    @task(5)
    def generate(self) -> None:
        """Ask one question and check the answer."""
        prefix = random.choice(self.questions)
        body = {"prefix": prefix, "max_gen_len": MAX_TOKENS, **random.choice(SETTINGS)}
        with self.client.post("/generate", json=body, catch_response=True) as response:
            if response.status_code == 429:
                response.request_meta["name"] = "/generate (queue full)"
            if response.status_code == 200:
                self.check(response, prefix)

    @staticmethod
    def check(response: ResponseContextManager, prefix: str) -> None:
        """Mark a response of status 200 as failed where its body is not what was promised."""
        try:
            complaint = complaint_about(response.json(), prefix)
        except ValueError:
            complaint = "the answer is not JSON"
        if complaint:
            response.failure(complaint)

    @tag("openai")
    @task(5)
    def chat(self) -> None:
        """Ask one question of the chat API and read the answer as it is written."""
        messages = [{"role": "user", "content": random.choice(self.questions)}]
        body = {"messages": messages, "max_tokens": MAX_TOKENS, "stream": True, **random.choice(CHAT_SETTINGS)}
        path, began = "/v1/chat/completions", time.perf_counter()
        with self.client.post(path, json=body, stream=True, catch_response=True) as response:
            if response.status_code == 429:
                response.request_meta["name"] = f"{path} (queue full)"
            if response.status_code != 200:
                return
            response.encoding = "utf-8"
            times, complaint = read_stream(response.iter_lines(decode_unicode=True))
            response.request_meta["response_time"] = (time.perf_counter() - began) * 1000  # up to the end
            if complaint:
                response.failure(complaint)
        if times:
            self.record("time to first token", times[0] - began)
        for earlier, later in zip(times, times[1:], strict=False):
            self.record("between tokens", later - earlier)

    def record(self, name: str, seconds: float) -> None:
        """A line of its own in Locust's statistics."""
        event = {"request_type": "stream", "name": name, "response_time": seconds * 1000, "response_length": 0}
        self.environment.events.request.fire(**event, exception=None, context={})

    @tag("openai")
    @task(1)
    def health(self) -> None:
        """Look at the service's state, which must answer at once even while the model computes."""
        with self.client.get("/health", catch_response=True) as response:
            seconds = response.elapsed.total_seconds()
            if response.status_code == 200 and seconds > HEALTH_SECONDS:
                response.failure(f"/health took longer than {HEALTH_SECONDS:g} s")


if __name__ == "__main__":
    from locust.main import main

    sys.argv[1:1] = ["-f", __file__]
    main()
