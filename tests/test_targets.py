"""The contract, kept by every file in targets/: its signatures, and its answers against PyTorch's at every batch.

A target that cannot be loaded is skipped, unless REQUIRE_TARGETS names it or says `all`.
"""

import inspect
import json
import os
import platform
import re
import shutil
import sys
from dataclasses import fields, is_dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
from packaging.specifiers import SpecifierSet

from bitferry import targets
from bitferry.device.errors import InputError, TargetUnavailable
from bitferry.pipeline import recipe
from bitferry.pipeline.artifacts import Quantized
from bitferry.pipeline.cache import Cache
from bitferry.pipeline.compile import compile
from bitferry.pipeline.run import Deployment, Run
from bitferry.pipeline.statistics import sqnr_db
from bitferry.pipeline.verify import eager, load_artifact
from tests.conftest import Project, verdicts

FAKE = Path(__file__).with_name("fake")
REQUIRED = os.environ.get("REQUIRE_TARGETS", "").split(",")
LEAST_DB = {"float32": 60, "float16": 40, "bfloat16": 25, "int8": 20, "float8": 10}
"""SQNR between the artifact's scores and those of the program it was made from."""
BATCHES: tuple[targets.Batch, ...] = (1, 4, "dynamic")


@cache
def ready(name: str) -> targets.Target[Any] | None:
    try:
        return targets.get(name)
    except TargetUnavailable:
        return None


def target_or_skip(name: str) -> targets.Target[Any]:
    found = ready(name)
    if found is None:
        (pytest.fail if {name, "all"} & set(REQUIRED) else pytest.skip)(f"target '{name}' is not ready here")
    return found


PRECISIONS = [(name, p) for name in targets.names() for p in getattr(ready(name), "SCHEMES", ["any"])]


@pytest.mark.parametrize("name", targets.names())
def test_a_module_has_the_contract_s_signatures(name: str) -> None:
    module = target_or_skip(name)
    for method, expected in inspect.getmembers(targets.Target, inspect.isfunction):
        if not method.startswith("_"):
            wanted = list(inspect.signature(expected).parameters.values())[1:]
            found = list(inspect.signature(getattr(module, method)).parameters.values())
            assert [(p.name, p.kind, p.default) for p in found] == [(p.name, p.kind, p.default) for p in wanted]
    assert get_args(targets.Form).count(module.CONSUMES) == 1
    assert module.SUFFIX.startswith(".")
    assert set(module.SCHEMES) <= set(targets.PRECISIONS)
    assert (module.SCHEMES.get("int8") is not None) == ("int8" in module.SCHEMES)
    assert issubclass(module.Options, targets.Options)
    assert is_dataclass(module.Options)
    environment = module.environment(options=module.Options())
    assert set(environment.fast) <= set(targets.PRECISIONS)
    json.dumps({field.name: getattr(module.Options(), field.name) for field in fields(module.Options)})


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize(("name", "precision"), PRECISIONS)
def test_it_answers_like_pytorch_at_every_batch(
    name: str, precision: targets.Precision, batch: targets.Batch, deployed: Project
) -> None:
    target = target_or_skip(name)
    run = Run(
        recipe.read(deployed.recipe, precision=precision), deployed.folder, Cache(deployed.folder / "build/small")
    )
    way, options = Deployment(run, name, precision), target.Options(threads=1, batch=batch)
    made = compile(way.source, name, way.program, run.calibration, run.build, options=options)
    assert made.path.exists()
    needs = targets.needs(name, made.path, options=options)
    assert needs.packages
    assert all(version(package) in SpecifierSet(wanted) for package, wanted in needs.packages.items())
    if made.environment.unmeasured:
        with pytest.raises(TargetUnavailable, match=re.escape(made.environment.unmeasured)):
            load_artifact(made)
        return
    images = run.evaluation.images[:9].copy()
    predict, expected = load_artifact(made), eager(way.program.module())(images)
    found = predict(images)
    assert found.dtype == np.float32
    assert sqnr_db(expected, found) > LEAST_DB[precision]
    np.testing.assert_allclose(np.concatenate([predict(image[None]) for image in images]), found, atol=1e-4)
    executed = target.executed(made.path, precision=precision, options=options)
    assert sorted(layer.kind for layer in executed) == ["convolution", "convolution", "matrix product"]
    if precision == "float32":
        assert {layer.precision for layer in executed} == {"float32"}


def test_the_environment_names_runtime_and_machine() -> None:
    for target in filter(None, map(ready, targets.names())):
        found = target.environment(options=target.Options())
        assert found.version[0].isdigit()
        assert found.system == targets.system()


def test_targets_of_one_scheme_share_one_quantized_model(deployed: Project) -> None:
    """OpenVINO on a GPU, whose scheme hangs on no processor, has that of TorchScript."""
    path = deployed.folder / "gpu.toml"
    path.write_text(deployed.recipe.read_text().replace("[targets.openvino]", '[targets.openvino]\ndevice = "GPU"'))
    run = Run(recipe.read(path), path, Cache(deployed.folder / "build/small"))
    programs = {name: Deployment(run, name, "int8").program for name in ("openvino", "torchscript", "onnxruntime")}
    folders = {name: program.path.parent for name, program in programs.items() if isinstance(program, Quantized)}
    assert folders["openvino"] == folders["torchscript"]
    assert folders["openvino"] != folders["onnxruntime"]


def test_an_unknown_name_is_told_with_the_nearest() -> None:
    with pytest.raises(InputError, match="unknown target 'opnvino'; did you mean 'openvino'"):
        targets.get("opnvino")


def test_a_missing_package_is_this_machine_s_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)
    monkeypatch.delitem(sys.modules, "bitferry.targets.openvino", raising=False)
    with pytest.raises(TargetUnavailable, match=r"needs the Python package 'openvino'.*pip install 'openvino=="):
        targets.get("openvino")


@pytest.mark.parametrize(
    ("table", "told"),
    [
        ("thread = 2", "unknown key 'targets.openvino.thread', did you mean 'threads'?"),
        ("threads = 0", "targets.openvino: threads must be 1 to 1024, not 0"),
        ('threads = "two"', "targets.openvino.threads: Input should be a valid integer (found 'two')"),
        ('batch = "all"', "targets.openvino.batch: Input should be 'dynamic' (found 'all')"),
        ("batch = 0", 'batch must be 1 to 4096, or "dynamic", not 0'),
        ("batch = true", "targets.openvino.batch: Input should be a valid integer (found True)"),
    ],
)
def test_an_option_that_a_target_lacks_is_refused(project: Project, table: str, told: str) -> None:
    project.edit(("[targets.openvino]", f"[targets.openvino]\n{table}"))
    assert told in project.refused("compile", "small.toml")


@pytest.mark.parametrize("batch", ['"dynamic"', "3"])
def test_the_recipe_chooses_the_batch(batch: str, deployed: Project, tmp_path: Path) -> None:
    again = Project(shutil.copytree(deployed.folder, tmp_path / "project"))
    again.edit(("[targets.openvino]", f"[targets.openvino]\nbatch = {batch}"))
    done = again.bitferry("deploy", "small.toml", "--quick", "--json")
    assert done.returncode in (0, 1), done.stderr  # 1: a busy machine
    (found,) = json.loads(done.stdout)
    assert found["latency"]["batch"] == (1 if "dyn" in batch else 3)
    assert found["accuracy"] == verdicts(deployed)["openvino"]["accuracy"]
    bundle = Path(again.folder / found["bundle"])
    assert json.loads((bundle / "manifest.json").read_text())["model"]["options"]["batch"] == json.loads(batch)


def test_a_new_target_is_one_file(deployed: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As docs/add-a-target.md says: found, built, verified in a fresh process, bundled and run."""
    assert (
        f"```python\n{(FAKE / 'reference.py').read_text()}```" in (FAKE.parents[1] / "docs/add-a-target.md").read_text()
    )
    again = Project(shutil.copytree(deployed.folder, tmp_path / "project"))
    monkeypatch.setenv(targets.FOLDERS, str(FAKE))
    asked = ("--target", "reference", "--precision", "float32", "--quick", "--json")
    done = again.bitferry_process("deploy", "small.toml", *asked)
    assert done.returncode in (0, 1), done.stderr
    (found,) = json.loads(done.stdout)
    assert found["target"] == "reference"
    assert found["accuracy"]["judged"]["drop_upper_pp"] <= found["budget_drop_pp"]
    assert {layer["precision"] for layer in found["execution"]["layers"]} == {"float32"}
    assert all(file["score_difference"] < 1e-3 for file in found["golden"]["files"])
    tied = json.loads((again.folder / found["bundle"] / "manifest.json").read_text())["tied"]
    assert tied["packages"]["onnx"] == f"=={version('onnx')}"  # it states nothing, so the very version


@pytest.mark.parametrize(
    ("version", "wanted"),
    [("2026.4.1", ">=2026.4,<2027"), ("1.31.1", ">=1.31,<2"), ("9.0", ">=9.0,<10"), ("3", ">=3.0,<4")],
)
def test_a_range_ends_before_the_next_major_release(version: str, wanted: str) -> None:
    assert targets.since(version) == wanted


def test_what_runs_elsewhere_says_where() -> None:
    target_or_skip("coreml")
    assert targets.needs("coreml", Path("model.mlpackage"), options=targets.get("coreml").Options()).system == "Darwin"


@pytest.mark.parametrize(
    ("machine", "isa", "limit", "bits"),
    [
        ("x86_64", ("avx2",), "", 7),
        ("x86_64", ("avx2", "avx512f"), "", 7),
        ("x86_64", ("avx2", "avx_vnni"), "", 8),
        ("AMD64", ("avx512_vnni",), "", 8),
        ("x86_64", ("avx512_vnni",), "AVX2", 7),
        ("x86_64", ("avx512_vnni", "amx_int8"), "AVX512_CORE", 7),
        ("x86_64", ("avx512_vnni", "amx_int8"), "avx512_core_vnni", 8),
        ("x86_64", ("avx2",), "AVX512_CORE_VNNI", 7),
        ("aarch64", ("asimd",), "", 8),
    ],
)
def test_weights_have_7_bits_where_kernels_saturate_with_8(
    monkeypatch: pytest.MonkeyPatch, machine: str, isa: tuple[str, ...], limit: str, bits: int
) -> None:
    monkeypatch.setattr(platform, "machine", lambda: machine)
    monkeypatch.setattr(targets, "cpu_isa", lambda: isa)
    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA", raising=False)
    if limit:
        monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", limit)
    assert targets.int8_weight_bits() == bits


@pytest.mark.parametrize(
    ("name", "options", "bits"),
    [
        ("openvino", {}, 7),
        ("openvino", {"device": "GPU"}, 8),
        ("openvino", {"device": "NPU"}, 8),
        ("openvino", {"device": "AUTO:GPU,CPU"}, 7),
        ("openvino", {"device": "AUTO"}, 7),
        ("onnxruntime", {}, 7),
        ("onnxruntime", {"provider": "CUDA"}, 8),
        ("torchscript", {}, 8),
        ("executorch", {}, 8),
        ("coreml", {}, 8),
    ],
)
def test_only_kernels_of_the_processor_cost_weights_a_bit(
    name: str, options: dict[str, str], bits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What runs on a GPU, in float or by kernels that do not saturate keeps 8 bits; asked of the options, when asked."""
    target = target_or_skip(name)
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(targets, "cpu_isa", lambda: ("avx2",))
    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA", raising=False)
    scheme = targets.scheme(target, "int8", target.Options(**options))
    assert scheme is not None
    assert scheme.weight_bits == bits
    monkeypatch.setattr(targets, "cpu_isa", lambda: ("avx2", "avx_vnni"))
    assert targets.scheme(target, "int8", target.Options(**options)) == target.SCHEMES["int8"]
    assert targets.scheme(target, "float32", target.Options(**options)) is None
