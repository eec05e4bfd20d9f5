"""What an earlier bitferry built and signed is checked, installed and tried by today's."""

import json
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import Project

BUNDLES = Path(__file__).with_name("bundles")
ARCHIVES = sorted(BUNDLES.glob("*.tar.gz"))


@pytest.mark.skipif(platform.machine() != "x86_64", reason="the bundles are for x86-64")
@pytest.mark.parametrize("archive", ARCHIVES, ids=lambda path: path.name)
def test_an_older_bundle_is_installed_and_answers(archive: Path, tmp_path: Path) -> None:
    user = Project(tmp_path)
    for command in (
        ("trust", str(BUNDLES / "fleet.pub"), "--root", "edge"),
        ("install", str(archive), "--root", "edge"),
        ("selftest", "--root", "edge"),
    ):
        done = user.bitferry(*command)
        assert done.returncode == 0, done.stderr
    for words in (["check"], ["selftest", "--json"]):
        run = subprocess.run(
            [sys.executable, tmp_path / "edge/current/run.pyz", *words], capture_output=True, text=True, check=False
        )
        assert run.returncode == 0, run.stderr
    assert json.loads(run.stdout)["passed"] is True
    verified = user.bitferry("verify", str(tmp_path / "edge/current"), "--json")
    assert verified.returncode == 0, verified.stderr
