"""Load test of the generation service, with Locust.

    locust -f inference/load_test.py -u 50 -r 10 -t 10m --host http://localhost:8000
    locust -f inference/load_test.py --headless -u 50 -r 10 -t 1m --host http://localhost:8000
    python inference/load_test.py -u 50 -r 10 -t 10m --host http://localhost:8000     # the same

Each simulated user asks a question, with changing sampling settings (requests of all kinds are computed together),
checks that the answer has the promised shape, thinks for a moment and asks again. Now and then it looks at `/health`,
which has to stay quick however busy the model is. A full queue (503) is counted under a name of its own: it is how the
service protects itself, but the user was not served, so it is a failure too.
"""

import json
import random
import sys
from pathlib import Path

from locust import HttpUser, between, task
from locust.clients import ResponseContextManager

TEST_QUESTIONS = Path(__file__).parent.parent / "data" / "sft" / "sft_test.json"
FALLBACK_QUESTIONS = ["解释什么是机器学习", "法国的首都是哪里?", "What is the capital of Japan?", "What is 17 plus 25?"]
MAX_QUESTIONS = 200
SETTINGS = [
    {"temperature": 0},
    {"temperature": 0.8, "top_k": 50},
    {"temperature": 1.0, "top_k": 0, "top_p": 0.9, "repetition_penalty": 1.1, "stop": "\n"},
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


class GPTInferenceUser(HttpUser):
    """Someone who asks short questions, one after the other."""

    wait_time = between(0.5, 2.0)  # seconds
    questions = load_questions()

    @task(10)
    def generate(self) -> None:
        """Ask one question and check the answer."""
        prefix = random.choice(self.questions)
        body = {"prefix": prefix, "max_gen_len": 32, **random.choice(SETTINGS)}
        with self.client.post("/generate", json=body, catch_response=True) as response:
            if response.status_code == 503:
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
