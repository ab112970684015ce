"""Every metric of serving: its name, what kind it is, its labels, and what it says.

The one place they are written down: `serving.metrics` makes what is here, `serving.exposition` joins it, and
dashboards and alerts may use nothing else (a test holds them to it). Names follow Prometheus: base units,
`_total` on counters. All have the label `model` besides their own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

SECONDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
ROWS = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 1024.0)
LOAD_SECONDS = (0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)


@dataclass(frozen=True, slots=True)
class Metric:
    """One family. `bounds` are a histogram's upper edges, without the infinite one."""

    name: str
    kind: Literal["counter", "gauge", "histogram"]
    text: str
    labels: tuple[str, ...] = ()
    bounds: tuple[float, ...] = ()


METRICS: dict[str, Metric] = {
    metric.name: metric
    for metric in (
        Metric("tandem_requests_total", "counter", "Answers sent", ("route", "status", "version")),
        Metric(
            "tandem_request_seconds",
            "histogram",
            "From a request's headers to its answer",
            ("route", "version"),
            SECONDS,
        ),
        Metric(
            "tandem_phase_seconds",
            "histogram",
            "Time of answered requests in a phase: queue, decode, run, encode",
            ("phase", "version"),
            SECONDS,
        ),
        Metric("tandem_batch_rows", "histogram", "Rows per batch that ran", (), ROWS),
        Metric("tandem_batch_seconds", "histogram", "How long a batch ran", (), SECONDS),
        Metric("tandem_rows_total", "counter", "Rows that ran"),
        Metric("tandem_batches_total", "counter", "Batches that ran"),
        Metric("tandem_queue_rows", "gauge", "Rows waiting now"),
        Metric("tandem_queue_age_seconds", "gauge", "How long the oldest waiting request has waited"),
        Metric("tandem_busy_ratio", "gauge", "Share of the last seconds that batches ran, 0 to 1"),
        Metric(
            "tandem_shed_total",
            "counter",
            "Refused: queue_full, deadline (can't be met), expired (dropped from the queue), tenant (over its"
            " limit), stopping",
            ("reason",),
        ),
        Metric(
            "tandem_deadline_misses_total",
            "counter",
            "Let in, but too late: queue (never ran), run (ran, and was late)",
            ("stage",),
        ),
        Metric("tandem_swaps_total", "counter", "Versions taken into service"),
        Metric("tandem_model_version", "gauge", "The version in service"),
        Metric("tandem_load_seconds", "histogram", "Reading and warming a version", (), LOAD_SECONDS),
        Metric("tandem_load_failures_total", "counter", "Versions, or looks at the registry, that failed"),
        Metric("tandem_weight_cache_hits_total", "counter", "Loads that found the graph on the node"),
        Metric("tandem_weight_cache_misses_total", "counter", "Loads that had to put it there"),
        Metric("tandem_pool_loaded", "gauge", "Whether a pooled model is loaded: 1 or 0"),
        Metric(
            "tandem_pool_bytes", "gauge", "What a pooled model holds of its pool, by the size of its files"
        ),
        Metric("tandem_pool_evictions_total", "counter", "Times that the pool let go of a model"),
        Metric("tandem_pool_cold_requests_total", "counter", "Requests that found their model not loaded"),
        Metric("tandem_trial_percent", "gauge", "A candidate's share of requests", ("version", "mode")),
        Metric("tandem_trial_step", "gauge", "The step a trial is at, from 0", ("version", "mode")),
        Metric(
            "tandem_trials_ended_total",
            "counter",
            "Trials that ended, by outcome: promoted, abandoned",
            ("version", "outcome"),
        ),
        Metric(
            "tandem_candidate_failures_total",
            "counter",
            "Requests that a candidate could not answer; the version in service did",
            ("version",),
        ),
        Metric("tandem_shadow_rows_total", "counter", "Rows a shadow answered too", ("version",)),
        Metric("tandem_shadow_differing_rows_total", "counter", "Those it answered otherwise", ("version",)),
        Metric("tandem_feedback_total", "counter", "Scores that came back for answers", ("version",)),
        Metric("tandem_feedback_score_mean", "gauge", "Their mean since the replica began", ("version",)),
    )
}

TRAINING = (
    "tandem_training_samples_per_s",
    "tandem_training_loss",
    "tandem_training_step",
    "tandem_training_workers",
    "tandem_training_checkpoint",
    "tandem_training_rank0_seconds_total",
)
"""What a run on the same cluster adds to the page."""
OF_SERVE = ("ray_serve_autoscaling_target_replicas", "ray_serve_deployment_replica_healthy")
"""What Ray Serve's controller counts and dashboards use: replicas wanted, and each that runs."""


def sample_names() -> set[str]:
    """Every name that a sample on the page may have."""
    names = {*TRAINING, *OF_SERVE}
    for metric in METRICS.values():
        if metric.kind == "histogram":
            names |= {f"{metric.name}_{part}" for part in ("bucket", "sum", "count")}
        else:
            names.add(metric.name)
    return names
