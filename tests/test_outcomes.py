"""Whole deployments that do not simply pass: over-quantized, undecided until there are enough images, multi-label."""

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bitferry.device import runner
from bitferry.targets import Scheme, openvino
from tests.conftest import Project, subset, write_project


def verify(project: Project, *options: str) -> tuple[int, Any]:
    done = project.bitferry("verify", "small.toml", "--target", "openvino", "--quick", "--json", *options)
    assert done.returncode in (0, 1), done.stderr
    (verdict,) = json.loads(done.stdout)
    return done.returncode, verdict


def test_an_over_quantized_model_fails_and_the_ladder_says_where(
    deployed: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The hook: fewer bits for every weight, in the target's own scheme."""
    coarse = Project(Path(shutil.copytree(deployed.folder, tmp_path / "coarse")))
    coarse.edit(("accuracy_drop_pp = 5.0", "accuracy_drop_pp = 1.0"))
    scheme = openvino.SCHEMES["int8"]
    assert isinstance(scheme, Scheme)
    monkeypatch.setattr(openvino, "SCHEMES", {**openvino.SCHEMES, "int8": replace(scheme, weight_bits=2)})
    done = coarse.bitferry("deploy", "small.toml", "--target", "openvino", "--quick", "--out", "new")
    assert done.returncode == 1, done.stderr
    assert "fail Do not ship int8 on openvino" in done.stdout
    assert "most is lost in PyTorch int8: layers " in done.stdout
    assert not list((coarse.folder / "new").glob("small-*"))
    report = (coarse.folder / "build/small/reports/openvino-int8/report.html").read_text()
    assert "Do not ship int8 on openvino" in report


def test_an_undecided_case_is_decided_by_the_number_of_images_it_asks_for(deployed: Project, tmp_path: Path) -> None:
    few = Project(Path(shutil.copytree(deployed.folder, tmp_path / "few")))
    np.savez(few.folder / "evaluation.npz", **subset("evaluation", 25))  # type: ignore[arg-type]
    code, verdict = verify(few)
    assert (code, verdict["outcome"]) == (1, "undecided")
    further = verdict["accuracy"]["further_images"]
    np.savez(few.folder / "evaluation.npz", **subset("evaluation", 25 + further))  # type: ignore[arg-type]
    code, verdict = verify(few)
    assert (code, verdict["outcome"]) == (0, "pass")
    assert verdict["accuracy"]["images"] == 25 + further


MULTILABEL = (
    ('name = "small"', 'name = "small"\ntask = "multilabel"'),
    ('classes = ["T-shirt", "Trouser", "Pullover"]', 'classes = ["top", "long", "dark"]'),
    ("accuracy_drop_pp = 5.0", 'accuracy_drop_pp = 5.0\nmetric = "mAP"'),
)


def several(split: str, count: int) -> dict[str, np.ndarray]:
    """Give images with three yes-or-no labels: worn above the waist, with long sleeves or legs, darker than most."""
    arrays = subset(split, count)
    images, kinds = arrays["images"], arrays["labels"]
    dark = images.reshape(len(images), -1).mean(axis=1) < 80
    return {"images": images, "labels": np.stack([kinds != 1, kinds > 0, dark], axis=1).astype(np.uint8)}


def test_a_multi_label_model_is_trained_judged_and_shipped(tmp_path: Path) -> None:
    project = write_project(tmp_path / "project")
    project.edit(*MULTILABEL)
    for split, count in (("train", 960), ("calibration", 64), ("evaluation", 600)):
        np.savez(project.folder / f"{split}.npz", **several(split, count))  # type: ignore[arg-type]
    done = project.bitferry("deploy", "small.toml", "--target", "openvino,onnxruntime", "--quick", "--json")
    assert done.returncode == 0, done.stderr
    for verdict in json.loads(done.stdout):
        accuracy = verdict["accuracy"]
        assert accuracy["judged"]["metric"] == "mAP"
        assert accuracy["judged"]["float_percent"] > 80
        assert {other["metric"] for other in accuracy["others"]} == {"AUC"}
        assert [one["name"] for one in accuracy["classes"]] == ["top", "long", "dark"]
        assert all(one["auc_percent"] > 70 for one in accuracy["classes"])
    bundle = project.folder / "dist/small-openvino-1.0.0"
    again = project.bitferry("verify", str(bundle), "--data", "evaluation.npz", "--quick", "--json")
    assert again.returncode == 0, again.stderr
    answer = predicted(bundle, project.folder)
    assert set(answer["classes"]) == {"top", "long", "dark"}
    assert not 0.99 < sum(answer["probabilities"]) < 1.01  # each label for itself, not shares of one


def predicted(bundle: Path, folder: Path) -> Any:
    picture = bundle / "golden/golden-2.png"
    run: list[str | Path] = [sys.executable, bundle / "run.pyz", "predict", picture, "--json", "--top", "3"]
    done = subprocess.run(run, capture_output=True, text=True, check=True, cwd=folder)
    return json.loads(done.stdout)


def test_a_metric_of_torchmetrics_is_judged_by_name(deployed: Project, tmp_path: Path) -> None:
    by_f1 = Project(Path(shutil.copytree(deployed.folder, tmp_path / "f1")))
    by_f1.edit(("accuracy_drop_pp = 5.0", 'accuracy_drop_pp = 5.0\nmetric = "torchmetrics:MulticlassF1Score"'))
    code, verdict = verify(by_f1)
    judged = verdict["accuracy"]["judged"]
    assert code == 0
    assert (judged["metric"], judged["method"]) == ("torchmetrics:MulticlassF1Score", "bootstrap")
    assert judged["drop_lower_pp"] <= judged["drop_pp"] <= judged["drop_upper_pp"]


def test_every_precision_of_every_target_gets_a_verdict(deployed: Project, tmp_path: Path) -> None:
    """No rung may be missing, and a float artifact's ladder may have no suspect."""
    project = Project(Path(shutil.copytree(deployed.folder, tmp_path / "all")))
    done = project.bitferry(
        "verify", "small.toml", "-t", "openvino,onnxruntime", "--precision", "float32", "--quick", "--json"
    )
    assert done.returncode == 0, done.stderr
    for verdict in json.loads(done.stdout):
        ladder = verdict["ladder"]
        assert [rung["name"] for rung in ladder["rungs"]][1:4] == ["TorchScript", "ONNX", "simplified ONNX"]
        assert not [rung for rung in ladder["rungs"] if rung["missing"]]
        assert ladder["suspects"] == []
        assert ladder["layers"] == []
        assert verdict["execution"]["summary"].startswith("float32 requested; 2 of 2 convolutions float32")


def test_the_task_decides_what_a_probability_is() -> None:
    scores = np.array([[2.0, -1.0, 0.0]], np.float32)
    assert runner.probabilities(scores, "classification").sum() == pytest.approx(1)
    assert runner.probabilities(scores, "multilabel")[0] == pytest.approx([0.880797, 0.268941, 0.5], abs=1e-5)
