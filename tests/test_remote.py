"""A bundle proved on another machine: a real sshd on loopback, a Python there that has no torch and no bitferry."""

import json
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
import zipfile
from dataclasses import replace
from pathlib import Path, PurePosixPath

import numpy as np
import pytest

from bitferry import targets
from bitferry.device import commands
from bitferry.device.errors import InputError, StageFailed, TargetUnavailable
from bitferry.device.preprocess import Preprocessing
from bitferry.pipeline import recheck
from bitferry.pipeline.report import record
from bitferry.pipeline.shipping import remote
from bitferry.pipeline.shipping.ssh import Device, Login, command
from tests.board import Board, keygen
from tests.conftest import ROOT, Project, plain_environment, subset
from tests.test_compare import expect, rewrite


@pytest.fixture
def place(tmp_path: Path) -> Path:
    return tmp_path / 'a "bundle\'s" place'


@pytest.fixture
def bundle(deployed: Project, place: Path) -> Path:
    return Path(shutil.copytree(deployed.folder / "dist/small-openvino-1.0.0", place / "it's $HOME; a bundle"))


@pytest.mark.parametrize("target", ["openvino", "onnxruntime"])
def test_the_numbers_of_another_machine_make_the_verdict(
    deployed: Project, place: Path, board: Board, target: str, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = Path(shutil.copytree(deployed.folder / f"dist/small-{target}-1.0.0", place / "it's $HOME; a bundle"))
    data = deployed.folder / "evaluation.npz"
    there, here = board.verify(bundle, data), recheck.verify(bundle, data, effort="quick")
    assert there.outcome == "pass"
    assert (there.accuracy, there.images) == (here.accuracy, 600)
    assert (there.golden, there.score_limit) == (here.golden, here.score_limit)
    assert (there.environment, there.headline) == (here.environment, here.headline)
    assert there.timing.samples >= 120
    assert there.timing.median_ms > 0
    assert there.load_ms > 0
    assert there.verified_median_ms == here.verified_median_ms
    assert (there.host, here.host) == ("board", None)
    assert there.machine.hostname == socket.gethostname()
    assert there.machine.cpu == here.machine.cpu != ""
    assert there.reasons[-1].endswith("where it was verified")
    assert recheck.show(there, as_json=False) == 0
    shown = capsys.readouterr().out
    assert f"measured on {socket.gethostname()} (board): {there.machine.cpu}" in shown
    assert f"{target} {there.environment.version}" in shown
    assert recheck.show(there, as_json=True) == 0
    assert json.loads(capsys.readouterr().out)["machine"]["numpy"] == np.__version__


def test_a_bundle_built_unmeasured_gets_its_verdict_from_where_it_runs(
    deployed: Project, bundle: Path, board: Board
) -> None:
    fields = json.loads((bundle / "verdict.json").read_text()) | {"outcome": "unmeasured"}
    kept = {name: value for name, value in fields.items() if name not in ("accuracy", "latency", "execution")}
    rewrite(bundle, "verdict.json", json.dumps(kept))
    found = board.verify(bundle, deployed.folder / "evaluation.npz")
    assert found.outcome == "pass"
    text = (bundle / "manifest.json").read_text()
    verdict = json.loads(text)["verdict"]
    assert (verdict["outcome"], verdict["measured"]["images"]) == ("pass", 600)
    assert verdict["measured"]["machine"]["cpu"] == found.machine.cpu
    assert found.machine.hostname not in text
    assert not {"hostname", "host"} & {*verdict["measured"], *verdict["measured"]["machine"]}


def test_other_scores_than_expected_fail(bundle: Path, board: Board) -> None:
    scores = json.loads((bundle / "golden/expected.json").read_text())["files"]["golden-1.jpg"]["scores"]
    expect(bundle, "golden-1.jpg", [scores[1], scores[2], scores[0] + 9])
    found = board.verify(bundle)
    assert found.outcome == "fail"
    assert found.headline.startswith("does not answer as it was verified")
    assert found.reasons[0].startswith("golden-1.jpg: differs by ")
    expect(bundle, "golden-1.jpg", [float("nan")] * 3)
    assert board.verify(bundle).outcome == "fail"


def test_a_bundle_that_was_changed_is_not_even_copied(bundle: Path, board: Board) -> None:
    (bundle / "run.pyz").write_bytes(b"")
    told = board.refused(InputError, bundle)
    assert told.startswith(f"{bundle} is not as it was built (changed: run.pyz)")


def test_a_file_that_was_changed_on_the_way_is_found_there(bundle: Path, board: Board) -> None:
    spoil = 'if [ "$2" = check ]; then printf x >> bundle/model.bin; fi'
    python = board.program("spoils", f'{spoil}\nexec {shlex.quote(board.python)} "$@"')
    told = board.refused(InputError, bundle, python)
    assert told.startswith(f"on board, {bundle} is not as it was built (changed: model.bin)")


def test_an_older_bundle_s_runner_is_refused(bundle: Path, board: Board) -> None:
    with zipfile.ZipFile(bundle / "run.pyz") as old:
        contents = {name: old.read(name) for name in old.namelist() if name != "bitferry/device/measure.py"}
    with zipfile.ZipFile(bundle / "run.pyz", "w") as new:
        for name, content in contents.items():
            new.writestr(name, content)
    rewrite(bundle, "run.pyz", (bundle / "run.pyz").read_bytes())
    assert "built by an older bitferry" in board.refused(InputError, bundle)


class TestMachines:
    """Machines that cannot be reached, let nobody in, or lack something."""

    def test_a_machine_that_is_not_there(self, bundle: Path, board: Board) -> None:
        with pytest.raises(TargetUnavailable, match="nowhere cannot be reached .*Connection refused"):
            remote.verify(bundle, "nowhere", ssh=board.ssh)
        with pytest.raises(TargetUnavailable, match=r"host\.invalid cannot be reached .*Could not resolve hostname"):
            remote.verify(bundle, "host.invalid", ssh=board.ssh)

    def test_a_host_key_that_is_not_known(self, bundle: Path, board: Board, tmp_path: Path) -> None:
        other = replace(board, ssh=(*board.ssh, "-o", f"UserKnownHostsFile={tmp_path}/none"))
        assert "the host key of board is not known here; run `ssh board` once" in other.refused(
            TargetUnavailable, bundle
        )
        assert not (tmp_path / "none").exists()

    def test_a_host_key_that_is_another(self, bundle: Path, board: Board, tmp_path: Path) -> None:
        name = (board.folder / "known").read_text().split()[0]
        (tmp_path / "known").write_text(f"{name} {keygen(tmp_path / 'other')}")
        other = replace(board, ssh=(*board.ssh, "-o", f"UserKnownHostsFile={tmp_path}/known"))
        assert "board shows another host key than the one known" in other.refused(TargetUnavailable, bundle)

    def test_a_key_that_is_not_let_in(self, bundle: Path, board: Board, tmp_path: Path) -> None:
        keygen(tmp_path / "stranger")
        client = (board.folder / "client").read_text().replace(f"{board.folder}/key", f"{tmp_path}/stranger")
        (tmp_path / "client").write_text(client)
        other = replace(board, ssh=("ssh", "-F", str(tmp_path / "client")))
        told = other.refused(TargetUnavailable, bundle)
        assert "board lets nobody in with the keys at hand" in told
        assert "Permission denied (publickey)" in told

    def test_no_ssh_here(self, bundle: Path) -> None:
        with pytest.raises(TargetUnavailable, match="no-ssh cannot be run"):
            remote.verify(bundle, "board", ssh=("no-ssh",))

    @pytest.mark.parametrize("host", ["", "-oProxyCommand=true", "a b", "a@", "@a", "a@-b", "-a@b", "a\n", "a@b@c"])
    def test_what_is_no_machine(self, bundle: Path, host: str) -> None:
        with pytest.raises(InputError, match="is no machine"):
            remote.verify(bundle, host)

    def test_an_ssh_command_is_split_as_a_shell_would(self) -> None:
        assert command("ssh -p 2222 -i 'a key'") == ("ssh", "-p", "2222", "-i", "a key")
        with pytest.raises(InputError, match="is no command: no closing quotation"):
            command("ssh -i 'a key")
        with pytest.raises(InputError, match="the ssh command is empty"):
            Login("board", command(" "))

    def test_no_python(self, bundle: Path, board: Board) -> None:
        told = board.refused(TargetUnavailable, bundle, "/usr/bin/no python")
        assert "board has no '/usr/bin/no python' that can be run" in told
        assert "is no Python: it says hello" in board.refused(StageFailed, bundle, board.program("hello", "echo hello"))
        with pytest.raises(InputError, match="is no program"):
            remote.verify(bundle, "board", python="-c")

    def test_an_old_python(self, bundle: Path, board: Board) -> None:
        claim = 'exec "$real" -c "import sys; sys.version_info = (3, 9, 2, \'final\', 0); $2"'
        old = board.program("python3.9", f"real={shlex.quote(board.python)}\n{claim}")
        assert "board has Python 3.9.2; 3.11 or newer is needed" in board.refused(TargetUnavailable, bundle, old)

    def test_a_python_without_the_runtime(self, bundle: Path, board: Board, tmp_path: Path) -> None:
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv"], check=True)
        python = f"{tmp_path}/venv/bin/python"
        told = board.refused(TargetUnavailable, bundle, python)
        assert f"'{python}' on board lacks the package 'numpy'" in told
        assert f"`{python} -m pip install 'numpy>=2.0' 'pillow>=11' 'openvino==" in told

    def test_a_disk_that_is_full(self, bundle: Path, board: Board) -> None:
        small = board.temporary / "small"
        small.mkdir()
        mount = ["mount", "-t", "tmpfs", "-o", "size=16k", "none", str(small)]
        try:
            if shutil.which("mount") is None or subprocess.run(mount, capture_output=True, check=False).returncode:
                pytest.skip("no small disk can be mounted here")
            try:
                device = Device(Login("board", board.ssh), board.python)
                files = {f"bundle/{path.name}": path for path in bundle.iterdir() if path.is_file()}
                with pytest.raises(TargetUnavailable, match=r"no space left on board for [\d.]+ MB in "):
                    device.send(files, PurePosixPath(str(small)))
            finally:
                subprocess.run(["umount", small], check=True)
        finally:
            small.rmdir()

    def test_a_step_that_never_ends_is_given_up(self, board: Board) -> None:
        with pytest.raises(StageFailed, match="board was not done within 1 s"):
            Login("board", board.ssh).run("exec sleep 60", seconds=1)


def test_a_crash_there_is_told_and_cleaned_up(bundle: Path, board: Board) -> None:
    python = board.program("dies", f'[ "$2" = selftest ] && kill -9 $$\nexec {shlex.quote(board.python)} "$@"')
    assert "`run.pyz selftest` failed on board: it was ended by signal 9" in board.refused(StageFailed, bundle, python)


def test_ctrl_c_ends_what_runs_there_and_takes_its_folder_away(bundle: Path, board: Board) -> None:
    held = board.folder / "held"
    hold = f'if [ "$2" = selftest ]; then echo $$ > {shlex.quote(str(held))}; exec sleep 600; fi'
    python = board.program("holds", f'{hold}\nexec {shlex.quote(board.python)} "$@"')
    code = "import signal, sys; from pathlib import Path; from bitferry.pipeline.shipping import remote; "
    code += "signal.signal(signal.SIGINT, signal.default_int_handler); "  # a background job of a shell ignores it
    code += "remote.verify(Path(sys.argv[1]), 'board', python=sys.argv[2], ssh=sys.argv[3:])"
    words = [sys.executable, "-c", code, str(bundle), python, *board.ssh]
    started = subprocess.Popen(
        words, cwd=ROOT, stderr=subprocess.PIPE, text=True, env=plain_environment(), start_new_session=True
    )
    while not (held.exists() and held.read_text().strip()):
        assert started.poll() is None, started.communicate()[1]
        time.sleep(0.05)
    assert list(board.temporary.iterdir())
    started.send_signal(signal.SIGINT)
    told = started.communicate(timeout=60)[1]
    assert "KeyboardInterrupt" in told
    assert not list(board.temporary.iterdir())
    gone = Path(f"/proc/{held.read_text().strip()}")
    while gone.exists() and "\nState:\tZ" not in (gone / "status").read_text():  # it was told to end; now it does
        time.sleep(0.05)


class TestMeasure:
    """`python run.pyz measure`."""

    def measure(
        self, bundle: Path, python: Path | str, *options: str, code: int = 0
    ) -> "subprocess.CompletedProcess[str]":
        words = [str(python), str(bundle / "run.pyz"), "measure", "--seconds", "0.2", *options]
        done = subprocess.run(words, capture_output=True, text=True, check=False, cwd=bundle.parent)
        assert done.returncode == code, done.stderr
        return done

    def test_every_sample_and_every_answer_is_given(self, bundle: Path, bare: Path) -> None:
        contract = Preprocessing.from_json(json.loads((bundle / "manifest.json").read_text())["preprocessing"])
        images = np.stack([contract.fit(image) for image in subset("evaluation", 90)["images"]])
        np.savez(bundle.parent / "given.npz", images=images)
        found = json.loads(self.measure(bundle, bare, "--json", "--images", "given.npz").stdout)
        assert len(found["seconds"]) == 40
        assert min(map(min, found["seconds"])) > 0
        assert found["environment"]["runtime"] == "openvino"
        assert found["machine"]["python"].startswith("3.")
        scores = np.load(bundle.parent / "scores.npy")
        recorded = record.read_answers(bundle / "answers.npz").answers
        assert recorded is not None
        assert (scores.argmax(axis=1) == recorded[:90]).all()
        assert self.measure(bundle, bare).stdout.split(" ms, the median of ")[1].endswith(f"{socket.gethostname()}\n")

    def test_what_are_no_images(self, bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        (tmp_path / "text.npz").write_text("text")
        np.savez(tmp_path / "none.npz", pictures=np.zeros(1))
        np.save(tmp_path / "float.npy", np.zeros((2, 16, 16, 3)))
        np.save(tmp_path / "large.npy", np.zeros((2, 32, 32, 3), np.uint8))
        np.save(tmp_path / "object.npy", np.array([{}]))
        for name, told in (
            ("text.npz", "holds no images"),
            ("none.npz", "has no array `images`"),
            ("gone.npy", "No such file"),
            ("float.npy", "holds float64 of shape (2, 16, 16, 3); expected uint8 N×16×16×3"),
            ("large.npy", "holds uint8 of shape (2, 32, 32, 3)"),
            ("object.npy", "holds no images"),
        ):
            asked = ["measure", "--seconds", "0.1", "--images", str(tmp_path / name)]
            assert commands.main(targets.get("openvino"), bundle, asked) == 2
            error = capsys.readouterr().err
            assert told in error
            assert error.count("\n") == 1
        with pytest.raises(SystemExit):
            commands.main(targets.get("openvino"), bundle, ["measure", "--seconds", "0"])
        assert "must be above 0" in capsys.readouterr().err
