"""`bitferry doctor` and `bitferry targets`: each finding by an input that has it and one that has not."""

import json
import os
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from bitferry import targets
from bitferry.pipeline import doctor
from bitferry.pipeline.doctor import Check, Report, State
from bitferry.pipeline.report import doctor as printed
from tests.conftest import BITFERRY, Project

FINE = """
from bitferry.device.errors import TargetUnavailable
from bitferry.targets import Environment, Options
CONSUMES, SUFFIX, SCHEMES = "onnx", ".x", {"float32": None, "float16": None}
def environment(*, options):
    return Environment("mine", "1.2.3", "a board", (), "Linux", ("board 0", "board 1"), ("float16",), UNMEASURED)
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Give a folder that doctor's processes take targets and packages from, before all others."""
    monkeypatch.setenv("BITFERRY_TARGETS", str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return tmp_path


def state(name: str) -> State:
    return doctor._state(name)


def only(checks: list[Check]) -> Check:
    (check,) = checks
    return check


def test_the_whole_report_of_this_machine(tmp_path: Path) -> None:
    done = subprocess.run(
        [BITFERRY, "doctor", "--json", "--build", tmp_path / "build"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout)
    assert found["able"] is True
    names = [check["name"] for check in found["checks"]]
    for name in ("Python", "PyTorch", "packages", "CPU", "cores", "memory", "disk", "GPU", "targets"):
        assert name in names
    states = {one["name"]: one for one in found["targets"]}
    assert set(states) == set(targets.names())
    assert states["openvino"]["ready"] == "yes"
    assert "float32" in states["openvino"]["fast"]
    assert set(states["openvino"]["fast"]) <= set(states["openvino"]["precisions"])
    assert any(one.startswith("CPU: ") for one in states["openvino"]["found"])
    assert not (tmp_path / "build").exists()


def test_a_missing_package_is_told_with_the_command_that_installs_it(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert state("onnxruntime").ready == "yes"
    (folder / "packages").mkdir()
    (folder / "packages/onnxruntime.py").write_text(
        "raise ModuleNotFoundError(\"No module named 'onnxruntime'\", name='onnxruntime')"
    )
    monkeypatch.setenv("PYTHONPATH", str(folder / "packages"))
    found = state("onnxruntime")
    assert (found.ready, found.reason) == ("no", "the Python package 'onnxruntime' is not installed")
    assert found.install == "pip install 'onnxruntime==1.31.*'"
    (folder / "theirs.py").write_text("import no_such_vendor.runtime")
    found = state("theirs")
    assert (found.ready, found.install) == ("no", "pip install no_such_vendor")


@pytest.mark.parametrize(
    ("code", "told"),
    [
        ("raise OSError('libvendor.so.3: cannot open shared object file')", "OSError: libvendor.so.3: cannot open shared"),
        ("raise ImportError('libvendor.so.3: undefined symbol: f')", "ImportError: libvendor.so.3: undefined symbol: f"),
        ("import bitferry.pipeline.no_such_module", "ModuleNotFoundError: No module named 'bitferry.pipeline.no_such_module'"),
        ("def f(:", "SyntaxError: invalid syntax"),
        ("import sys; sys.exit(3)", "the process ended with 3 and said nothing"),
        ("import os; os.abort()", "the process was ended by SIGABRT"),
        ("SCHEMES = {}", "AttributeError: module 'bitferry.targets.broken' has no attribute 'environment'"),
    ],
)  # fmt: skip
def test_a_target_that_breaks_is_told_and_takes_nothing_down(folder: Path, code: str, told: str) -> None:
    (folder / "broken.py").write_text(code)
    found = state("broken")
    assert (found.ready, found.install) == ("no", "")
    assert told in found.reason


def test_a_target_that_never_answers_is_given_up(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "PATIENCE", 0.5)
    (folder / "broken.py").write_text("import time; time.sleep(60)")
    assert "no answer within 0.5 seconds" in state("broken").reason


@pytest.mark.parametrize(("unmeasured", "ready"), [(None, "yes"), ("no board here", "builds")])
def test_a_target_from_another_folder_is_examined_alike(folder: Path, unmeasured: str | None, ready: str) -> None:
    (folder / "mine.py").write_text(
        f"UNMEASURED = {unmeasured!r}\n{FINE}import sys; print('noise'); print('more', file=sys.stderr)"
    )
    found = state("mine")
    assert found == State(
        "mine", ready, "mine 1.2.3", "a board", ("board 0", "board 1"), ("float32", "float16"), ("float16",), unmeasured or ""  # type: ignore[arg-type]
    )  # fmt: skip


def test_a_runtime_without_its_hardware_says_so_itself(folder: Path) -> None:
    (folder / "mine.py").write_text(
        "from bitferry.device.errors import TargetUnavailable\n"
        "def Options(): pass\ndef environment(*, options): raise TargetUnavailable('needs a licence file')"
    )
    assert state("mine") == State("mine", "no", reason="needs a licence file")


def test_pytorch_and_torchvision_that_do_not_fit_stop_everything(folder: Path) -> None:
    (folder / "torch.py").write_text("__version__ = '2.14.0'\ndef zeros(*_): pass")
    (folder / "torchvision.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')")
    found = doctor._torch(doctor._answer(doctor.TORCH))
    assert found.grade == "problem"
    assert "RuntimeError: operator torchvision::nms does not exist" in found.found
    assert found.remedy == "pip install --force-reinstall 'torch==2.14.*' 'torchvision==0.29.*'"
    (folder / "torchvision.py").write_text(
        "from types import SimpleNamespace as S\n__version__ = '0.29.1'\nops = S(nms=lambda *_: 0)"
    )
    found = doctor._torch(doctor._answer(doctor.TORCH))
    assert found == Check("PyTorch", "ok", "2.14.0, torchvision 0.29.1, which fit each other")


def test_without_numpy_the_doctor_still_speaks(folder: Path) -> None:
    (folder / "numpy.py").write_text("raise ImportError('numpy is broken')")
    done = subprocess.run([BITFERRY, "doctor", "--json"], capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr
    found = json.loads(done.stdout)
    assert found["able"] is False
    assert found["checks"][-1]["found"] == "cannot be loaded: numpy is broken"
    assert found["checks"][-1]["remedy"] == "pip install --force-reinstall 'numpy>=2.0'"


def test_packages_missing_or_of_other_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    assert only(list(doctor._packages())).grade == "ok"
    monkeypatch.setattr(doctor, "_pins", lambda: ["no-such-package>=1", "numpy==1.*", "rich>=13", "numpy==2.*"])
    missing, other = doctor._packages()
    assert missing == Check("packages", "problem", "missing: no-such-package", "pip install 'no-such-package>=1'")
    assert (other.grade, other.remedy) == ("note", "pip install 'numpy==1.*'")


def test_settings_that_disturb_are_noted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in (*doctor.THREADS, *doctor.PRECISION):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("BITFERRY_TARGETS", str(tmp_path))
    assert list(doctor._variables()) == []
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("ONEDNN_DEFAULT_FPMATH_MODE", "BF16")
    monkeypatch.setenv("BITFERRY_TARGETS", f"{tmp_path}{os.pathsep}{tmp_path}/none")
    threads, precision, lost = doctor._variables()
    assert (threads.grade, threads.remedy) == ("note", "unset OMP_NUM_THREADS")
    assert precision.found.startswith("ONEDNN_DEFAULT_FPMATH_MODE=BF16 changes what oneDNN makes of float32")
    assert lost.found == f"BITFERRY_TARGETS names {tmp_path}/none, which is no folder"


def test_a_build_folder_that_cannot_be_made_is_a_problem(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert doctor._disk(tmp_path / "a/b").grade in ("ok", "note")
    (tmp_path / "file").write_text("")
    assert doctor._disk(tmp_path / "file/b").grade == "problem"
    for free, grade in ((1e8, "note"), (1e12, "ok")):
        monkeypatch.setattr(shutil, "disk_usage", lambda _, free=free: SimpleNamespace(free=free))
        assert doctor._disk(tmp_path).grade == grade


def test_memory_counts_what_the_container_allows(monkeypatch: pytest.MonkeyPatch) -> None:
    files = {"/proc/meminfo": "MemTotal: 9 kB\nMemAvailable:   8000000 kB\n", "/sys/fs/cgroup/memory.max": "max\n"}
    monkeypatch.setattr(doctor, "_text", lambda path: files.get(str(path), ""))
    assert doctor._memory() == Check("memory", "ok", "8.2 GB available")
    files["/sys/fs/cgroup/memory.max"] = "1000000000\n"
    assert (doctor._memory().grade, doctor._memory().found) == ("note", "1.0 GB available")
    files.clear()
    assert doctor._memory().found == "not known on this system"


def test_a_cpu_without_int8_instructions_is_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    for able, grade in ((("avx2",), "note"), (("avx2", "avx512_vnni"), "ok"), (("asimd", "asimddp"), "ok"), ((), "ok")):
        monkeypatch.setattr(targets, "cpu_isa", lambda able=able: able)
        assert next(doctor._cpu()).grade == grade
    monkeypatch.setattr(targets, "usable_cpus", lambda: 0)
    assert list(doctor._cpu())[1].grade == "note"


@pytest.mark.parametrize(
    ("script", "grade", "told"),
    [
        ("echo 'Orin, 8.7, 540.4'", "ok", "Orin, 8.7, 540.4 (name, compute capability, driver)"),
        ("echo 'cannot talk to the driver' >&2; exit 9", "note", "nvidia-smi fails: cannot talk to the driver"),
        (None, "ok", "no NVIDIA driver; what is built for a GPU is not measured here"),
    ],
)
def test_the_gpu_is_what_its_driver_says(
    script: str | None, grade: str, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    if script is not None:
        (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / "nvidia-smi").chmod(0o755)
    found = doctor._gpu()
    assert (found.grade, found.found) == (grade, told)


def test_no_target_at_all_is_a_problem_and_one_is_enough() -> None:
    no, builds = State("a", "no"), State("b", "builds")
    for states, able in (((no,), False), ((no, builds), True), ((), False)):
        assert Report((doctor._ready(states),), states).able is able


def test_people_read_the_remedies_and_the_commands(capsys: pytest.CaptureFixture[str]) -> None:
    found = Report(
        (Check("disk", "problem", "[bold] is full", "make room"),),
        (
            State("a", "no", reason="the package is missing", install="pip install 'a[x]==1.*'"),
            State("b", "yes", "b 1", "a chip"),
        ),
    )
    printed.show(found, as_json=False)
    said = capsys.readouterr().out
    for text in (
        "[bold] is full",
        "→ make room",
        "a: the package is missing",
        "    pip install 'a[x]==1.*'",
        "see disk",
    ):
        assert text in said
    printed.show(Report((), found.targets), as_json=False)
    said = capsys.readouterr().out
    assert "ready: bitferry deploy RECIPE --target b" in said
    assert "b: runs on a chip" in said
    assert "a: runs on" not in said
    printed.show_targets(found.targets, as_json=False)
    assert "pip install 'a[x]==1.*'" in capsys.readouterr().out


def test_the_command_line_gives_what_was_found(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    able = Report((Check("a", "note", "b"),), (State("c", "yes"),))
    unable = Report((Check("a", "problem", "b"),), (State("c", "yes"),))
    for report, code in ((able, 0), (unable, 2)):
        monkeypatch.setattr(doctor, "examine", lambda build, report=report: report)
        done = project.bitferry("doctor", "--json")
        said: dict[str, Any] = json.loads(done.stdout)
        assert (done.returncode, said["able"]) == (code, code == 0)
    assert "Example: bitferry doctor" in project.bitferry("doctor", "--help").stdout
