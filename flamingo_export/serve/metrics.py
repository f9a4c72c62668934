"""What Prometheus reads at /metrics."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

if TYPE_CHECKING:
    from flamingo_export.serve.models import Models

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
_STEP = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)


class Metrics:
    """Histograms that requests fill, and a look at the engines whenever they are asked for."""

    content_type = "text/plain; version=0.0.4; charset=utf-8"

    def __init__(self, models: Models) -> None:
        self.registry = CollectorRegistry()
        labels = ("model",)
        self.requests = Counter(
            "flamingo_requests", "Requests by route and status.", ("route", "status"), registry=self.registry
        )
        self.refusals = Counter("flamingo_refusals", "Requests refused, by reason.", ("reason",), registry=self.registry)
        self.first_token = Histogram(
            "flamingo_time_to_first_token_seconds",
            "From a request's arrival at the engine to its first token.",
            labels,
            buckets=_SECONDS,
            registry=self.registry,
        )
        self.between_tokens = Histogram(
            "flamingo_time_between_tokens_seconds",
            "From one step of a request to the next.",
            labels,
            buckets=_STEP,
            registry=self.registry,
        )
        self.duration = Histogram(
            "flamingo_request_seconds", "Whole requests.", ("route",), buckets=_SECONDS, registry=self.registry
        )
        self.registry.register(_Engines(models))

    def page(self) -> bytes:
        """The text that Prometheus scrapes."""
        return generate_latest(self.registry)


class _Engines(Collector):
    def __init__(self, models: Models) -> None:
        self._models = models

    def collect(self) -> Iterator[GaugeMetricFamily | CounterMetricFamily]:
        gauges = {
            "running": ("flamingo_requests_running", "Requests in a cache row."),
            "waiting": ("flamingo_requests_waiting", "Requests that wait for a row."),
            "rows": ("flamingo_cache_rows", "Cache rows there are."),
            "rows_in_use": ("flamingo_cache_rows_in_use", "Cache rows of running requests."),
            "bank_rows": ("flamingo_bank_rows", "Rows of the media bank."),
            "bank_rows_in_use": ("flamingo_bank_rows_in_use", "Bank rows of running requests."),
        }
        counters = {
            "prompt_tokens": (
                "flamingo_prompt_tokens",
                "Tokens of prompts that were computed; those found in the cache are not among them.",
            ),
            "reused_tokens": ("flamingo_prompt_tokens_reused", "Tokens of prompts found in the cache."),
            "generated_tokens": ("flamingo_generated_tokens", "Tokens generated."),
            "shared_rows": ("flamingo_rows_shared", "Requests that were given a place in another's cache row."),
            "media_encoded": ("flamingo_media_encoded", "Media that were encoded."),
            "media_reused": ("flamingo_media_reused", "Media found in the bank."),
            "steps": ("flamingo_decode_steps", "Calls of the decoder that decode."),
            "failed": ("flamingo_requests_failed", "Requests that failed in the engine."),
            "cancelled": ("flamingo_requests_cancelled", "Requests given up by their callers."),
        }
        stats = {served.name: served.model.engine.stats() for served in self._models}
        for field, (name, text) in gauges.items():
            gauge = GaugeMetricFamily(name, text, labels=("model",))
            for model, found in stats.items():
                gauge.add_metric((model,), getattr(found, field))
            yield gauge
        for field, (name, text) in counters.items():
            counter = CounterMetricFamily(name, text, labels=("model",))
            for model, found in stats.items():
                counter.add_metric((model,), getattr(found, field))
            yield counter
        healthy = GaugeMetricFamily("flamingo_model_healthy", "Whether the model's backend works.", labels=("model",))
        for served in self._models:
            healthy.add_metric((served.name,), float(served.healthy))
        yield healthy
