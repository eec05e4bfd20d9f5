"""Tests that a night reaches a real MLflow server, once, and that a server that is away costs seconds."""

import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from bitferry.device.errors import StageFailed, TargetUnavailable
from bitferry.pipeline import verdict
from bitferry.pipeline.nightly import mlflow_log
from bitferry.pipeline.nightly.night import Night
from tests import nights
from tests.conftest import plain_environment

MLFLOW = Path(sys.executable).with_name("mlflow")


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A real MLflow server on loopback, its runs in SQLite; stopped with all its workers."""
    folder, port = tmp_path_factory.mktemp("mlflow"), free_port()
    command: list[str | Path] = [MLFLOW, "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    command += ["--backend-store-uri", f"sqlite:///{folder}/runs.db", "--artifacts-destination", str(folder / "kept")]
    environment = plain_environment(MLFLOW_DISABLE_TELEMETRY="true", MLFLOW_SERVER_ENABLE_JOB_EXECUTION="false")
    with (folder / "log.txt").open("w") as log:
        running = subprocess.Popen(command, cwd=folder, stdout=log, stderr=log, env=environment, start_new_session=True)
    try:
        wait(f"http://127.0.0.1:{port}/health", running, folder / "log.txt")
        yield f"http://127.0.0.1:{port}"
    finally:
        os.killpg(running.pid, 15)
        running.wait(30)


def wait(url: str, running: subprocess.Popen[bytes], log: Path) -> None:
    """Wait until the server answers."""
    for _ in range(600):
        assert running.poll() is None, log.read_text()
        try:
            urllib.request.urlopen(url, timeout=1).close()  # noqa: S310 - our own server
        except OSError:
            time.sleep(0.2)
        else:
            return
    raise AssertionError(log.read_text())


def a_night(*, settings: int = 150) -> Night:
    """Make a night of every kind of result; the first has long settings, and more than one request may hold."""
    recipe = {f"quantization.setting{i}": "1" for i in range(settings)} | {"classes": json.dumps(["boot"] * 2000)}
    results = (
        nights.result(made_from=nights.inputs(recipe=recipe)),
        nights.reused(nights.result(nights.cell(precision="float32"))),
        nights.unmeasured(nights.cell(target="tensorrt")),
        nights.failed(nights.cell("other"), error="conv2d: " + "x" * 7000),
    )
    return Night(nights.nights(1)[0], results, (), 60.0, finished=True)


@pytest.mark.slow
def test_a_night_is_logged_once_with_all_its_figures(server: str) -> None:
    from mlflow import MlflowClient  # noqa: PLC0415

    night = a_night()
    assert mlflow_log.log(server, night) == 4
    assert mlflow_log.log(server, night) == 0
    assert "MLFLOW_HTTP_REQUEST_TIMEOUT" not in os.environ
    client = MlflowClient(tracking_uri=server)
    experiment = client.get_experiment_by_name("bitferry")
    assert experiment is not None
    runs = {run.data.tags["cell"]: run for run in client.search_runs([experiment.experiment_id])}
    assert len(runs) == len(client.search_runs([experiment.experiment_id])) == 4
    run, first = runs["small/openvino/int8"], night.results[0]
    assert first.measured
    assert run.data.metrics == {
        "accuracy_percent": 91.5, "float_accuracy_percent": 92.0, "drop_pp": 0.5,
        "drop_lower_pp": pytest.approx(first.measured.accuracy.judged.drop_lower_pp),
        "drop_upper_pp": pytest.approx(first.measured.accuracy.judged.drop_upper_pp),
        "latency_ms": 1.0, "baseline_ms": 2.0, "ratio": 0.5, "ratio_lower": 0.495, "ratio_upper": 0.505,
        "file_bytes": 1_000_000, "memory_bytes": 20_000_000,
    }  # fmt: skip
    assert run.info.status == "FINISHED"
    assert (run.data.tags["night"], run.data.tags["outcome"], run.data.tags["kind"]) == (night.id, "pass", nights.KIND)
    assert (run.data.tags["target"], run.data.tags["precision"], run.data.tags["commit"]) == (
        "openvino", "int8", "1f0c9d2",
    )  # fmt: skip
    assert run.data.params["quantization.setting149"] == "1"
    assert len(run.data.params["classes"]) == 6000
    assert run.data.params["data.train"] == nights.digest("train")
    kept = client.download_artifacts(run.info.run_id, "verdict.json")
    assert json.loads(Path(kept).read_text()) == json.loads(json.dumps(verdict.fields(first.measured)))
    assert runs["small/openvino/float32"].data.tags["status"] == "reused"
    assert runs["small/tensorrt/int8"].data.metrics == {}
    broken = runs["other/openvino/int8"]
    assert (broken.info.status, broken.data.tags["mlflow.note.content"][:8]) == ("FAILED", "conv2d: ")


@pytest.mark.slow
def test_what_an_earlier_call_left_open_is_completed(server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from mlflow import MlflowClient  # noqa: PLC0415
    from mlflow.exceptions import MlflowException  # noqa: PLC0415

    night = replace(a_night(), id="2026-12-01T02:00:00Z")

    def cut(*_: object) -> None:
        raise MlflowException("the line was cut")

    with monkeypatch.context() as patched:
        patched.setattr(MlflowClient, "log_text", cut)
        with pytest.raises(StageFailed, match="the line was cut"):
            mlflow_log.log(server, night, experiment="cut")
    assert mlflow_log.log(server, night, experiment="cut") == 4
    client = MlflowClient(tracking_uri=server)
    experiment = client.get_experiment_by_name("cut")
    assert experiment is not None
    runs = client.search_runs([experiment.experiment_id])
    assert sorted(run.info.status for run in runs) == ["FAILED", "FINISHED", "FINISHED", "FINISHED"]
    done = next(run for run in runs if run.data.tags["cell"] == "small/openvino/int8")
    assert len(client.get_metric_history(done.info.run_id, "ratio")) == 1


def test_a_server_that_is_away_is_told_of_without_its_password() -> None:
    with pytest.raises(StageFailed) as told:
        mlflow_log.log(f"http://somebody:secret@127.0.0.1:{free_port()}", a_night())
    assert "did not take the night 2026-11-01T02:00:00Z: API request to" in str(told.value)
    assert "refused" in str(told.value)
    assert "secret" not in str(told.value)
    assert "\n" not in str(told.value)


def test_a_server_that_never_answers_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")  # what is set outside holds
    with socket.create_server(("127.0.0.1", 0)) as silent, pytest.raises(StageFailed, match="timed out|timeout"):
        mlflow_log.log(f"http://127.0.0.1:{silent.getsockname()[1]}", a_night())
    assert os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] == "1"


def test_without_mlflow_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mlflow", None)
    with pytest.raises(TargetUnavailable, match=r"bitferry\[mlflow\]"):
        mlflow_log.log("http://127.0.0.1:1", a_night())
