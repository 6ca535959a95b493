"""The service under load: against a server that answers one request at a time, in a burst, and for minutes.

    python benchmarks/bench_service.py                            # the model that training left; some minutes
    python benchmarks/bench_service.py --quick                    # does everything work? half a minute
    python benchmarks/bench_service.py --parts load --minutes 10  # 50 Locust users

Every server is a process of its own, as users start it, and has a random model of the sample's size unless
`--model_path` names one. Contestants take turns, and medians count. The tables are followed by one line of JSON;
`--write benchmarks/RESULTS.md` puts them into that page, too.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import psutil  # noqa: E402
import torch  # noqa: E402

from benchmarks.peers import synthetic_tokenizer, write_gguf  # noqa: E402
from benchmarks.tables import Table, about, in_a_sentence, write_section  # noqa: E402
from checkpoint import load_model, save_checkpoint  # noqa: E402
from command_line import UserError, option, parse_config, run_main  # noqa: E402
from gpt_model import GPTConfig, GPTModel  # noqa: E402
from inference.engine import Engine  # noqa: E402
from inference.quantizer import load_any, quantize_model_int8, save_quantized_model  # noqa: E402
from inference.request import encode_prompt  # noqa: E402
from inference.sampling import SamplingParams  # noqa: E402
from inference.service.connections import possible_connections  # noqa: E402
from inference.service.settings import available_cores  # noqa: E402
from inference.service.structured import json_form  # noqa: E402

PARTS = ("speed", "llama_cpp", "forms", "burst", "load")
QUESTIONS_EACH = 4  # of a user in a round
PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "age": {"type": "integer"}, "tags": {"type": "array"}},
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}
Result = dict[str, Any]


@dataclass
class ServiceBenchmarkConfig:
    """The command line of the benchmark."""

    model_path: str | None = option(None, "the checkpoint to serve; default: random weights of the sample model's size")
    parts: list[str] = option(list, f"what is measured, of {', '.join(PARTS)}; default: all")
    users: int = option(16, "clients that ask at once", at_least=1)
    new_tokens: int = option(64, "of each answer", at_least=1)
    rounds: int = option(5, "how often the contestants take turns", at_least=1)
    burst: int = option(10_000, "requests that come at once", at_least=1)
    minutes: float = option(10, "how long the Locust users stay", above=0)
    locust_users: int = option(50, "how many they are", at_least=1)
    num_threads: int = option(
        0, "CPU threads of every server; 0: all cores but one, which the event loop has, and all for GPT-2", at_least=0
    )
    quick: bool = option(False, "little of everything: shows that it works, gives no figures to quote")
    xllamacpp_python: str = option(
        sys.executable, "a Python that has xllamacpp, which brings llama.cpp's server, for where no llama-server is"
    )
    write: str = option("", "a Markdown page that takes the tables; empty: none")
    one_at_a_time: int = option(0, "internal: be the server that answers one request at a time, on this port")

    def validate(self) -> list[str]:
        unknown = set(self.parts) - set(PARTS)
        return [f"--parts knows {', '.join(PARTS)}, not {', '.join(sorted(unknown))}"] if unknown else []


def sample_sized_model(folder: Path) -> Path:
    """Random weights of the size of the sample's model, and a tokenizer with as many tokens."""
    tokenizer = synthetic_tokenizer(2048)
    torch.manual_seed(0)
    sizes = dict(vocab_size=tokenizer.vocab_size, d_model=192, n_layers=4, n_heads=4, max_seq_len=512)
    config = GPTConfig.for_architecture("modern", **sizes)
    state = GPTModel.from_config(config).state_dict()
    return save_checkpoint(folder / "random.pth", model_state=state, config=config, tokenizer=tokenizer, stage="sft")


# -- servers -----------------------------------------------------------------------------------------------------------


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextmanager
def server(command: Sequence[str], port: int, ready: str, log: Path) -> Iterator[psutil.Process]:
    """A server's process, from the moment at which it answers."""
    environment = {**os.environ, "OMP_WAIT_POLICY": "passive"}
    with log.open("w") as file:
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=file, stderr=file)
    try:
        end = time.monotonic() + 300
        while True:
            if process.poll() is not None or time.monotonic() > end:
                raise UserError(f"a server did not start: {log.read_text()[-500:]}")
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}{ready}", timeout=5).close()
                break
            except OSError:
                time.sleep(0.1)
        yield psutil.Process(process.pid)
    finally:
        process.terminate()
        process.wait(timeout=60)


LLAMA_SERVER = """
import sys, threading, xllamacpp
path, port, slots, threads = sys.argv[1], *map(int, sys.argv[2:])
params = xllamacpp.CommonParams()
params.model.path, params.port, params.n_parallel, params.n_ctx = path, port, slots, 512 * slots
params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
params.ui = params.fit_params = False
server = xllamacpp.Server(params)
threading.Event().wait()
"""


def our_command(config: ServiceBenchmarkConfig, model: Path, port: int, *options: str) -> list[str]:
    """The service, as users start it."""
    command = [sys.executable, "-m", "inference.api_service", "--model_path", str(model), "--port", str(port)]
    return [*command, "--max_batch", str(config.users), *options]


def threads_of(config: ServiceBenchmarkConfig, large: bool = False) -> str:
    """CPU threads where servers are compared: the service's own default, but all cores for a large model."""
    return str(config.num_threads or (available_cores() if large else max(1, available_cores() - 1)))


def llama_command(config: ServiceBenchmarkConfig, model: Path, port: int) -> list[str] | None:
    """llama.cpp's own server with as many slots as there are users; None where it is not to be had."""
    if binary := shutil.which("llama-server"):
        slots = ["-np", str(config.users), "-c", str(512 * config.users), "--no-webui"]
        threads = ["-t", threads_of(config, large=True), "-tb", threads_of(config, large=True)]
        return [binary, "-m", str(model), "--host", "127.0.0.1", "--port", str(port), *slots, *threads]
    python = config.xllamacpp_python
    if (
        not Path(python).is_file()
        or subprocess.run([python, "-c", "import xllamacpp"], stderr=subprocess.DEVNULL).returncode
    ):
        return None
    return [python, "-c", LLAMA_SERVER, str(model), str(port), str(config.users), threads_of(config, large=True)]


def answer_one_at_a_time(model_path: str, port: int, num_threads: int) -> None:
    """A server for comparison: the same engine and `/generate`, but one request after the other."""
    torch.set_num_threads(num_threads or torch.get_num_threads())
    model, tokenizer, checkpoint = load_any(model_path)
    engine, turn = Engine(model, tokenizer, max_running=1), threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self._reply({"status": "ready"})

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            ids = encode_prompt(tokenizer, body["prefix"], checkpoint["stage"] != "pretrain")
            params = SamplingParams(body["max_gen_len"], temperature=0, ignore_eos=True)
            with turn:
                (generation,) = engine.run([ids], params)
            self._reply({"generated_text": generation.text})

        def _reply(self, content: Result) -> None:
            data = json.dumps(content).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: object) -> None:
            """Nothing is logged, as in the service's own measurement."""

    class Server(ThreadingHTTPServer):
        request_queue_size = 1024

    Server(("127.0.0.1", port), Handler).serve_forever()


def post(url: str, body: Result) -> Result:
    """The answer to a POST."""
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=600) as response:
        return json.load(response)


def tokens_per_second(ask: Callable[[int], object], config: ServiceBenchmarkConfig) -> float:
    """Of all users together, who each ask a few times."""
    n_requests = QUESTIONS_EACH * config.users
    with ThreadPoolExecutor(config.users) as pool:
        began = time.perf_counter()
        list(pool.map(ask, range(n_requests)))
        return n_requests * config.new_tokens / (time.perf_counter() - began)


# -- what is measured --------------------------------------------------------------------------------------------------


def measure_speed(config: ServiceBenchmarkConfig, model: Path, folder: Path) -> tuple[Table, Result]:
    """Many users: the service against a server that answers one request at a time."""
    ports = {"this service": free_port(), "one request at a time": free_port()}
    alone = [sys.executable, __file__, "--one_at_a_time", str(ports["one request at a time"])]
    alone += ["--model_path", str(model), "--num_threads", threads_of(config)]
    commands = {
        "this service": (
            our_command(config, model, ports["this service"], "--num_threads", threads_of(config)),
            "/ready",
        ),
        "one request at a time": (alone, "/"),
    }
    body = {"max_gen_len": config.new_tokens, "temperature": 0, "ignore_eos": True}
    found: dict[str, list[float]] = {name: [] for name in commands}
    with ExitStack() as stack:
        for name, (command, ready) in commands.items():
            stack.enter_context(server(command, ports[name], ready, folder / f"{ports[name]}.log"))
        for round_number in range(config.rounds + 1):
            for name in commands:
                url = f"http://127.0.0.1:{ports[name]}/generate"
                prefixes = [f"{round_number} {number} token" for number in range(QUESTIONS_EACH * config.users)]
                speed = tokens_per_second(lambda n: post(url, {**body, "prefix": prefixes[n]}), config)  # noqa: B023
                if round_number:  # the first one warms up
                    found[name].append(speed)
    medians = {name: statistics.median(values) for name, values in found.items()}
    ratio = statistics.median(a / b for a, b in zip(*found.values(), strict=True))
    rows = [[name, f"{value:,.0f}"] for name, value in medians.items()] + [["ratio (goal: 4)", f"{ratio:.2f}"]]
    note = f"{config.users} users, {config.new_tokens} new tokens an answer, {threads_of(config)} threads for both; "
    note += f"medians of {config.rounds} rounds in turn."
    return Table("Tokens a second over HTTP", note, ["", "tokens/s"], rows), {**medians, "ratio": ratio}


def measure_llama_cpp(config: ServiceBenchmarkConfig, model: Path, folder: Path) -> tuple[Table, Result]:
    """GPT-2's 124 million weights at 8 bits: the service's INT8 against llama.cpp's server with as many slots."""
    title, header = "Beside llama.cpp's server, GPT-2 124M at 8 bits", ["", "tokens/s"]
    ports = [free_port(), free_port()]
    gguf = folder / "gpt2.gguf"
    their_command = llama_command(config, gguf, ports[1])
    if their_command is None:
        note = "Not measured: neither `llama-server` nor the package xllamacpp is here (goal: 1.3 times its speed)."
        return Table(title, note, header, []), {"measured": None}
    torch.manual_seed(0)
    sizes = {} if not config.quick else dict(d_model=64, n_layers=2, n_heads=2)
    plain = GPTModel.from_config(GPTConfig.for_architecture("gpt2", vocab_size=50257, max_seq_len=1024, **sizes)).eval()
    tokenizer = synthetic_tokenizer(50257)
    whole = save_checkpoint(
        folder / "gpt2.pth", model_state=plain.state_dict(), config=plain.config, tokenizer=tokenizer, stage="pretrain"
    )
    loaded, _, checkpoint = load_model(whole)
    ours = save_quantized_model(quantize_model_int8(loaded), folder / "gpt2_int8.pth", checkpoint)
    write_gguf(plain, gguf, "Q8_0")
    commands = [
        (our_command(config, ours, ports[0], "--num_threads", threads_of(config, large=True)), "/ready"),
        (their_command, "/health"),
    ]
    common = {"temperature": 0, "ignore_eos": True}
    bodies = [{"max_tokens": config.new_tokens, **common}, {"n_predict": config.new_tokens, **common}]
    paths, found = ["/v1/completions", "/completion"], [[], []]

    def prompt(number: int) -> list[int]:  # none begins like another one: nothing can be taken from a cache
        return [1000 + number, *range(2000, 2015)]

    with ExitStack() as stack:
        for port, (command, ready) in zip(ports, commands, strict=True):
            stack.enter_context(server(command, port, ready, folder / f"{port}.log"))
        for round_number in range(config.rounds + 1):
            for index, (port, path, body) in enumerate(zip(ports, paths, bodies, strict=True)):
                url, first = f"http://127.0.0.1:{port}{path}", QUESTIONS_EACH * config.users * round_number
                speed = tokens_per_second(lambda n: post(url, {**body, "prompt": prompt(first + n)}), config)  # noqa: B023
                if round_number:
                    found[index].append(speed)
    ratio = statistics.median(a / b for a, b in zip(*found, strict=True))
    names = ("this service", "llama.cpp")
    rows = [[name, f"{statistics.median(speeds):,.0f}"] for name, speeds in zip(names, found, strict=True)]
    note = f"{config.users} users and slots, {threads_of(config, large=True)} threads each; "
    note += f"medians of {config.rounds} rounds in turn."
    return Table(title, note, header, [*rows, ["ratio (goal: 1.3)", f"{ratio:.2f}"]]), {"ratio": ratio}


def measure_forms(config: ServiceBenchmarkConfig, model: Path, folder: Path) -> tuple[Table, Result]:
    """What a token costs more that has to fit into a JSON schema."""
    torch.set_num_threads(config.num_threads or torch.get_num_threads())
    loaded, tokenizer, _ = load_any(model)
    prompts = [[number + 300 for number in range(8)]] * config.users
    began = time.perf_counter()
    form = json_form(tokenizer, PERSON)
    compiling = time.perf_counter() - began
    found: dict[str, list[float]] = {"free": [], "JSON schema": []}
    for _ in range(config.rounds + 1):
        for name, wanted in (("free", None), ("JSON schema", form)):
            engine = Engine(loaded, tokenizer, max_running=config.users)
            params = SamplingParams(config.new_tokens, temperature=1, seed=1, form=wanted, ignore_eos=wanted is None)
            began = time.perf_counter()
            answers = engine.run(prompts, params)
            found[name].append((time.perf_counter() - began) / sum(len(answer.token_ids) for answer in answers) * 1e6)
    medians = {name: statistics.median(values[1:]) for name, values in found.items()}
    cost = medians["JSON schema"] - medians["free"]
    rows = [[name, f"{value:,.0f}"] for name, value in medians.items()] + [["the form's share", f"{cost:,.0f}"]]
    vocabulary = f"vocabulary of {tokenizer.vocab_size}"
    note = f"{config.users} answers at once, {vocabulary}; to read the schema takes {compiling * 1e3:.0f} ms, once."
    figures = {**medians, "cost": cost, "compile_seconds": compiling}
    return Table("Answers of a given form: microseconds a token", note, ["", "µs"], rows), figures


LOOKER = """
import json, sys, threading, time, urllib.request
over, delays = threading.Event(), []
threading.Thread(target=lambda: (sys.stdin.read(), over.set())).start()
while not over.is_set():
    began = time.perf_counter()
    urllib.request.urlopen(f"http://127.0.0.1:{sys.argv[1]}/health", timeout=60).close()
    delays.append(time.perf_counter() - began)
    time.sleep(0.02)
print(json.dumps(sorted(delays)))
"""


async def ask_at_once(port: int, n_requests: int) -> Counter[str]:
    """Open as many connections at once, one request each; what became of them."""
    body = json.dumps({"prefix": "a", "max_gen_len": 4}).encode()
    head = f"POST /generate HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: {len(body)}\r\n\r\n".encode()
    outcomes: Counter[str] = Counter()

    async def ask() -> None:
        try:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(head + body)
            answer = await reader.read()
            outcomes[answer.split(b" ", 2)[1].decode() if answer else "closed without an answer"] += 1
            writer.close()
        except OSError as error:
            outcomes[type(error).__name__] += 1

    await asyncio.gather(*(ask() for _ in range(n_requests)))
    return outcomes


def measure_burst(config: ServiceBenchmarkConfig, model: Path, folder: Path) -> tuple[Table, Result]:
    """Thousands of requests in the same moment, and how long `/health` takes meanwhile."""
    possible_connections(config.burst)  # of this process
    port = free_port()
    command = our_command(config, model, port, "--max_connections", str(config.burst + 100))
    with server(command, port, "/ready", folder / "burst.log"):
        looking = [sys.executable, "-c", LOOKER, str(port)]  # in a process of its own: the client's is busy
        looker = subprocess.Popen(looking, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        began = time.perf_counter()
        outcomes = asyncio.run(ask_at_once(port, config.burst))
        seconds = time.perf_counter() - began
        delays = json.loads(looker.communicate()[0])
    answered = sum(count for outcome, count in outcomes.items() if outcome.isdigit())
    rows = [[outcome, f"{count:,}"] for outcome, count in sorted(outcomes.items())]
    rows += [["answered (goal: all)", f"{answered / config.burst:.2%}"]]
    rows += [["/health, median", f"{statistics.median(delays) * 1e3:.0f} ms"]]
    rows += [["/health, slowest (goal: 200 ms)", f"{delays[-1] * 1e3:.0f} ms"]]
    figures = {"outcomes": outcomes, "health_median": statistics.median(delays), "health_slowest": delays[-1]}
    figures["seconds"] = seconds
    note = f"{config.burst:,} connections at once from the same machine, whose cores the client takes, too; all were "
    note += f"answered after {seconds:.1f} s; `/health` was asked {len(delays)} times."
    return Table("A burst", note, ["outcome", ""], rows), figures


def measure_load(config: ServiceBenchmarkConfig, model: Path, folder: Path) -> tuple[Table, Result]:
    """Locust's users for minutes: failures, delays, and whether memory stays as it is."""
    port, seconds = free_port(), max(5, round(config.minutes * 60))
    locust = [sys.executable, "-m", "locust", "-f", "inference/load_test.py", "--headless", "--json"]
    locust += ["-u", str(config.locust_users), "-r", "10", "-t", f"{seconds}s", "--host", f"http://127.0.0.1:{port}"]
    command = our_command(config, model, port, "--max_queue", str(4 * config.locust_users))
    memory: list[int] = []
    with server(command, port, "/ready", folder / "load.log") as process:
        client = subprocess.Popen(locust, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        while client.poll() is None and len(memory) < seconds + 60:
            memory.append(process.memory_info().rss)
            time.sleep(1)
        output = client.communicate(timeout=60)[0]
    entries = {entry["name"]: entry for entry in json.loads(output)}
    rows, figures = [], {}
    for name, entry in entries.items():
        times = sorted(float(ms) for ms, count in entry["response_times"].items() for _ in range(count))
        shares = {share: times[min(int(share * len(times)), len(times) - 1)] for share in (0.5, 0.95, 0.99) if times}
        counts = [f"{entry['num_requests']:,}", str(entry["num_failures"])]
        rows.append([name, *counts, *(f"{value:.0f}" for value in shares.values())])
        figures[name] = {"requests": entry["num_requests"], "failures": entry["num_failures"], "ms": shares}
    minute = min(60, max(1, len(memory) // 4))
    third = memory[2 * minute : 3 * minute] or memory
    growth = statistics.mean(memory[-minute:]) / statistics.mean(third) - 1
    figures["memory_growth"] = growth
    note = (
        f"{config.locust_users} users for {seconds} s; memory {memory[-1] / 2**20:.0f} MiB, in the last minute "
        f"{growth:+.1%} of the third (goal: within 2 %). Milliseconds."
    )
    return Table("Under load", note, ["", "requests", "failures", "median", "95 %", "99 %"], rows), figures


MEASURES = dict(zip(PARTS, (measure_speed, measure_llama_cpp, measure_forms, measure_burst, measure_load), strict=True))


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    config = parse_config(ServiceBenchmarkConfig, argv, description="The service under load.")
    if config.one_at_a_time:
        answer_one_at_a_time(config.model_path, config.one_at_a_time, config.num_threads)
    if config.quick:
        config.rounds, config.new_tokens, config.burst, config.minutes = 1, 8, min(config.burst, 200), 0.1
        config.users, config.locust_users = min(config.users, 4), min(config.locust_users, 5)
    facts = about("fastapi", "uvicorn", "llguidance", "locust")
    figures: Result = {"benchmark": "service", **facts}
    print(in_a_sentence(facts), flush=True)
    asked = config.parts or PARTS
    minutes = 0.5 * len(asked) + ("speed" in asked) * config.rounds / 10 + ("load" in asked) * config.minutes
    minutes += ("llama_cpp" in asked) * (1 + config.rounds / 2)
    print(f"{', '.join(asked)}: about {minutes:.0f} minutes", flush=True)
    tables = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = Path(config.model_path) if config.model_path else sample_sized_model(folder)
        for part in asked:
            table, figures["under load" if part == "load" else part] = MEASURES[part](config, model, folder)
            tables.append(table)
            print(table.plain(), flush=True)
    if config.write:
        content = "\n\n".join(table.markdown() for table in tables)
        write_section(Path(config.write), "service", f"## Service\n\n{in_a_sentence(facts)}\n\n{content}")
    print(json.dumps(figures))


if __name__ == "__main__":
    run_main(main)
