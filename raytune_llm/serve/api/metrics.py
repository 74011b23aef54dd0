"""Prometheus metrics, under vLLM's names where vLLM has the metric, and under `raytune_llm:` otherwise.

Latencies are recorded as requests are answered; the state of the engines is read when /metrics is requested.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

from raytune_llm.engines.engine import Stats
from raytune_llm.serve.backend import EngineReport

LATENCIES_S = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80)


class Metrics:
    def __init__(self, model: str) -> None:
        self._model = model
        self._registry = CollectorRegistry()
        labels = ("model_name",)

        def histogram(name: str, text: str) -> Histogram:
            return Histogram(name, text, labels, buckets=LATENCIES_S, registry=self._registry)

        self.first_token_s = histogram("vllm:time_to_first_token_seconds", "From a request's arrival to an answer's first token")
        self.between_tokens_s = histogram("vllm:inter_token_latency_seconds", "From one token of an answer to its next")
        self.request_s = histogram("vllm:e2e_request_latency_seconds", "From a request's arrival to an answer's end")
        self.queue_s = histogram("vllm:request_queue_time_seconds", "From a request's arrival at the engine to its first step")
        self.success = Counter(
            "vllm:request_success_total", "Answers that were completed", (*labels, "finished_reason"), registry=self._registry
        )
        self.refused = Counter("raytune_llm:requests_refused", "By HTTP status", (*labels, "status"), registry=self._registry)

    def text(self, reports: Sequence[EngineReport]) -> bytes:
        registry = CollectorRegistry()
        registry.register(_Engines(self._model, reports))
        return generate_latest(self._registry) + generate_latest(registry)


GAUGES: tuple[tuple[str, str, Callable[[Stats], float]], ...] = (
    ("vllm:num_requests_running", "Requests in the batch", lambda stats: stats.running),
    ("vllm:num_requests_waiting", "Requests that wait for a row of the batch", lambda stats: stats.waiting),
    ("vllm:kv_cache_usage_perc", "Fraction of the KV cache's blocks in use", lambda stats: stats.cache_used),
)
COUNTERS: tuple[tuple[str, str, Callable[[Stats], float]], ...] = (
    ("vllm:prompt_tokens", "Prompt tokens computed", lambda stats: stats.prompt_tokens),
    ("vllm:generation_tokens", "Tokens generated", lambda stats: stats.generated_tokens),
    ("vllm:num_preemptions", "Running requests that were preempted for lack of cache blocks", lambda stats: stats.preemptions),
    ("vllm:prefix_cache_queries", "Prompt tokens looked up in the prefix cache", lambda stats: stats.prefix_queries),
    ("vllm:prefix_cache_hits", "Prompt tokens found in the prefix cache", lambda stats: stats.prefix_hits),
    ("raytune_llm:adapter_loads", "Copies of adapters into a slot on the device", lambda stats: stats.adapter_loads),
    ("raytune_llm:adapter_evictions", "Adapters replaced in their slot by another", lambda stats: stats.adapter_evictions),
)
LABELS = ("model_name", "engine")


class _Engines:
    """A collector of engines' states. The label `engine` is the engine's number or replica, as in vLLM."""

    def __init__(self, model: str, reports: Sequence[EngineReport]) -> None:
        self._model, self._reports = model, reports

    def collect(self) -> Iterator[GaugeMetricFamily | CounterMetricFamily]:
        for family, kinds in ((GaugeMetricFamily, GAUGES), (CounterMetricFamily, COUNTERS)):
            for name, text, value in kinds:
                values = family(name, text, labels=LABELS)
                for report in self._reports:
                    values.add_metric([self._model, report.engine], value(report.stats))
                yield values
        waiting = GaugeMetricFamily(
            "raytune_llm:requests_waiting", "Waiting requests, by what they wait for", labels=(*LABELS, "reason")
        )
        resident = GaugeMetricFamily(
            "raytune_llm:adapter_resident", "Where an adapter's weights are (1)", labels=(*LABELS, "adapter", "level")
        )
        used = GaugeMetricFamily(
            "raytune_llm:adapter_requests", "Running requests that use the adapter", labels=(*LABELS, "adapter")
        )
        for report in self._reports:
            labels = [self._model, report.engine]
            for reason in ("rows", "cache", "adapter", "weights"):
                waiting.add_metric([*labels, reason], report.stats.waiting_by_reason.get(reason, 0))
            for adapter in report.adapters:
                resident.add_metric([*labels, adapter.name, adapter.residency], 1)
                used.add_metric([*labels, adapter.name], adapter.in_use)
        yield from (waiting, resident, used, self._lora_requests())

    def _lora_requests(self) -> GaugeMetricFamily:
        """vLLM's: the names of adapters are in labels, and the value is the time in seconds since 1970."""
        kinds = ("max_lora", "waiting_lora_adapters", "running_lora_adapters")
        family = GaugeMetricFamily("vllm:lora_requests_info", "Adapters of requests", labels=(*LABELS, *kinds))
        for report in self._reports:
            if report.stats.adapter_slots:
                running = ",".join(sorted(one.name for one in report.adapters if one.in_use))
                waiting = ",".join(report.stats.waiting_adapters)
                family.add_metric([self._model, report.engine, str(report.stats.adapter_slots), waiting, running], time.time())
        return family
