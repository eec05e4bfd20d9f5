"""A uid without a passwd entry, as a container gives one: it has neither a name nor a home, and everything still runs."""

import os
import subprocess
import sys
from pathlib import Path

from tests.conftest import ROOT

ASKED = """
import getpass, os, pwd, sys
def nobody(uid):
    raise KeyError(f"getpwuid(): uid not found: {uid}")
pwd.getpwuid = nobody
os.getuid = os.geteuid = lambda: 54321
"""
"""The same as `setpriv --reuid 54321`, for who may not do that."""


def run(program: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run Python for such a uid with no environment but PATH and what is named."""
    path = {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, "-c", ASKED + program], env=path | environment, capture_output=True, text=True, check=False
    )


def test_a_user_without_a_name_or_a_home_gets_both() -> None:
    done = run(
        "from bitferry import device; from pathlib import Path; print(getpass.getuser(), Path.home(), os.path.expanduser('~/x'))"
    )
    assert done.stdout.split() == ["uid-54321", "/nonexistent", "/nonexistent/x"], done.stderr


def test_what_the_environment_tells_is_kept() -> None:
    done = run("from bitferry import device; print(getpass.getuser(), os.environ['HOME'])", USER="robot", HOME="/srv")
    assert done.stdout.split() == ["robot", "/srv"], done.stderr


def test_a_home_that_is_set_to_nothing_is_none() -> None:
    done = run("from bitferry import device; print(os.environ['HOME'])", HOME="")
    assert done.stdout.split() == ["/nonexistent"], done.stderr


def test_openvino_is_imported_without_its_telemetry(tmp_path: Path) -> None:
    for home in ({}, {"HOME": str(tmp_path)}):
        done = run("from bitferry.targets import openvino; print(openvino._found())", **home)
        assert "CPU" in done.stdout, done.stderr
        assert done.stderr == ""
    assert list(tmp_path.iterdir()) == []  # no file about consent


def test_ray_starts_without_a_home_to_write_to() -> None:
    program = "from bitferry.pipeline.nightly import ray_session as it; it.connect(None); print(len(it.listed())); it.disconnect()"
    done = run(program, HOME="/dev/null/home")
    assert done.stdout.split() == ["1"], done.stderr
