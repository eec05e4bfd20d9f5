"""The contract, kept by every file in targets/: its signatures, and its answers against PyTorch's."""

import inspect
import json
import sys
from pathlib import Path
from typing import get_args

import numpy as np
import pytest

import targets
from device.errors import InputError, TargetUnavailable
from pipeline import recipe
from pipeline.cache import Cache
from pipeline.run import Deployment, Run
from pipeline.statistics import sqnr_db
from pipeline.verify import eager
from tests.conftest import Project, verdicts

PRECISIONS = [(name, precision) for name in targets.names() for precision in targets.get(name).SCHEMES]


@pytest.mark.parametrize("name", targets.names())
def test_a_module_has_the_contract_s_signatures(name: str) -> None:
    module = targets.get(name)
    for method, expected in inspect.getmembers(targets.Target, inspect.isfunction):
        if not method.startswith("_"):
            wanted = list(inspect.signature(expected).parameters.values())[1:]
            found = list(inspect.signature(getattr(module, method)).parameters.values())
            assert [(p.name, p.kind, p.default) for p in found] == [(p.name, p.kind, p.default) for p in wanted]
    assert get_args(targets.Form).count(module.CONSUMES) == 1
    assert module.SUFFIX.startswith(".")
    assert set(module.SCHEMES) <= set(targets.PRECISIONS)
    assert (module.SCHEMES.get("int8") is not None) == ("int8" in module.SCHEMES)


@pytest.mark.parametrize(("name", "precision"), PRECISIONS)
def test_it_answers_like_pytorch_and_runs_what_was_asked(
    name: str, precision: targets.Precision, deployed: Project, tmp_path: Path
) -> None:
    run = Run(
        recipe.read(deployed.recipe, precision=precision), deployed.folder, Cache(deployed.folder / "build/small")
    )
    made = Deployment(run, name, precision)
    target = targets.get(name)
    images = run.evaluation.images[:9].copy()
    expected = eager(made.program.module())(images)
    predict = target.load(made.compiled.path, precision=precision, options=target.Options(threads=1))
    found = predict(images)
    assert found.dtype == np.float32
    assert sqnr_db(expected, found) > (60 if precision == "float32" else 20)
    np.testing.assert_allclose(np.concatenate([predict(image[None]) for image in images]), found, atol=1e-5)
    executed = target.executed(made.compiled.path, precision=precision, options=target.Options())
    kinds = [layer.kind for layer in executed]
    assert sorted(kinds) == ["convolution", "convolution", "matrix product"]
    assert {layer.name for layer in executed if layer.kind == "convolution"} == {"first.0", "second.0"}
    if precision != "bfloat16":  # which a CPU without it runs as float32, and says so
        assert (
            sum(layer.precision == precision for layer in executed) >= 2
        )  # ONNX Runtime fuses no int8 classifier whose output and bias are float


def test_the_environment_names_runtime_and_machine() -> None:
    for name in targets.names():
        target = targets.get(name)
        found = target.environment(options=target.Options())
        assert found.version[0].isdigit()
        assert found.system == targets.system()


def test_targets_of_one_scheme_share_one_quantized_model(deployed: Project) -> None:
    schemes = {str(targets.get(name).SCHEMES["int8"]) for name in ("openvino", "onnxruntime")}
    assert len(list((deployed.folder / "build/small").glob("quantize-*"))) == len(schemes)
    assert len(list((deployed.folder / "build/small").glob("compile-*"))) >= 2
    assert set(verdicts(deployed)) == {"openvino", "onnxruntime"}


def test_an_unknown_name_is_told_with_the_nearest() -> None:
    with pytest.raises(InputError, match="unknown target 'opnvino'; did you mean 'openvino'"):
        targets.get("opnvino")


def test_a_missing_package_is_this_machine_s_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)
    monkeypatch.delitem(sys.modules, "targets.openvino", raising=False)
    with pytest.raises(TargetUnavailable, match="target 'openvino' needs the Python package 'openvino'"):
        targets.get("openvino")


def test_targets_are_listed(deployed: Project) -> None:
    done = deployed.bitferry("targets", "--json")
    rows = {row["name"]: row for row in json.loads(done.stdout)}
    assert set(rows) == set(targets.names())
    assert rows["openvino"]["ready"] == "yes"
    assert "int8" in rows["openvino"]["precisions"]
