"""Logs a night to an MLflow server: a run for each cell, which a second call finds and leaves as it is."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from bitferry.device.errors import StageFailed, TargetUnavailable, first_line
from bitferry.pipeline import verdict
from bitferry.pipeline.nightly.night import Night, Point, Result
from bitferry.pipeline.report.record import VERDICT

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

LONGEST_PARAMETER, LONGEST_TAG, MOST_PARAMETERS = 6000, 5000, 100
"""Characters, and parameters of one request, that MLflow's REST API takes."""
SETTINGS = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",  # its own try for minutes, which no night should wait
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_DISABLE_TELEMETRY": "true",  # nothing goes anywhere but to the server that was named
}
"""What holds while a night is logged, where the environment does not say otherwise."""
METRICS = {
    "accuracy_percent": "percent",
    "float_accuracy_percent": "float_percent",
    "drop_pp": "drop_pp",
    "drop_lower_pp": "drop_lower_pp",
    "drop_upper_pp": "drop_upper_pp",
    "latency_ms": "latency_ms",
    "baseline_ms": "baseline_ms",
    "ratio": "ratio",
    "ratio_lower": "ratio_lower",
    "ratio_upper": "ratio_upper",
    "file_bytes": "file_bytes",
    "memory_bytes": "memory_bytes",
}
"""A metric's name at the server → the field of a Point."""


def log(url: str, night: Night, *, experiment: str = "bitferry") -> int:
    """Log what is not there yet; give how many runs were made or ended. One that an earlier call left open is ended.

    Raises TargetUnavailable without MLflow, and StageFailed when the server does not answer or takes no run.
    """
    with _settings():
        try:
            from mlflow import MlflowClient  # noqa: PLC0415
            from mlflow.exceptions import MlflowException  # noqa: PLC0415
        except ModuleNotFoundError as error:
            told = "logging to MLflow needs the Python package 'mlflow-skinny', which is not installed"
            raise TargetUnavailable(f"{told}; install it (`pip install 'bitferry[mlflow]'`)") from error
        try:
            return _log(MlflowClient(tracking_uri=url), night, experiment)
        except (MlflowException, OSError) as error:
            told = _without_password(f"{url} did not take the night {night.id}: {first_line(error)}", url)
            raise StageFailed(f"MLflow at {told}; the history has it, and logging it again adds what lacks") from error


@contextmanager
def _settings() -> Iterator[None]:
    added = {name: value for name, value in SETTINGS.items() if name not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            os.environ.pop(name, None)


def _without_password(text: str, url: str) -> str:
    user, at, _ = urlsplit(url).netloc.rpartition("@")
    return text.replace(user + at, "") if at else text


def _log(client: "MlflowClient", night: Night, experiment: str) -> int:
    found = client.get_experiment_by_name(experiment)
    number = found.experiment_id if found else client.create_experiment(experiment)
    runs = {run.data.tags.get("cell"): run for run in _runs(client, number, night)}
    logged = 0
    for result in night.results:
        run = runs.get(result.cell.name)
        if run is None or run.info.status == "RUNNING":
            _write(client, run.info.run_id if run else _begin(client, number, night, result), night, result)
            logged += 1
    return logged


def _runs(client: "MlflowClient", number: str, night: Night) -> Iterator["Run"]:
    token: str | None = ""
    while token is not None:
        page = client.search_runs([number], f"tags.night = '{night.id}'", page_token=token or None)
        yield from page
        token = page.token or None


def _begin(client: "MlflowClient", number: str, night: Night, result: Result) -> str:
    tags = {"cell": result.cell.name, "night": night.id}
    run = client.create_run(
        number, start_time=_milliseconds(night), tags=tags, run_name=f"{result.cell.name} {night.id}"
    )
    return str(run.info.run_id)


def _write(client: "MlflowClient", run: str, night: Night, result: Result) -> None:
    """Fill a run and end it; doing so twice changes nothing."""
    from mlflow.entities import Metric, Param, RunTag  # noqa: PLC0415

    at, point = _milliseconds(night), Point.of(night.id, result)
    values = {name: getattr(point, field) for name, field in METRICS.items()}
    metrics = [Metric(name, float(value), at, 0) for name, value in values.items() if value is not None]
    settings = sorted(_parameters(result).items())
    parameters = [Param(name, value[:LONGEST_PARAMETER]) for name, value in settings]
    tags = [RunTag(name, value[:LONGEST_TAG]) for name, value in _tags(point, result).items() if value]
    client.log_batch(run, metrics=metrics, tags=tags)
    for first in range(0, len(parameters), MOST_PARAMETERS):
        client.log_batch(run, params=parameters[first : first + MOST_PARAMETERS])
    if result.verdict:
        client.log_text(run, json.dumps(verdict.fields(result.verdict), indent=2, allow_nan=False), VERDICT)
    ended = "FAILED" if result.status == "failed" else "FINISHED"
    client.set_terminated(run, ended, at + round(1000 * result.seconds))


def _parameters(result: Result) -> dict[str, str]:
    made_from = result.inputs
    weights = {"weights": made_from.weights} if made_from.weights else {}
    return {**made_from.recipe, **{f"data.{split}": digest for split, digest in made_from.data.items()}, **weights}


def _tags(point: Point, result: Result) -> dict[str, str | None]:
    return {
        "recipe": point.cell.recipe,
        "target": point.cell.target,
        "precision": point.cell.precision,
        "status": point.status,
        "outcome": point.outcome,
        "kind": point.kind,
        "key": point.key,
        "commit": result.inputs.commit,
        "mlflow.note.content": point.headline,
    }


def _milliseconds(night: Night) -> int:
    return round(1000 * datetime.fromisoformat(night.id).timestamp())
