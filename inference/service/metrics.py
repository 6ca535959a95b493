"""`GET /metrics` for Prometheus, with vLLM's names and buckets: its dashboards show this service, too."""

from __future__ import annotations

import asyncio
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

from fastapi import APIRouter, Request
from fastapi.responses import Response
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric

from command_line import replacing
from inference.engine_statistics import Observations
from inference.service.gate import REJECTIONS
from inference.service.model_server import Service
from inference.service.workers import SHARE_SECONDS, merged_expositions

router = APIRouter(include_in_schema=False)

HISTOGRAMS = {  # vLLM's name → the engine's, and what it says
    "time_to_first_token_seconds": ("time_to_first_token", "Seconds from a request to its first token"),
    "inter_token_latency_seconds": ("between_tokens", "Seconds between two tokens of a request"),
    "time_per_output_token_seconds": ("between_tokens", "The same, by its older name"),
    "e2e_request_latency_seconds": ("whole_request", "Seconds from a request to its end"),
    "request_queue_time_seconds": ("queued", "Seconds in the line"),
    "request_prompt_tokens": ("prompt_tokens", "Tokens of a request's prompt"),
    "request_generation_tokens": ("answer_tokens", "Tokens of a request's answer"),
}
COUNTERS = {
    "generation_tokens": ("tokens_generated", "Tokens that were generated"),
    "prefix_cache_queries": ("tokens_looked_up", "Tokens of prompts that were looked for in the cache"),
    "prefix_cache_hits": ("tokens_reused", "Tokens of prompts that were found there"),
    "spec_decode_num_drafts": ("drafts", "How often tokens of an answer were drafted"),
    "spec_decode_num_draft_tokens": ("tokens_drafted", "Tokens that were drafted"),
    "spec_decode_num_accepted_tokens": ("tokens_accepted", "Drafted tokens that were right"),
    "num_preemptions": ("preemptions", "Requests that gave their memory to older ones"),
    "engine_steps": ("steps", "Forward passes"),
    "engine_failed_steps": ("failed_steps", "Forward passes that raised an exception"),
}
FINISHED = {"stop": "stop", "length": "length", "deadline": "length", "cancelled": "abort", "error": "error"}


class ServiceCollector:
    """What the engines have counted, in Prometheus' terms, at the moment of asking."""

    def __init__(self, service: Service, statuses: Counter[tuple[str, int]], rejected: Counter[str]) -> None:
        self.service, self.statuses, self.rejected = service, statuses, rejected

    def collect(self) -> Iterator[Metric]:
        """All metrics."""
        label = {"model_name": self.service.settings.model_names[0]}
        if self.service.settings.metrics_folder:
            label["worker"] = str(os.getpid())
        names, values = list(label), list(label.values())
        engines = self.service.statistics()
        now = engines[:1]  # what is true at this moment is true of the present engine
        used = sum(each.cache_tokens_used for each in now) / max(1, sum(each.cache_tokens for each in now))
        gauges = (
            ("vllm:num_requests_running", "Requests that are computed", sum(each.running for each in engines)),
            ("vllm:num_requests_waiting", "Requests that wait", sum(each.waiting for each in engines)),
            ("vllm:kv_cache_usage_perc", "The part of the cache that is used, from 0 to 1", used),
        )
        for name, text, value in gauges:
            yield _with(GaugeMetricFamily(name, text, labels=names), values, value)
        yield _with(
            CounterMetricFamily("vllm:prompt_tokens", "Tokens of prompts", labels=names),
            values,
            sum(each.tokens_prefilled + each.tokens_reused for each in engines),
        )
        for name, (field, text) in COUNTERS.items():
            family = CounterMetricFamily(f"vllm:{name}", text, labels=names)
            yield _with(family, values, sum(getattr(each, field) for each in engines))
        finished: Counter[str] = Counter({reason: 0 for reason in FINISHED.values()})
        for each in engines:
            for reason, count in each.finished.items():
                finished[FINISHED[reason]] += count
        success = CounterMetricFamily(
            "vllm:request_success", "Requests by the reason of their end", labels=[*names, "finished_reason"]
        )
        for reason, count in finished.items():
            success.add_metric([*values, reason], count)
        yield success
        for name, (field, text) in HISTOGRAMS.items():
            family = HistogramMetricFamily(f"vllm:{name}", text, labels=names)
            buckets, total = merged(getattr(each, field) for each in engines)
            if buckets:
                family.add_metric(values, buckets, total)
            yield family
        rejected = CounterMetricFamily(
            "service:requests_rejected", "Requests that were refused", labels=[*names, "reason"]
        )
        for reason in REJECTIONS:
            rejected.add_metric([*values, reason], self.rejected[reason])
        yield rejected
        blocked = CounterMetricFamily("service:blocked", "Texts that filters have blocked", labels=[*names, "part"])
        for part in ("question", "answer"):
            blocked.add_metric([*values, part], self.service.filters.blocked[part] if self.service.filters else 0)
        yield blocked
        answered = CounterMetricFamily(
            "service:http_requests", "Requests by their answer", labels=[*names, "path", "status"]
        )
        for (path, status), count in list(self.statuses.items()):
            answered.add_metric([*values, path, str(status)], count)
        yield answered


def _with(family: Metric, labels: list[str], value: float) -> Metric:
    family.add_metric(labels, value)
    return family


def merged(observations: Iterable[Observations]) -> tuple[list[tuple[str, float]], float]:
    """The cumulative buckets of several histograms with the same bounds, and their sum."""
    parts = list(observations)
    if not parts:
        return [], 0.0
    counts = [sum(column) for column in zip(*(part.buckets.copy() for part in parts), strict=True)]
    bounds = [*map(str, parts[0].bounds), "+Inf"]
    cumulative = [sum(counts[: index + 1]) for index in range(len(counts))]
    return list(zip(bounds, cumulative, strict=True)), sum(part.sum for part in parts)


@router.get("/metrics")
async def metrics(request: Request) -> Response:
    """All metrics in Prometheus' text format."""
    service: Service = request.state.service
    text = exposition(service)
    if service.settings.metrics_folder:
        mine = own_file(service.settings.metrics_folder)
        others = [path for path in sorted(mine.parent.glob("*.prom")) if path != mine]
        text = merged_expositions([text, *(path.read_text(encoding="utf-8") for path in others)])
    return Response(text, media_type=CONTENT_TYPE_LATEST)


def exposition(service: Service) -> str:
    """The metrics of this process."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(ServiceCollector(service, service.statuses, service.rejected))
    return generate_latest(registry).decode()


def own_file(folder: str) -> Path:
    """Where this process leaves its metrics for the other workers."""
    return Path(folder) / f"{os.getpid()}.prom"


async def share(service: Service) -> None:
    """Leave this worker's metrics for the others again and again: any of them may be asked."""
    while service.settings.metrics_folder:
        with replacing(own_file(service.settings.metrics_folder)) as file:
            file.write(exposition(service).encode())
        await asyncio.sleep(SHARE_SECONDS)


