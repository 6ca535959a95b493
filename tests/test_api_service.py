"""The generation service: its contract, what it refuses and how, and that a busy model blocks nobody."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from fastapi.testclient import TestClient

from byte_level_bpe import ByteLevelBPETokenizer
from checkpoint import load_model, save_checkpoint
from command_line import UserError
from gpt_model import GPTConfig, GPTModel
from inference.api_service import (
    MAX_BODY_BYTES,
    MAX_PREFIX_CHARACTERS,
    GenerateRequest,
    ServiceSettings,
    app,
    model_to_serve,
)
from inference.quantizer import quantize_model_int8, save_quantized_model
from inference.sampling import SamplingParams

REPOSITORY = Path(__file__).parent.parent
CONTEXT = 2048
LONG_GENERATION = {"prefix": "解释", "max_gen_len": 1900, "temperature": 0}  # a second or two


@pytest.fixture(scope="module")
def model_path(tmp_path_factory):
    """A checkpoint with a small trained tokenizer and random weights, as an instruction-tuned model."""
    torch.manual_seed(0)
    tokenizer = ByteLevelBPETokenizer(320)
    tokenizer.train(["解释什么是机器学习。 What is machine learning?"] * 4)
    config = GPTConfig.for_architecture(
        "modern", vocab_size=tokenizer.vocab_size, d_model=64, n_layers=3, n_heads=2, max_seq_len=CONTEXT
    )
    path = tmp_path_factory.mktemp("models") / "sft_best.pth"
    state = GPTModel.from_config(config).state_dict()
    return save_checkpoint(path, model_state=state, config=config, tokenizer=tokenizer, stage="sft")


@pytest.fixture(scope="module")
def client(model_path):
    """The application in this process, with its model loaded."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MODEL_PATH", str(model_path))
        patch.setenv("NUM_THREADS", "1")
        with TestClient(app, raise_server_exceptions=False) as client:
            yield client


def uvicorn(environment, **options):
    """A real server process as users start it; it inherits a listening socket, so no port has to be guessed."""
    command = [sys.executable, "-m", "uvicorn", "inference.api_service:app", "--no-access-log"]
    with socket.create_server(("127.0.0.1", 0)) as listener:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        process = subprocess.Popen(
            [*command, "--fd", str(listener.fileno())],
            cwd=REPOSITORY,
            env={**os.environ, **environment},
            pass_fds=[listener.fileno()],
            **options,
        )
    return process, url


@contextmanager
def running_server(model_path, **environment):
    process, url = uvicorn({"MODEL_PATH": str(model_path), "NUM_THREADS": "1", **environment})
    try:
        get(url + "/health")  # connections wait in the listening socket until the server is up
        yield url
    finally:
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=60) == 0, "the server did not end cleanly after Ctrl-C"


@pytest.fixture(scope="module")
def server(model_path):
    """The URL of a running service that computes two requests together while two more wait."""
    with running_server(model_path, MAX_BATCH="2", MAX_QUEUE="2") as url:
        yield url


def get(url):
    with urllib.request.urlopen(url, timeout=60) as response:
        return json.load(response)


def post(url, body):
    """Status, headers and JSON body of the answer to POST /generate."""
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(url + "/generate", json.dumps(body).encode(), headers)
    try:
        with urllib.request.urlopen(request, timeout=60) as response:
            return response.status, response.headers, json.load(response)
    except urllib.error.HTTPError as error:
        return error.code, error.headers, json.load(error)


def wait_for(url, **counts):
    """Poll /health until `running` and `waiting` are as given."""
    deadline = time.monotonic() + 30
    while not counts.items() <= (state := get(url + "/health")).items():
        assert time.monotonic() < deadline, f"expected {counts}, the service says {state}"
    return state


# --- the contract ---------------------------------------------------------------------------------------------------


def test_generate_answers_with_the_prefix_and_the_generated_text(client):
    request = {"prefix": "解释什么是机器学习", "max_gen_len": 20, "top_k": 50, "temperature": 0.8}
    response = client.post("/generate", json=request)
    assert response.status_code == 200
    assert response.headers["content-type"] == "application/json"
    assert set(response.json()) == {"prefix", "generated_text"}
    assert response.json()["prefix"] == "解释什么是机器学习"
    assert response.json()["generated_text"]
    assert "解释什么是机器学习".encode() in response.content, "Chinese is sent as UTF-8, not as escapes"


def test_only_the_prefix_is_required_and_the_defaults_are_the_documented_ones(client):
    request = GenerateRequest(prefix="a")
    assert (request.max_gen_len, request.top_k, request.temperature, request.seed) == (100, 50, 0.8, None)
    assert client.post("/generate", json={"prefix": "a"}).status_code == 200


def test_health_says_what_is_served(client, model_path):
    health = client.get("/health").json()
    assert health["status"] == "ok"
    assert (health["model_path"], health["stage"], health["device"]) == (str(model_path), "sft", "cpu")
    assert (health["running"], health["waiting"], health["max_seq_len"]) == (0, 0, CONTEXT)
    assert health["parameters"] > 100_000 and health["uptime_seconds"] >= 0


def test_documentation_describes_requests_and_errors(client):
    assert client.get("/docs").status_code == 200
    description = client.get("/openapi.json").json()
    responses = description["paths"]["/generate"]["post"]["responses"]
    for status in ("400", "413", "422", "503"):
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
        health = client.get("/health").json()
        assert (health["quantization"], health["parameters"]) == ("int8", model.num_parameters())
        assert client.post("/generate", json={"prefix": "a", "max_gen_len": 8}).status_code == 200


# --- what it refuses ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "status", "expected"),
    [
        (b"", 422, "JSON object"),
        (b"{", 400, "not valid JSON"),
        (b"null", 422, "JSON object"),
        (b"[]", 422, "JSON object"),
        (b'"text"', 422, "JSON object"),
        (b"\xff\xfe", 400, "body"),
        (b"[" * 100_000, 400, "body"),
        (b"{}", 422, "prefix"),
        (b'{"prefix": null}', 422, "prefix"),
        (b'{"prefix": 5}', 422, "prefix"),
        (b'{"prefix": ""}', 422, "prefix"),
        (b'{"prefix": "\\ud800"}', 422, "prefix"),
        (b'{"prefix": "a", "\\ud800": 1}', 422, ""),
        (b'{"prefix": "a", "max_new_tokens": 5}', 422, "max_new_tokens"),
        (b'{"prefix": "a", "max_gen_len": 0}', 422, "max_gen_len"),
        (b'{"prefix": "a", "max_gen_len": -1}', 422, "max_gen_len"),
        (b'{"prefix": "a", "max_gen_len": 1000000}', 422, "max_gen_len"),
        (b'{"prefix": "a", "max_gen_len": true}', 422, "max_gen_len"),
        (b'{"prefix": "a", "max_gen_len": "5"}', 422, "max_gen_len"),
        (b'{"prefix": "a", "max_gen_len": 5.5}', 422, "max_gen_len"),
        (b'{"prefix": "a", "max_gen_len": 1' + b"0" * 5000 + b"}", 400, "body"),
        (b'{"prefix": "a", "top_k": -1}', 422, "top_k"),
        (b'{"prefix": "a", "top_k": true}', 422, "top_k"),
        (b'{"prefix": "a", "top_k": 1e999}', 422, "top_k"),
        (b'{"prefix": "a", "temperature": -0.1}', 422, "temperature"),
        (b'{"prefix": "a", "temperature": 2.1}', 422, "temperature"),
        (b'{"prefix": "a", "temperature": true}', 422, "temperature"),
        (b'{"prefix": "a", "temperature": "0.5"}', 422, "temperature"),
        (b'{"prefix": "a", "temperature": null}', 422, "temperature"),
        (b'{"prefix": "a", "temperature": NaN}', 422, "temperature"),
        (b'{"prefix": "a", "temperature": Infinity}', 422, "temperature"),
        (b'{"prefix": "a", "temperature": 1' + b"0" * 400 + b"}", 422, "temperature"),
        (
            b'{"prefix": "a", "top_k": 400}',
            422,
            "the size of the vocabulary",
        ),
        (b'{"prefix": "a", "top_p": 0}', 422, "top_p"),
        (b'{"prefix": "a", "top_p": NaN}', 422, "top_p"),
        (b'{"prefix": "a", "min_p": 1.5}', 422, "min_p"),
        (b'{"prefix": "a", "repetition_penalty": 0}', 422, "repetition_penalty"),
        (b'{"prefix": "a", "presence_penalty": -3}', 422, "presence_penalty"),
        (b'{"prefix": "a", "frequency_penalty": "1"}', 422, "frequency_penalty"),
        (b'{"prefix": "a", "logit_bias": {"a": 1}}', 422, "logit_bias"),
        (b'{"prefix": "a", "logit_bias": {"400": 1}}', 422, "logit_bias has 400"),
        (b'{"prefix": "a", "logit_bias": {"5": NaN}}', 422, "logit_bias"),
        (b'{"prefix": "a", "banned_tokens": [-1]}', 422, "banned_tokens"),
        (b'{"prefix": "a", "banned_tokens": [400]}', 422, "banned_tokens has 400"),
        (b'{"prefix": "a", "stop": ""}', 422, "stop"),
        (b'{"prefix": "a", "stop": ["b", ""]}', 422, "stop"),
        (b'{"prefix": "a", "stop": [1]}', 422, "stop"),
        (b'{"prefix": "a", "stop_token_ids": [400]}', 422, "stop_token_ids has 400"),
        (b'{"prefix": "a", "ignore_eos": 1}', 422, "ignore_eos"),
        (b'{"prefix": "a", "overflow": "wrap"}', 422, "overflow"),
        (b'{"prefix": "a", "seed": -1}', 422, "seed"),
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
    assert set(response.json()) == {"error"} and set(response.json()["error"]) == {"message"}
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
    engine, seen = client.app_state["service"].engine, []
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
    tokenizer = client.app_state["service"].tokenizer
    x = tokenizer.encode("x", add_special_tokens=False)["input_ids"][0]
    others = [token for token in range(tokenizer.vocab_size) if token != x]
    assert text(banned_tokens=others, max_gen_len=5) == "xxxxx"
    assert text(banned_tokens=others, max_gen_len=5, stop_token_ids=[x]) == ""


def test_a_step_that_fails_is_reported_to_its_client_and_the_next_request_is_served(client, monkeypatch):
    engine, request = client.app_state["service"].engine, {"prefix": "a", "max_gen_len": 4, "temperature": 0}
    expected = client.post("/generate", json=request).json()

    def broken(*args, **more):
        raise RuntimeError("the model failed")

    with monkeypatch.context() as patch:
        patch.setattr(engine, "forward", broken)
        response = client.post("/generate", json=request)
        assert response.status_code == 500
        assert "the model failed" in response.json()["error"]["message"]
    assert client.post("/generate", json=request).json() == expected


def test_numbers_that_are_not_finite_are_reported_and_the_next_request_is_served(client):
    model, request = client.app_state["service"].model, {"prefix": "a", "max_gen_len": 4, "temperature": 0}
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
        engine, seen = client.app_state["service"].engine, []
        compute = engine.forward

        def recording(*args, **more):
            seen.append((threading.current_thread().name, torch.get_num_threads()))
            return compute(*args, **more)

        monkeypatch.setattr(engine, "forward", recording)
        client.post("/generate", json={"prefix": "a", "max_gen_len": 2})
    assert set(seen) == {("engine", 2)}


# --- a real server --------------------------------------------------------------------------------------------------


def test_health_is_quick_while_the_model_computes(server):
    with ThreadPoolExecutor(1) as pool:
        generation = pool.submit(post, server, LONG_GENERATION)
        wait_for(server, running=1)
        answers = 0
        while answers < 10 and not generation.done():
            get(server + "/health")
            answers += 1
        assert not generation.done(), f"it ended after {answers} of 10 looks at /health, which has to wait for nothing"
    assert generation.result()[0] == 200


def test_requests_that_meet_in_a_batch_get_the_answers_they_get_alone(server):
    """With settings of their own each; the long one does not have to end first."""
    requests = [
        {"prefix": "机器", "max_gen_len": 24, "temperature": 0},
        {"prefix": "a longer question?", "max_gen_len": 24, "temperature": 1, "seed": 3, "top_p": 0.9},
    ]
    alone = [post(server, request)[2] for request in requests]
    with ThreadPoolExecutor(3) as pool:
        long = pool.submit(post, server, LONG_GENERATION)
        wait_for(server, running=1)
        together = list(pool.map(lambda request: post(server, request)[2], requests))
        assert not long.done()
    assert together == alone
    assert long.result()[0] == 200


def test_a_full_line_is_answered_at_once_with_503_and_a_time_to_come_back(server):
    short = {"prefix": "a", "max_gen_len": 1}
    with ThreadPoolExecutor(4) as pool:
        accepted = [pool.submit(post, server, LONG_GENERATION) for _ in range(2)]
        wait_for(server, running=2)
        accepted += [pool.submit(post, server, short) for _ in range(2)]
        wait_for(server, running=2, waiting=2)
        status, headers, body = post(server, short)
        assert status == 503
        assert int(headers["Retry-After"]) >= 1
        assert "busy" in body["error"]["message"]
        assert [future.result()[0] for future in accepted] == [200] * 4


@contextmanager
def waiting_client(url, body):
    """A client that has asked and does not wait for the answer to be complete."""
    host, port = url.removeprefix("http://").split(":")
    content = json.dumps(body).encode()
    head = f"POST /generate HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content)
        yield


def test_a_client_that_leaves_gives_its_place_to_others_whether_it_waits_or_runs(server):
    with ThreadPoolExecutor(1) as pool:
        stays = pool.submit(post, server, LONG_GENERATION)
        wait_for(server, running=1)
        with waiting_client(server, LONG_GENERATION):
            wait_for(server, running=2, waiting=0)
            with waiting_client(server, LONG_GENERATION):
                wait_for(server, running=2, waiting=1)
            wait_for(server, running=2, waiting=0)
        wait_for(server, running=1, waiting=0)
        assert not stays.done(), "it was too short to show anything"
        assert stays.result()[0] == 200
    assert get(server + "/health")["running"] == 0


def test_locust_finds_nothing_to_complain_about_and_a_stopped_service_finishes_what_it_accepted(model_path):
    script = str(REPOSITORY / "inference" / "load_test.py")
    with ThreadPoolExecutor(1) as pool, running_server(model_path) as url:
        command = [sys.executable, "-m", "locust", "-f", script, "--headless", "-u", "4", "-r", "4", "--json"]
        command += ["--host", url]
        for duration in ("3s", "40s"):  # on a busy machine, the first may end before the first answer
            result = subprocess.run([*command, "-t", duration], capture_output=True, text=True, timeout=120)
            assert result.returncode == 0, result.stdout + result.stderr[-2000:]
            requests = {entry["name"]: entry["num_requests"] for entry in json.loads(result.stdout)}
            if requests.get("/generate", 0) >= 4:
                break
        last = pool.submit(post, url, LONG_GENERATION)
        wait_for(url, running=1)
    assert last.result()[0] == 200
    assert requests["/generate"] >= 4


# --- the start ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"MODEL_PATH": "nowhere.pth"}, "nowhere.pth does not exist"),
        ({"MODEL_PATH": "LICENSE"}, "LICENSE"),
    ],
    ids=["missing model", "not a model"],
)
def test_a_start_that_cannot_work_ends_with_one_sentence(environment, expected):
    process, _ = uvicorn(environment, stderr=subprocess.PIPE, text=True)
    _, errors = process.communicate(timeout=60)
    assert process.returncode != 0
    assert expected in errors
    assert "Traceback" not in errors


def test_damaged_weights_end_the_start_with_one_sentence(model_path, tmp_path):
    checkpoint = torch.load(model_path, weights_only=True)
    state = {name: weight.clone() for name, weight in checkpoint["model"].items()}
    state["final_norm.weight"][3] = float("nan")
    config, tokenizer = GPTConfig(**checkpoint["config"]), load_model(model_path)[1]
    damaged = save_checkpoint(tmp_path / "nan.pth", model_state=state, config=config, tokenizer=tokenizer, stage="sft")
    process, _ = uvicorn({"MODEL_PATH": str(damaged)}, stderr=subprocess.PIPE, text=True)
    _, errors = process.communicate(timeout=60)
    assert process.returncode != 0
    assert "nan.pth is damaged: final_norm.weight holds NaN or infinity" in errors
    assert "Traceback" not in errors


@pytest.mark.parametrize("variable", ["NUM_THREADS", "MAX_QUEUE", "MAX_BATCH"])
@pytest.mark.parametrize("value", ["many", "0", "-1", "1.5"])
def test_settings_that_are_no_counts_are_refused_by_name(monkeypatch, model_path, variable, value):
    monkeypatch.setenv("MODEL_PATH", str(model_path))
    monkeypatch.setenv(variable, value)
    with pytest.raises(UserError, match=f"{variable}.*{value}"):
        ServiceSettings.from_environment()


def test_the_best_model_that_training_left_is_served_by_default(tmp_path):
    with pytest.raises(UserError, match="MODEL_PATH"):
        model_to_serve(None, tmp_path)
    for name in ("pretrain/pretrain_best.pth", "sft/sft_best_int8.pth", "sft/sft_best.pth", "rlhf/ppo_best.pth"):
        path = tmp_path / "models" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        assert model_to_serve(None, tmp_path) == path
    assert model_to_serve(str(path), tmp_path) == path
