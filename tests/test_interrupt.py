"""Ctrl-C at any moment: exit 130 or a finished run, never a crash; and stages from another thread than the main one."""

import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from bitferry.pipeline import api, interrupt, progress
from tests.conftest import BITFERRY, Project, begun, plain_environment

STOPPED = "stopped; what was finished is kept, run the same command to go on"


def program(tmp_path: Path, body: str) -> "subprocess.Popen[str]":
    """Run Python that says `ready` when Ctrl-C is handled, in a session of its own."""
    head = "import sys, time\nfrom bitferry.pipeline import interrupt, progress\ninterrupt.end_on_interrupt()\n"
    (tmp_path / "body.py").write_text(head + body)
    path = os.pathsep.join([str(Path(__file__).parents[1]), *sys.path])
    running = subprocess.Popen(
        [sys.executable, tmp_path / "body.py"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        start_new_session=True, env=plain_environment(PYTHONPATH=path),
    )  # fmt: skip
    assert running.stdout
    assert running.stdout.readline() == "ready\n"
    return running


def ended(running: "subprocess.Popen[str]", times: int = 1) -> tuple[int, str, str]:
    with running:
        for _ in range(times):
            os.killpg(running.pid, signal.SIGINT)
            time.sleep(0.2)
        out, told = running.communicate(timeout=60)
    return running.returncode, out, told


def test_it_ends_between_two_items_and_what_is_open_is_closed(tmp_path: Path) -> None:
    body = """
try:
    for item in progress.track(range(1000), "count", total=1000):
        print("ready" if item == 0 else "", flush=True, end="\\n" if item == 0 else "")
        time.sleep(0.05)
except interrupt.Ended:
    print("cleaned up", flush=True)
    interrupt.leave()
"""
    code, out, told = ended(program(tmp_path, body))
    assert (code, out) == (130, "cleaned up\n")
    assert told.splitlines()[-1] == STOPPED


def test_runtimes_that_came_and_went_leave_a_signal_a_stack(tmp_path: Path) -> None:
    """OpenVINO gives signal handlers a stack that goes with its Core; a handler without one is a segmentation fault."""
    body = f"""
from pathlib import Path
import numpy as np
from onnx import TensorProto, helper, save
from bitferry import targets

nodes = [
    helper.make_node("Cast", ["image"], ["float"], to=TensorProto.FLOAT),
    helper.make_node("ReduceMean", ["float"], ["scores"], axes=[1, 2], keepdims=0),
]
image = helper.make_tensor_value_info("image", TensorProto.UINT8, ["N", 4, 4, 3])
scores = helper.make_tensor_value_info("scores", TensorProto.FLOAT, ["N", 3])
folder = Path({str(tmp_path)!r})
save(helper.make_model(helper.make_graph(nodes, "mean", [image], [scores]), opset_imports=[helper.make_opsetid("", 13)],
     ir_version=8), folder / "mean.onnx")
loaded = []
for name in ("openvino", "onnxruntime"):
    target = targets.get(name)
    options = target.Options()
    target.environment(options=options)
    target.compile(folder / "mean.onnx", folder / f"mean{{target.SUFFIX}}", precision="float32", options=options)
    for _ in range(2):
        loaded.append(target.load(folder / f"mean{{target.SUFFIX}}", precision="float32", options=options))
        loaded[-1](np.zeros((1, 4, 4, 3), np.uint8))
while loaded:
    del loaded[0]
print("ready", flush=True)
time.sleep(60)
"""
    code, _, told = ended(program(tmp_path, body))
    assert (code, told.splitlines()[-1]) == (130, STOPPED)


@pytest.mark.parametrize("times", [1, 2])
def test_what_reaches_no_safe_point_is_ended_where_it_is(tmp_path: Path, times: int) -> None:
    """As a native call that takes long does not; no exception falls into it."""
    body = """
print("ready", flush=True)
try:
    while True:
        time.sleep(0.01)
except BaseException as error:
    print("raised", type(error), flush=True)
"""
    code, out, told = ended(program(tmp_path, body), times)
    assert (code, out) == (130, "")
    assert told.splitlines()[-1] == STOPPED


def test_waiting_for_another_process_ends_at_once_and_the_rest_is_closed(tmp_path: Path) -> None:
    body = """
import subprocess
try:
    with interrupt.waiting("other"):
        print("ready", flush=True)
        subprocess.run(["sleep", "600"], process_group=0)
except interrupt.Ended:
    with interrupt.waiting("cleaning up"):
        subprocess.run(["true"])
    print("cleaned up", flush=True)
    interrupt.leave()
"""
    code, out, _ = ended(program(tmp_path, body))
    assert (code, out) == (130, "cleaned up\n")


def test_a_long_stage_ends_early_first_and_the_program_then(tmp_path: Path) -> None:
    body = """
from functools import partial
with interrupt.until_stopped(partial(progress.stage, "search")) as stopped:
    print("ready", flush=True)
    while not stopped():
        time.sleep(0.01)
    print("early", flush=True)
    try:
        while stopped():
            time.sleep(0.01)
    except interrupt.Ended:
        interrupt.leave()
"""
    code, out, told = ended(program(tmp_path, body), 2)
    assert (code, out) == (130, "early\n")
    assert "search     ends with the best as soon as there is one; Ctrl-C again ends the program" in told


def test_ctrl_c_in_a_stage_ends_with_130_and_the_next_run_goes_on(project: Project) -> None:
    command: list[str | Path] = [BITFERRY, "deploy", "small.toml", "--target", "openvino", "--quick"]
    for stage in ("train", "quantize", "answers"):
        with begun(command, stage, project) as running:
            time.sleep(random.uniform(0, 0.3))  # noqa: S311 - any moment will do
            os.killpg(running.pid, signal.SIGINT)
        assert running.returncode == 130
    assert not list((project.folder / "dist").glob("small-*"))
    done = project.bitferry_process(*map(str, command[1:]))
    assert done.returncode == 0, done.stderr


def test_stages_and_a_search_run_outside_the_main_thread(deployed: Project, tmp_path: Path) -> None:
    found: list[object] = []

    def work() -> None:
        interrupt.end_on_interrupt()
        for precision in ("int8", "auto"):
            run = api.open(deployed.recipe, build=tmp_path / "build", precision=precision, effort="quick")
            found.append(api.to(run, "openvino").verified.verdict.outcome)

    before = signal.getsignal(signal.SIGINT)
    other = threading.Thread(target=work)
    other.start()
    other.join()
    assert found == ["pass", "pass"]
    assert signal.getsignal(signal.SIGINT) is before
    assert progress.console is not None
