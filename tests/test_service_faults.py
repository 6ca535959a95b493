"""What clients, operators and models do wrong, and that the service stands it: by real sockets and real processes."""

import json
import logging
import os
import re
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import psutil
import pytest
import torch
from served import LONG_GENERATION, REPOSITORY, Server, read_response, running, save_random_model

from command_line import UserError
from inference.api_service import main
from inference.service.bodies import parse_json, validated
from inference.service.errors import ApiError
from inference.service.logs import LineFormatter, one_line
from inference.service.model_server import ServedModel
from inference.service.rate_limit import RateLimit
from inference.service.requests import ChatRequest, GenerateRequest
from inference.service.settings import ServiceSettings

CONFORMANCE = ("not_a_server_error",) + tuple(f"{what}_conformance" for what in ("status_code", "content_type"))
CONFORMANCE += ("response_schema_conformance",)
ENDLESS = {"prefix": "a", "max_gen_len": 4096, "ignore_eos": True, "overflow": "slide"}
SHORT = {"prefix": "a", "max_gen_len": 2}


@pytest.fixture(scope="module")
def model_path(tmp_path_factory):
    """A small random model."""
    return save_random_model(tmp_path_factory.mktemp("models") / "sft_best.pth")


@pytest.fixture(scope="module")
def server(model_path, tmp_path_factory):
    """A running service with little patience, few places and an admin's key."""
    log = tmp_path_factory.mktemp("log") / "log"
    options = ["--header_timeout", "0.5", "--body_timeout", "0.5", "--idle_timeout", "0.5", "--admin_key", "secret"]
    places = ["--max_batch", "4", "--max_queue", "4", "--cors_origin", "https://example.org"]
    with running(log, "--model_path", str(model_path), *options, *places) as server:
        yield server
        assert "Traceback" not in server.text


# --- what comes in ---------------------------------------------------------------------------------------------------

HOSTILE = {
    "bad keys": lambda: {"prefix": "a", "logit_bias": {f"a{i}": "" for i in range(95_000)}},
    "bad values": lambda: {"prefix": "a", "logit_bias": {str(i): "" for i in range(95_000)}},
    "unknown fields": lambda: {"prefix": "a", **{f"f{i}": 0 for i in range(95_000)}},
    "empty lists": lambda: {"prefix": "a", "stop": [[]] * 100_000},
    "bad stops": lambda: {"prefix": "a", "stop_token_ids": [""] * 200_000},
    "bad messages": lambda: {"messages": [{}] * 200_000},
    "bad parts": lambda: {"messages": [{"role": "user", "content": [{}] * 200_000}]},
    "bad calls": lambda: {"messages": [{"role": "assistant", "tool_calls": [{}] * 99_000}]},
    "bad prompts": lambda: {"messages": [{"role": "user", "content": "a"}], "tools": [{}] * 99_000},
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_body_full_of_mistakes_costs_no_more_than_reading_it_some_times(kind):
    """All of them would be described else, at ten times this price."""
    data = HOSTILE[kind]()
    body = json.dumps(data).encode()
    model = ChatRequest if "messages" in data else GenerateRequest
    began = time.process_time()
    for _ in range(3):
        json.loads(body)
    reading, began = (time.process_time() - began) / 3, time.process_time()
    with pytest.raises(ApiError) as refused:
        validated(parse_json(body), model)
    assert time.process_time() - began < 10 * reading + 0.01
    assert len(refused.value.message) < 500


@pytest.mark.parametrize("penalty", [0.1, 10])
def test_no_allowed_number_makes_the_numbers_of_the_model_infinite(server, penalty):
    extremes = {"repetition_penalty": penalty, "temperature": 1e-320, "min_p": 1e-320, "top_p": 1e-320}
    more = {"presence_penalty": -2, "frequency_penalty": -2, "logit_bias": {str(i): 100 for i in range(300)}}
    assert server.post("/generate", {"prefix": "a" * 500, "max_gen_len": 50, **extremes, **more})[0] == 200
    assert server.post("/generate", {**SHORT, "temperature": 2, "repetition_penalty": penalty})[0] == 200


def test_a_body_without_a_type_is_taken_and_one_of_another_type_is_told_so(server):
    with server.connect() as connection:
        connection.sendall(b'POST /generate HTTP/1.1\r\nHost: x\r\nContent-Length: 14\r\n\r\n{"prefix":"a"}')
        assert read_response(connection)[0] == 200
    status, _, content = server.post("/generate", SHORT, Content_Type="application/x-www-form-urlencoded")
    assert status == 415 and "Content-Type: application/json" in content["error"]["message"]


def test_an_answer_that_is_cut_has_whole_characters_and_says_so(server):
    """Only the first byte of a character may be written."""
    tokens = server.post("/tokenize", {"prompt": "界", "add_special_tokens": False})[2]["tokens"]
    body = {"prefix": "a", "max_gen_len": 1, "logit_bias": {str(tokens[0]): 100}}
    expected = {"prefix": "a", "generated_text": "", "finish_reason": "length"}
    assert server.post("/generate", body)[2] == expected
    assert json.dumps(expected, separators=(",", ":")) in server.post("/generate", {**body, "stream": True})[2]


@pytest.mark.parametrize("path", ["/docs/..%2f..%2fLICENSE", "/docs/../../LICENSE", "/..%2f..%2fetc%2fpasswd"])
def test_no_path_leads_out_of_the_service(server, path):
    status, content = server.get(path)
    assert status == 404 and set(content["error"]) == {"message", "type", "param", "code"}


def test_texts_are_in_the_log_only_where_that_was_asked_for(server, model_path, tmp_path):
    secret = {**SHORT, "prefix": "a very\nprivate question"}
    assert server.post("/generate", secret)[0] == 200
    assert "private" not in server.text
    with running(tmp_path / "log", "--model_path", str(model_path), "--log_texts", "--log_format", "json") as asked:
        assert asked.post("/generate", secret, X_Request_Id="mine")[0] == 200
        lines = [json.loads(line) for line in asked.text.splitlines() if line.startswith("{")]
    (line,) = [line for line in lines if line["message"] == "texts"]
    assert line["request_id"] == "mine" and "a very\nprivate question" in line["prompt"] and "answer" in line


def test_nothing_that_a_client_sends_begins_a_line_of_the_log(server):
    server.get("/x%0a2026-01-01T00:00:00.000Z%20ERROR%20forged%e2%80%a8forged", X_Request_Id="a b\x7f")
    named = server.call("/health", None, X_Request_Id="mine-7")
    assert named[1]["x-request-id"] == "mine-7"
    lines = server.text.splitlines()
    assert not [line for line in lines if line.startswith("forged") or "ERROR forged" in line[:40]]
    assert [line for line in lines if "\\n2026-01-01" in line]
    assert one_line("界 a\r\n\u2028\x1b[0m") == "界 a\\r\\n\\u2028\\u001b[0m"


def test_a_log_of_objects_has_one_a_line(caplog):
    try:
        raise ValueError("first\nsecond")
    except ValueError:
        caplog.records.append(record := logging.makeLogRecord({"msg": "a\nb", "exc_info": sys.exc_info()}))
    record.fields = {"path": 'x" y\n'}
    line = LineFormatter(as_json=True).format(record)
    assert "\n" not in line and json.loads(line)["path"] == 'x" y\n'
    text = LineFormatter(as_json=False).format(record).splitlines()
    assert all(line.startswith("    ") for line in text[1:])


def test_whatever_the_document_allows_gets_an_answer_that_the_document_names(server):
    """No 5xx, no status, type or shape of an answer that is not there: asked by Schemathesis."""
    schemathesis = pytest.importorskip("schemathesis", reason="of Python 3.11 and later")
    from hypothesis import HealthCheck, given, settings
    from schemathesis import checks

    checks.load_all_checks()
    wanted = [checks.CHECKS.get_one(name) for name in CONFORMANCE]
    seen = set()

    def ask(case):
        response = case.call_and_validate(checks=wanted)
        seen.add((case.method, case.path, response.status_code))

    few = settings(max_examples=6, deadline=None, database=None, derandomize=True, suppress_health_check=HealthCheck)
    for operation in schemathesis.openapi.from_url(server.url + "/openapi.json").get_all_operations():
        few(given(operation.ok().as_strategy())(ask))()
    assert len({path for _, path, _ in seen}) >= 10
    assert {200, 400} <= {status for _, _, status in seen} and max(status for _, _, status in seen) < 500


# --- connections -----------------------------------------------------------------------------------------------------


def test_bytes_behind_a_request_do_not_hide_that_the_client_has_left(server):
    """As many clients as there are places; all of them send more, and close."""
    for _ in range(8):
        with server.connect() as connection:
            server.send(connection, ENDLESS, behind=b"x" * 50_000)
    server.wait_for(running=0, waiting=0)
    assert server.post("/generate", SHORT)[0] == 200


def test_a_client_that_sends_without_end_behind_its_request_is_sent_away(server):
    with server.connect() as connection:
        server.send(connection, ENDLESS)
        server.wait_for(running=1)
        with pytest.raises(OSError):  # noqa: PT012  the connection breaks at some point
            while True:
                connection.sendall(b"x" * 65536)
    server.wait_for(running=0)


def test_requests_that_are_sent_ahead_are_answered_in_turn(server):
    content = json.dumps(SHORT).encode()
    head = f"POST /generate HTTP/1.1\r\nHost: x\r\nContent-Length: {len(content)}\r\n\r\n".encode()
    with server.connect() as connection:
        connection.sendall((head + content) * 3)
        assert [read_response(connection)[0] for _ in range(3)] == [200] * 3


def test_who_says_nothing_or_half_is_sent_away(server):
    with server.connect() as silent, server.connect() as half_a_head, server.connect() as half_a_body:
        half_a_head.sendall(b"POST /generate HT")
        half_a_body.sendall(b'POST /generate HTTP/1.1\r\nHost: x\r\nContent-Length: 99\r\n\r\n{"prefix"')
        assert silent.recv(1) == b""
        assert read_response(half_a_head)[0] == 408
        status, content = read_response(half_a_body)
        assert status == 408 and "0.5 seconds" in content["error"]["message"]
    with server.connect() as idle:
        idle.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
        assert read_response(idle)[0] == 200
        assert idle.recv(1) == b""


def test_what_is_no_http_is_told_so_in_the_one_shape(server):
    with server.connect() as connection:
        connection.sendall(b"\x16\x03\x01 hello\r\n\r\n")
        status, content = read_response(connection)
        assert status == 400 and content["error"]["type"] == "invalid_request_error"


def test_a_burst_is_answered_to_the_last_socket(server):
    def ask(_):
        return server.post("/generate", SHORT)[0]

    with ThreadPoolExecutor(64) as pool:
        statuses = list(pool.map(ask, range(400)))
    assert set(statuses) <= {200, 429} and 200 in statuses
    assert server.get("/health")[0] == 200
    metrics = server.get("/metrics")[1]
    refused = float(re.search(r'requests_rejected_total\{[^}]*reason="queue_full"[^}]*\} (\S+)', metrics)[1])
    assert refused >= statuses.count(429)


def test_a_request_that_finds_the_line_full_is_told_so_past_all_layers_and_may_ask_again(server):
    """Also where it comes in two halves, which then goes the whole way."""
    with ExitStack() as stack:
        for _ in range(8):
            server.send(stack.enter_context(server.connect()), ENDLESS)
        server.wait_for(running=4, waiting=4)
        content = json.dumps(SHORT).encode()
        head = f"POST /generate HTTP/1.1\r\nHost: x\r\nContent-Length: {len(content)}\r\n\r\n".encode()
        connection = stack.enter_context(server.connect())
        for parts in ([head + content], [head, content], [head + content]):
            for part in parts:
                connection.sendall(part)
                time.sleep(0.05 * (len(parts) - 1))  # so that they arrive as two
            status, answer = read_response(connection)
            assert (status, answer["error"]["code"]) == (429, "queue_full")
        connection.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
        assert read_response(connection)[0] == 200
        leaving = stack.enter_context(server.connect())
        leaving.sendall(head.replace(b"Host: x", b"Host: x\r\nConnection: close") + content)
        assert read_response(leaving)[0] == 429 and leaving.recv(1) == b""  # as it asked for
    server.wait_for(running=0, waiting=0)


def test_few_open_files_are_enough(model_path, tmp_path):
    """Silent sockets beyond the limit make room for those who speak; places that are all busy are said to be so."""
    limit = ["bash", "-c", 'ulimit -n 160; exec "$@"', "x"]
    options = ["--model_path", str(model_path), "--max_connections", "500", "--request_timeout", "0.2"]
    with running(tmp_path / "log", *options, wrap=limit) as server:
        silent = [server.connect() for _ in range(300)]
        assert server.get("/health")[0] == 200
        status, _, content = server.post("/generate", ENDLESS)  # which its deadline ends
        assert (status, content["finish_reason"]) == (200, "length")
        for connection in silent:
            connection.close()
        assert len(server.text) < 20_000 and "Traceback" not in server.text


def test_connections_that_are_all_busy_leave_no_room_for_more(model_path, tmp_path):
    options = ["--model_path", str(model_path), "--max_connections", "2"]
    with running(tmp_path / "log", *options) as server, server.connect() as first, server.connect() as second:
        server.send(first, {**ENDLESS, "stream": True})
        server.send(second, {**ENDLESS, "stream": True})
        assert first.recv(1) and second.recv(1)  # both are being answered
        with server.connect() as third:
            status, content = read_response(third)
            assert status == 503 and "too many connections" in content["error"]["message"]
        first.close()


# --- the life of the service -----------------------------------------------------------------------------------------


def test_health_answers_before_the_model_is_loaded_and_sigterm_ends_what_takes_too_long(model_path, tmp_path):
    server = Server(tmp_path / "log", "--model_path", str(model_path), "--shutdown_timeout", "0.3")
    try:
        status, health = server.get("/health")
        assert (status, health["status"], health["model_status"]) == (200, "healthy", "loading")
        status, headers, content = server.post("/generate", SHORT)
        assert (status, content["error"]["code"]) == (503, "service_unavailable") and headers["Retry-After"]
        assert server.get("/ready")[0] == 503
        server.wait_until_ready()
        with ThreadPoolExecutor(2) as pool:
            whole = pool.submit(server.post, "/generate", ENDLESS)
            streamed = pool.submit(server.post, "/generate", {**ENDLESS, "stream": True})
            server.wait_for(running=2)
            assert server.stop(signal.SIGTERM) == 0
            status, headers, content = whole.result()
            assert status == 503 and headers["Retry-After"] and "stopping" in content["error"]["message"]
            assert '"type":"server_error"' in streamed.result()[2].split("\n\n")[-2]
        assert "Traceback" not in server.text and "2 answers are not complete" in server.text
    finally:
        server.process.kill()


def test_a_dead_engine_is_said_and_ends_the_process(model_path, tmp_path):
    """A mistake in the engine is put in place of its plan, once the service answers."""
    code = (
        "import sys, inference.engine as e, inference.api_service as s\n"
        "plan = e.Engine._plan\n"
        "def broken(self):\n"
        "    if any(len(r.prompt_ids) > 100 for r in self.running): raise RuntimeError('a mistake')\n"
        "    return plan(self)\n"
        "e.Engine._plan = broken\n"
        "s.main(sys.argv[4:])"
    )
    script = tmp_path / "broken.py"
    script.write_text(f"import sys; sys.path.insert(0, {str(REPOSITORY)!r})\n{code}")
    server = Server(tmp_path / "log", "--model_path", str(model_path), wrap=[sys.executable, str(script)])
    try:
        server.wait_until_ready()
        status, _, content = server.post("/generate", {"prefix": "x" * 200})
        assert status == 503 and "internal error" in content["error"]["message"]
        status, content = server.get("/health")
        assert status == 503 and "stopped" in content["error"]["message"]
        assert server.process.wait(timeout=60) == 1
    finally:
        server.process.kill()


def test_workers_share_the_port_and_one_that_is_killed_is_replaced(model_path, tmp_path):
    with running(tmp_path / "log", "--model_path", str(model_path), "--workers", "2") as server:
        deadline = time.monotonic() + 240
        while server.text.count(" serving ") < 2:
            assert time.monotonic() < deadline, server.text
            time.sleep(0.05)
        first, second = (process.pid for process in psutil.Process(server.process.pid).children() if is_worker(process))
        os.kill(first, signal.SIGKILL)
        for _ in range(8):
            assert server.post("/generate", SHORT)[0] == 200
        while server.text.count(" serving ") < 3 or f'worker="{first}"' in server.get("/metrics")[1]:
            assert time.monotonic() < deadline, server.text
        metrics = server.get("/metrics")[1]
        assert f'vllm:num_requests_running{{model_name="sft_best",worker="{second}"}}' in metrics
        assert metrics.count("# TYPE vllm:num_requests_running gauge") == 1
        assert f"worker {first} has ended" in server.text


def is_worker(process):
    """Python's own tracker of resources is a child of the first process, too."""
    return "spawn_main" in " ".join(process.cmdline())


def test_another_model_is_served_without_dropping_a_request(server, model_path, tmp_path):
    other = tmp_path / "other.pth"
    other.write_bytes(model_path.read_bytes())
    assert server.post("/admin/reload", {})[0] == 401
    key = {"Authorization": "Bearer secret"}
    status, _, content = server.post("/admin/reload", {"model_path": "nowhere.pth"}, **key)
    assert status == 400 and "nowhere.pth" in content["error"]["message"]
    with ThreadPoolExecutor(3) as pool:
        long = pool.submit(server.post, "/generate", LONG_GENERATION)
        server.wait_for(running=1)
        status, _, content = server.post("/admin/reload", {"model_path": str(other)}, **key)
        assert (status, content["model_path"]) == (200, str(other))
        assert server.post("/generate", SHORT)[0] == 200
        assert long.result()[0] == 200
    assert server.get("/health")[1]["model_path"] == str(other)


def test_pages_of_named_origins_may_call_and_others_not(server):
    asked = {"Access_Control_Request_Method": "POST", "Access_Control_Request_Headers": "content-type"}
    allowed = server.call("/health", None, Origin="https://example.org")[1]
    assert allowed["access-control-allow-origin"] == "https://example.org"
    other = server.call("/health", None, Origin="https://example.com", **asked)[1]
    assert "access-control-allow-origin" not in other


def test_rates_fill_evenly():
    limit = RateLimit(2)
    assert [limit.wait("a", 0), limit.wait("a", 0), limit.wait("b", 0)] == [0, 0, 0]
    assert limit.wait("a", 0) == pytest.approx(30)
    assert limit.wait("a", 29) == pytest.approx(1)
    assert limit.wait("a", 31) == 0
    assert RateLimit(0).wait("a", 0) == 0


# --- the start -------------------------------------------------------------------------------------------------------


def checkpoint_of(model_path, path, spoil):
    """A checkpoint with something wrong."""
    content = torch.load(model_path, weights_only=True)
    spoil(content)
    torch.save(content, path)
    return path


def no_number(content):
    content["model"] = {name: weight.clone() for name, weight in content["model"].items()}
    content["model"]["final_norm.weight"][3] = float("nan")


@pytest.mark.parametrize("command", [["inference.api_service"], ["uvicorn", "inference.api_service:app"]])
def test_a_start_that_cannot_work_ends_with_one_sentence_and_status_2(model_path, tmp_path, command):
    damaged = checkpoint_of(model_path, tmp_path / "nan.pth", no_number)
    result = subprocess.run(
        [sys.executable, "-m", *command, "--port", "0"],
        cwd=REPOSITORY,
        env={**os.environ, "MODEL_PATH": str(damaged)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert result.returncode == 2
    assert "error: " in result.stderr.splitlines()[-1]
    assert "nan.pth is damaged: final_norm.weight holds NaN or infinity" in result.stderr.splitlines()[-1]
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ("--model_path nowhere.pth", "nowhere.pth does not exist"),
        ("--device meta", "'meta' is not available"),
        ("--device nonsense", "'nonsense' is not available"),
        ("--port TAKEN", "cannot listen on 127.0.0.1, port"),
        ("--host 203.0.113.7", "cannot listen on 203.0.113.7"),
        ("--num_threads 100000", "--num_threads must be"),
        ("--max_batch 0", "--max_batch must be"),
    ],
)
def test_impossible_settings_are_refused_in_one_sentence(model_path, options, expected):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        options = options.replace("TAKEN", str(taken.getsockname()[1]))
        with pytest.raises(UserError, match=re.escape(expected)):
            main(["--model_path", str(model_path), *options.split()])


@pytest.mark.parametrize("tokenizer", [None, {}, {"files": {}}])
def test_a_checkpoint_without_a_tokenizer_is_told_so(model_path, tmp_path, tokenizer):
    path = checkpoint_of(model_path, tmp_path / "bare.pth", lambda content: content.update(tokenizer=tokenizer))
    with pytest.raises(UserError, match="bare.pth holds no tokenizer"):
        ServedModel(str(path), ServiceSettings.read([], {"MODEL_PATH": str(path)}))
