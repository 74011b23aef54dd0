"""Prometheus metrics: vLLM's names for what vLLM has, and ours for adapters.

Prometheus' own client keeps and writes them; engines are asked when somebody looks.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

from raytune_llm.engines.engine import AdapterState, Stats

LATENCIES_S = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80)


class Metrics:
    def __init__(self, model: str) -> None:
        self._model = model
        self._registry = CollectorRegistry()
        labels = ("model_name",)

        def histogram(name: str, text: str) -> Histogram:
            return Histogram(name, text, labels, buckets=LATENCIES_S, registry=self._registry)

        self.first_token_s = histogram("vllm:time_to_first_token_seconds", "From a request's arrival to its first token")
        self.between_tokens_s = histogram("vllm:inter_token_latency_seconds", "From one told token to the next")
        self.request_s = histogram("vllm:e2e_request_latency_seconds", "From a request's arrival to its end")
        self.success = Counter(
            "vllm:request_success_total", "Requests that were answered", (*labels, "finished_reason"), registry=self._registry
        )
        self.refused = Counter("raytune_llm:requests_refused", "By HTTP status", (*labels, "status"), registry=self._registry)

    def text(self, stats: Stats, adapters: Sequence[AdapterState]) -> bytes:
        registry = CollectorRegistry()
        registry.register(_Engine(self._model, stats, adapters))
        return generate_latest(self._registry) + generate_latest(registry)


class _Engine:
    """An engine's state as a collector."""

    def __init__(self, model: str, stats: Stats, adapters: Sequence[AdapterState]) -> None:
        self._model, self._stats, self._adapters = model, stats, adapters

    def collect(self) -> Iterator[GaugeMetricFamily | CounterMetricFamily]:
        stats = self._stats
        for name, text, value in (
            ("vllm:num_requests_running", "Rows of the batch", stats.running),
            ("vllm:num_requests_waiting", "Requests that wait", stats.waiting),
            ("vllm:kv_cache_usage_perc", "Part of the cache's blocks that is held (1: all)", stats.cache_used),
        ):
            gauge = GaugeMetricFamily(name, text, labels=["model_name"])
            gauge.add_metric([self._model], value)
            yield gauge
        for name, text, value in (
            ("vllm:prompt_tokens", "Tokens of prompts that were computed", stats.prompt_tokens),
            ("vllm:generation_tokens", "Tokens that were drawn", stats.generated_tokens),
            ("vllm:num_preemptions", "Rows that gave up their blocks", stats.preemptions),
            ("vllm:prefix_cache_queries", "Tokens of prompts", stats.prefix_queries),
            ("vllm:prefix_cache_hits", "Tokens of prompts that the prefix cache held", stats.prefix_hits),
            ("raytune_llm:adapter_loads", "Adapters that were copied into a slot", stats.adapter_loads),
            ("raytune_llm:adapter_evictions", "Adapters that left their slot for another", stats.adapter_evictions),
        ):
            counter = CounterMetricFamily(name, text, labels=["model_name"])
            counter.add_metric([self._model], value)
            yield counter
        waiting = GaugeMetricFamily("raytune_llm:requests_waiting", "By what they wait for", labels=["model_name", "reason"])
        for reason in ("rows", "cache", "adapter"):
            waiting.add_metric([self._model, reason], stats.waiting_by_reason.get(reason, 0))
        yield waiting
        resident = GaugeMetricFamily(
            "raytune_llm:adapter_resident", "Where an adapter's weights are (1)", labels=["model_name", "adapter", "level"]
        )
        used = GaugeMetricFamily("raytune_llm:adapter_requests", "Rows that run with it", labels=["model_name", "adapter"])
        for adapter in self._adapters:
            resident.add_metric([self._model, adapter.name, adapter.residency], 1)
            used.add_metric([self._model, adapter.name], adapter.in_use)
        yield resident
        yield used
