"""Looks among vLLM's Prometheus metrics: `vllm:vpt_look_seconds`, from the token that asks to the first one behind it.

The scheduler lives in the engine core, /metrics in the API server. The times travel with vLLM's own statistics of a
step, in the one of their fields that is a plain dictionary of integers, under keys of ours.
"""

from __future__ import annotations

from typing import Any

from prometheus_client import Histogram
from vllm.v1.metrics.loggers import StatLoggerBase

_KEY = "vpt_look:"
_BUCKETS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0)


class LookTimes:
    """Looks of the engine core that no statistics have carried away yet."""

    def __init__(self) -> None:
        self.pending: list[tuple[str, float]] = []

    def add(self, kind: str, seconds: float) -> None:
        """Count a look that has led to its first token."""
        self.pending.append((kind, seconds))

    def added_to(self, stats: Any) -> Any:
        """Return the statistics of a step with the pending looks, or None where vLLM makes none."""
        if stats is not None:
            microseconds = {f"{_KEY}{kind}:{i}": int(1e6 * s) for i, (kind, s) in enumerate(self.pending)}
            stats.num_kv_fetch_reqs_by_stage |= microseconds
        self.pending.clear()
        return stats


class LookMetrics(StatLoggerBase):  # type: ignore[misc]
    """Entry point of the group `vllm.stat_logger_plugins`: counts looks, and times them, per engine and kind."""

    histogram: Histogram | None = None

    def __init__(self, vllm_config: Any, engine_index: int = 0) -> None:
        self.model, self.engine = vllm_config.model_config.served_model_name, str(engine_index)

    def record(
        self, scheduler_stats: Any, iteration_stats: Any, mm_cache_stats: Any = None, engine_idx: int = 0
    ) -> None:
        """Take our keys out of a step's statistics, whose other readers would count them as theirs."""
        fields = {} if scheduler_stats is None else scheduler_stats.num_kv_fetch_reqs_by_stage
        for key in [key for key in fields if key.startswith(_KEY)]:
            kind = key.split(":")[1]
            self._histogram().labels(self.model, self.engine, kind).observe(fields.pop(key) / 1e6)

    def log_engine_initialized(self) -> None:
        """Do nothing: there is nothing to tell at the start."""

    @classmethod
    def _histogram(cls) -> Histogram:
        # Made with the first look: vLLM unregisters all metrics of its name when it makes its own.
        if LookMetrics.histogram is None:
            told = "Seconds from the token that asks for a second look to the first token behind it."
            names = ("model_name", "engine", "kind")
            LookMetrics.histogram = Histogram("vllm:vpt_look_seconds", told, names, buckets=_BUCKETS)
        return LookMetrics.histogram
