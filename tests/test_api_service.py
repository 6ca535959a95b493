"""The generation service: its contract, what it refuses and how, and that a busy model blocks nobody."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from fastapi.testclient import TestClient
from served import CONTEXT, LONG_GENERATION, REPOSITORY, running, save_random_model

from checkpoint import load_model
from command_line import UserError
from inference.api_service import app
from inference.quantizer import quantize_model_int8, save_quantized_model
from inference.sampling import SamplingParams
from inference.service.requests import MAX_PREFIX_CHARACTERS, GenerateRequest
from inference.service.settings import ServiceSettings, model_to_serve

MAX_BODY_BYTES = ServiceSettings.max_body_bytes


@pytest.fixture(scope="module")
def model_path(tmp_path_factory):
    """A small random model."""
    return save_random_model(tmp_path_factory.mktemp("models") / "sft_best.pth")


def ready(client):
    """The client, once the model is loaded."""
    deadline = time.monotonic() + 60
    while client.get("/ready").status_code != 200:
        assert time.monotonic() < deadline
    return client


def service_of(client):
    return client.app_state["service"]


@pytest.fixture(scope="module")
def client(model_path):
    """The application in this process, with its model loaded."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MODEL_PATH", str(model_path))
        patch.setenv("NUM_THREADS", "1")
        with TestClient(app, raise_server_exceptions=False) as client:
            yield ready(client)


@pytest.fixture(scope="module")
def server(model_path, tmp_path_factory):
    """A running service that computes two requests together while two more wait."""
    log = tmp_path_factory.mktemp("log") / "log"
    with running(log, "--model_path", str(model_path), "--max_batch", "2", "--max_queue", "2") as server:
        yield server


# --- the contract ---------------------------------------------------------------------------------------------------


def test_generate_answers_with_the_prefix_and_the_generated_text(client):
    request = {"prefix": "解释什么是机器学习", "max_gen_len": 20, "top_k": 50, "temperature": 0.8}
    response = client.post("/generate", json=request)
    assert response.status_code == 200
    assert response.headers["content-type"] == "application/json"
    assert set(response.json()) == {"prefix", "generated_text", "finish_reason"}
    assert response.json()["prefix"] == "解释什么是机器学习"
    assert response.json()["generated_text"]
    assert "解释什么是机器学习".encode() in response.content, "Chinese is sent as UTF-8, not as escapes"


def test_only_the_prefix_is_required_and_the_defaults_are_the_documented_ones(client):
    request = GenerateRequest(prefix="a")
    assert (request.max_gen_len, request.top_k, request.temperature, request.seed) == (100, 50, 0.8, None)
    assert client.post("/generate", json={"prefix": "a"}).status_code == 200


def test_health_says_what_is_served(client, model_path):
    health = client.get("/health").json()
    assert (health["status"], health["model_status"]) == ("healthy", "loaded")
    assert (health["model_path"], health["stage"], health["device"]) == (str(model_path), "sft", "cpu")
    assert (health["running"], health["waiting"], health["max_seq_len"]) == (0, 0, CONTEXT)
    assert health["parameters"] > 100_000 and health["uptime_seconds"] >= 0


def test_documentation_describes_requests_and_errors(client):
    page = client.get("/docs").text
    for file in re.findall(r'(?:src|href)="([^"]*)"', page):
        assert not file.startswith(("http", "//")) and client.get("/" + file).status_code == 200
    description = client.get("/openapi.json").json()
    responses = description["paths"]["/generate"]["post"]["responses"]
    for status in ("400", "401", "408", "413", "415", "422", "429", "503"):
        assert responses[status]["content"]["application/json"]["schema"]["$ref"].endswith("/ErrorResponse")
    assert "HTTPValidationError" not in description["components"]["schemas"], "no other shape of error is promised"


def test_temperature_zero_and_a_seed_make_the_answer_repeatable(client):
    def text(**settings):
        return client.post("/generate", json={"prefix": "a", "max_gen_len": 16, **settings}).json()["generated_text"]

    assert text(temperature=0) == text(temperature=0)
    assert text(temperature=1, seed=7) == text(temperature=1, seed=7) != text(temperature=1, seed=8)


def test_a_tiny_temperature_is_greedy_instead_of_an_overflow(client):
    texts = [
        client.post("/generate", json={"prefix": "a", "max_gen_len": 8, "temperature": temperature}).json()
        for temperature in (0, 1e-320)
    ]
    assert texts[0] == texts[1]


def test_an_answer_ends_where_the_context_ends(client):
    prefix = "x" * (CONTEXT - 100)  # "x" was never merged: a token a character
    response = client.post("/generate", json={"prefix": prefix, "max_gen_len": 4000, "temperature": 0})
    assert response.status_code == 200


def test_a_quantized_model_is_served_in_the_same_way(model_path, monkeypatch):
    model, _, checkpoint = load_model(model_path)
    path = save_quantized_model(quantize_model_int8(model), model_path.with_name("sft_best_int8.pth"), checkpoint)
    monkeypatch.setenv("MODEL_PATH", str(path))
    with TestClient(app) as client:
        health = ready(client).get("/health").json()
        assert (health["quantization"], health["parameters"]) == ("int8", model.num_parameters())
        assert client.post("/generate", json={"prefix": "a", "max_gen_len": 8}).status_code == 200


# --- what it refuses ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "status", "expected"),
    [
        (b"", 400, "not valid JSON"),
        (b"{", 400, "not valid JSON"),
        (b"null", 422, "JSON object"),
        (b"[]", 422, "JSON object"),
        (b'"text"', 422, "JSON object"),
        (b"\xff\xfe", 400, "body"),
        (b"[" * 100_000, 400, "body"),
        (b"{}", 422, "prefix"),
        (b'{"prefix": null}', 422, "prefix"),
        (b'{"prefix": "a", "nonsense": null}', 422, "nonsense"),
        (b'{"prefix": 5}', 422, "prefix"),
        (b'{"prefix": ""}', 422, "prefix"),
        (b'{"prefix": "\\ud800"}', 400, "surrogate"),
        (b'{"prefix": "a", "\\ud800": 1}', 400, "surrogate"),
        (b'{"prefix": "a", "max_new_tokens": 5}', 422, "max_new_tokens"),
        (b'{"prefix": "a", "max_gen_len": 0}', 422, "max_gen_len"),
        (b'{"prefix": "a", "max_gen_len": -1}', 422, "max_gen_len"),
        (b'{"prefix": "a", "max_gen_len": 1000000}', 422, "4096 new tokens"),
        (b'{"prefix": "a", "max_gen_len": true}', 422, "max_gen_len"),
        (b'{"prefix": "a", "max_gen_len": "5"}', 422, "max_gen_len"),
        (b'{"prefix": "a", "max_gen_len": 5.5}', 422, "max_gen_len"),
        (b'{"prefix": "a", "max_gen_len": 1' + b"0" * 5000 + b"}", 400, "body"),
        (b'{"prefix": "a", "top_k": -1}', 422, "top_k"),
        (b'{"prefix": "a", "top_k": true}', 422, "top_k"),
        (b'{"prefix": "a", "top_k": 1e999}', 400, "too large"),
        (b'{"prefix": "a", "temperature": -0.1}', 422, "temperature"),
        (b'{"prefix": "a", "temperature": 2.1}', 422, "temperature"),
        (b'{"prefix": "a", "temperature": true}', 422, "temperature"),
        (b'{"prefix": "a", "temperature": "0.5"}', 422, "temperature"),
                (b'{"prefix": "a", "temperature": NaN}', 400, "NaN"),
        (b'{"prefix": "a", "temperature": Infinity}', 400, "Infinity"),
        (b'{"prefix": "a", "temperature": 1' + b"0" * 400 + b"}", 422, "temperature"),
        (
            b'{"prefix": "a", "top_k": 400}',
            422,
            "the size of the vocabulary",
        ),
        (b'{"prefix": "a", "top_p": 0}', 422, "top_p"),
        (b'{"prefix": "a", "top_p": NaN}', 400, "NaN"),
        (b'{"prefix": "a", "min_p": 1.5}', 422, "min_p"),
        (b'{"prefix": "a", "repetition_penalty": 1e-40}', 422, "repetition_penalty"),
        (b'{"prefix": "a", "presence_penalty": -3}', 422, "presence_penalty"),
        (b'{"prefix": "a", "frequency_penalty": "1"}', 422, "frequency_penalty"),
        (b'{"prefix": "a", "logit_bias": {"a": 1}}', 422, "logit_bias"),
        (b'{"prefix": "a", "logit_bias": {"400": 1}}', 422, "logit_bias has 400"),
        (b'{"prefix": "a", "logit_bias": {"5": 101}}', 422, "logit_bias"),
        (b'{"prefix": "a", "banned_tokens": [-1]}', 422, "banned_tokens"),
        (b'{"prefix": "a", "banned_tokens": [400]}', 422, "banned_tokens has 400"),
        (b'{"prefix": "a", "stop": ""}', 422, "stop"),
        (b'{"prefix": "a", "stop": ["b", ""]}', 422, "stop"),
        (b'{"prefix": "a", "stop": [1]}', 422, "stop"),
        (b'{"prefix": "a", "stop_token_ids": [400]}', 422, "stop_token_ids has 400"),
        (b'{"prefix": "a", "ignore_eos": 1}', 422, "ignore_eos"),
        (b'{"prefix": "a", "overflow": "wrap"}', 422, "overflow"),
                (b'{"prefix": "a", "seed": 18446744073709551616}', 422, "seed"),
        (b'{"prefix": "' + b"x" * (CONTEXT + 1) + b'"}', 422, "context"),
        (b'{"prefix": "' + b"x" * (MAX_PREFIX_CHARACTERS + 1) + b'"}', 422, "prefix"),
        (b'{"prefix": "' + b"x" * MAX_BODY_BYTES + b'"}', 413, "larger"),
    ],
    ids=lambda value: repr(value[:48]) if isinstance(value, bytes) else None,
)
def test_bad_input_gets_one_sentence_as_json(client, body, status, expected):
    response = client.post("/generate", content=body, headers={"Content-Type": "application/json"})
    assert response.status_code == status
    assert set(response.json()) == {"error"}
    assert set(response.json()["error"]) == {"message", "type", "param", "code"}
    assert expected in response.json()["error"]["message"]


def test_a_body_that_does_not_announce_its_size_is_limited_too(client):
    chunks = (b"x" * 65536 for _ in range(64))
    response = client.post("/generate", content=chunks, headers={"Content-Type": "application/json"})
    assert response.status_code == 413
    assert "larger" in response.json()["error"]["message"]


def test_unknown_paths_and_methods_get_the_same_shape_of_error(client):
    for response, status in ((client.get("/nothing"), 404), (client.get("/generate"), 405)):
        assert response.status_code == status
        assert "/docs" in response.json()["error"]["message"]


# --- the engine behind it -------------------------------------------------------------------------------------------


SETTINGS = {
    "top_p": 1e-6,
    "min_p": 1,
    "repetition_penalty": 5,
    "presence_penalty": 2,
    "frequency_penalty": 2,
    "logit_bias": {"120": 100},
    "overflow": "slide",
    "ignore_eos": True,
}


@pytest.mark.parametrize("name", SETTINGS)
def test_every_sampling_field_reaches_the_engine(client, monkeypatch, name):
    """It reaches the engine as it was sent, and the answer comes as usual."""
    engine, seen = service_of(client).served.engine, []
    submit = engine.submit
    monkeypatch.setattr(
        engine, "submit", lambda ids, params, **more: seen.append(params) or submit(ids, params, **more)
    )
    response = client.post("/generate", json={"prefix": "a", "max_gen_len": 4, name: SETTINGS[name]})
    assert response.status_code == 200
    sent = {120: 100} if name == "logit_bias" else SETTINGS[name]
    assert getattr(seen[0], name) == sent != getattr(SamplingParams(), name)


def test_stop_strings_and_tokens_and_bans_shape_the_text(client):
    def text(**settings):
        body = {"prefix": "a", "max_gen_len": 24, "temperature": 1, "top_k": 0, "seed": 5, **settings}
        return client.post("/generate", json=body).json()["generated_text"]

    plain = text()
    character = next(c for c in plain[1:] if c not in ("\ufffd", plain[0]))
    assert text(stop=character) == text(stop=["never said", character]) == plain[: plain.index(character)]
    tokenizer = service_of(client).served.tokenizer
    x = tokenizer.encode("x", add_special_tokens=False)["input_ids"][0]
    others = [token for token in range(tokenizer.vocab_size) if token != x]
    assert text(banned_tokens=others, max_gen_len=5) == "xxxxx"
    assert text(banned_tokens=others, max_gen_len=5, stop_token_ids=[x]) == ""


def test_a_step_that_fails_is_reported_to_its_client_and_the_next_request_is_served(client, monkeypatch):
    engine, request = service_of(client).served.engine, {"prefix": "a", "max_gen_len": 4, "temperature": 0}
    expected = client.post("/generate", json=request).json()

    def broken(*args, **more):
        raise RuntimeError("the model failed")

    with monkeypatch.context() as patch:
        patch.setattr(engine.model_step, "forward", broken)
        response = client.post("/generate", json=request)
        assert response.status_code == 500
        assert "the model failed" in response.json()["error"]["message"]
    assert client.post("/generate", json=request).json() == expected


def test_numbers_that_are_not_finite_are_reported_and_the_next_request_is_served(client):
    model, request = service_of(client).served.model, {"prefix": "a", "max_gen_len": 4, "temperature": 0}
    expected = client.post("/generate", json=request).json()
    weight = model.final_norm.weight.data
    sound = weight[0].item()
    weight[0] = float("nan")
    response = client.post("/generate", json={**request, "prefix": "b"})
    weight[0] = sound
    assert response.status_code == 500
    assert "not finite" in response.json()["error"]["message"]
    assert client.post("/generate", json=request).json() == expected


def test_the_engine_computes_with_the_threads_that_were_asked_for(model_path, monkeypatch):
    monkeypatch.setenv("MODEL_PATH", str(model_path))
    monkeypatch.setenv("NUM_THREADS", "2")
    with TestClient(app) as client:
        ready(client)
        step, seen = service_of(client).served.engine.model_step, []
        compute = step.forward

        def recording(*args, **more):
            seen.append((threading.current_thread().name, torch.get_num_threads()))
            return compute(*args, **more)

        monkeypatch.setattr(step, "forward", recording)
        client.post("/generate", json={"prefix": "a", "max_gen_len": 2})
    assert set(seen) == {("engine", 2)}


# --- a real server --------------------------------------------------------------------------------------------------


def generate(server, body):
    return server.post("/generate", body)[::2]


def test_health_is_quick_while_the_model_computes(server):
    with ThreadPoolExecutor(1) as pool:
        generation = pool.submit(generate, server, LONG_GENERATION)
        server.wait_for(running=1)
        answers = 0
        while answers < 10 and not generation.done():
            server.get("/health")
            answers += 1
        assert not generation.done(), f"it ended after {answers} of 10 looks at /health, which has to wait for nothing"
    assert generation.result()[0] == 200


def test_requests_that_meet_in_a_batch_get_the_answers_they_get_alone(server):
    """With settings of their own each; the long one does not have to end first."""
    requests = [
        {"prefix": "机器", "max_gen_len": 24, "temperature": 0},
        {"prefix": "a longer question?", "max_gen_len": 24, "temperature": 1, "seed": 3, "top_p": 0.9},
    ]
    alone = [generate(server, request)[1] for request in requests]
    with ThreadPoolExecutor(3) as pool:
        long = pool.submit(generate, server, LONG_GENERATION)
        server.wait_for(running=1)
        together = list(pool.map(lambda request: generate(server, request)[1], requests))
        assert not long.done()
    assert together == alone
    assert long.result()[0] == 200


def test_a_full_line_is_answered_at_once_with_429_and_a_time_to_come_back(server):
    short = {"prefix": "a", "max_gen_len": 1}
    with ThreadPoolExecutor(4) as pool:
        accepted = [pool.submit(generate, server, LONG_GENERATION) for _ in range(2)]
        server.wait_for(running=2)
        accepted += [pool.submit(generate, server, short) for _ in range(2)]
        server.wait_for(running=2, waiting=2)
        status, headers, body = server.post("/generate", short)
        assert status == 429
        assert int(headers["Retry-After"]) >= 1
        assert "busy" in body["error"]["message"]
        assert [future.result()[0] for future in accepted] == [200] * 4


def test_a_client_that_leaves_gives_its_place_to_others_whether_it_waits_or_runs(server):
    """Streamed or not."""
    with ThreadPoolExecutor(1) as pool:
        stays = pool.submit(generate, server, LONG_GENERATION)
        server.wait_for(running=1)
        with server.connect() as runs:
            server.send(runs, {**LONG_GENERATION, "stream": True})
            server.wait_for(running=2, waiting=0)
            with server.connect() as waits:
                server.send(waits, LONG_GENERATION)
                server.wait_for(running=2, waiting=1)
            server.wait_for(running=2, waiting=0)
        server.wait_for(running=1, waiting=0)
        assert not stays.done(), "it was too short to show anything"
        assert stays.result()[0] == 200
    assert server.get("/health")[1]["running"] == 0


def test_the_stream_has_the_pieces_and_then_the_whole(server):
    body = {"prefix": "解释", "max_gen_len": 12, "temperature": 0}
    events = server.post("/generate", {**body, "stream": True})[2].split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    *pieces, last = [json.loads(event.removeprefix("data: ")) for event in events[:-2]]
    assert last == generate(server, body)[1]
    assert "".join(piece["text"] for piece in pieces) == last["generated_text"]


def test_uvicorn_alone_serves_the_application_too(model_path):
    """As its documentation shows: settings from the environment, and Ctrl-C ends it."""
    command = [sys.executable, "-m", "uvicorn", "inference.api_service:app", "--no-access-log"]
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = f"http://127.0.0.1:{listener.getsockname()[1]}"
        environment = {**os.environ, "MODEL_PATH": str(model_path), "NUM_THREADS": "1"}
        process = subprocess.Popen(
            [*command, "--fd", str(listener.fileno())], cwd=REPOSITORY, env=environment, pass_fds=[listener.fileno()]
        )
    try:
        with urllib.request.urlopen(address + "/health", timeout=60) as response:
            assert json.load(response)["status"] == "healthy"
    finally:
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=60) == 0


# --- settings -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        *((name, value) for name in ("NUM_THREADS", "MAX_QUEUE", "MAX_BATCH") for value in ("many", "-1", "1.5")),
        ("NUM_THREADS", "100000"),
        ("NUM_THREADS", "99999999999999999999"),
        ("MAX_BATCH", "0"),
        ("REQUEST_TIMEOUT", "nan"),
        ("LOG_FORMAT", "xml"),
    ],
)
def test_settings_that_are_not_allowed_are_refused_by_name(model_path, variable, value):
    with pytest.raises(UserError, match=f"{variable}.*{value}"):
        ServiceSettings.read([], {"MODEL_PATH": str(model_path), variable: value})


def test_options_win_over_the_environment_and_keys_are_not_shown(model_path):
    environment = {"MODEL_PATH": str(model_path), "MAX_BATCH": "3", "MAX_QUEUE": "5", "API_KEY": "secret,two"}
    settings = ServiceSettings.read(["--max_batch", "4"], environment)
    assert (settings.max_batch, settings.max_queue, settings.api_key) == (4, 5, ["secret", "two"])
    assert "secret" not in settings.described() and "max_batch            4" in settings.described()


def test_the_best_model_that_training_left_is_served_by_default(tmp_path):
    with pytest.raises(UserError, match="MODEL_PATH"):
        model_to_serve(None, tmp_path)
    for name in ("pretrain/pretrain_best.pth", "sft/sft_best_int8.pth", "sft/sft_best.pth", "rlhf/ppo_best.pth"):
        path = tmp_path / "models" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        assert model_to_serve(None, tmp_path)[0] == str(path)
    assert model_to_serve(str(path), tmp_path)[0] == str(path)


@pytest.mark.parametrize(("pays", "chosen"), [(True, "ppo_best_int8.pth"), (False, "ppo_best.pth")])
def test_int8_is_preferred_within_a_stage_where_it_pays(tmp_path, pays, chosen):
    folder = tmp_path / "models" / "rlhf"
    folder.mkdir(parents=True)
    (folder / "ppo_best.pth").touch()
    found = {"pays": pays, "speedup": 1.42, "perplexity_rise": 0.001}
    torch.save({"quantizer": found}, folder / "ppo_best_int8.pth")
    path, reason = model_to_serve(None, tmp_path)
    assert Path(path).name == chosen
    assert "1.42 times the speed" in reason and "+0.10%" in reason
