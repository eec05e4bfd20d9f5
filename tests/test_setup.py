"""The files a newcomer meets first: make's list, the pins, the embedded data, the README's commands."""

import hashlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from tests.conftest import EMBEDDED, ROOT, Project, plain_environment

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def make(*arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["make", *arguments], cwd=cwd, capture_output=True, text=True, check=False, env=plain_environment()
    )


def test_make_alone_lists_the_targets() -> None:
    listed = make().stdout
    for name in ("deploy", "test", "check", "bench", "nightly", "clean"):
        assert re.search(rf"^  {name} +\w", listed, re.MULTILINE), name


def test_make_hands_its_variables_on() -> None:
    done = make("-n", "deploy", "RECIPE=a.toml", "TARGET=openvino,onnxruntime", "OUT=there", f"VENV={sys.prefix}")
    assert 'deploy "a.toml" --target "openvino,onnxruntime" --out "there"' in done.stdout
    done = make("-n", "nightly", "ARGS=--quick", f"VENV={sys.prefix}")
    assert "matrix recipes/fashion-" in done.stdout
    assert done.stdout.rstrip().endswith(".toml --quick")


def test_conda_users_get_the_same_pins() -> None:
    conda = (ROOT / "environment.yml").read_text()
    pins = set(re.findall(r"^      - ([\w-]+==\S+)$", conda, re.MULTILINE))
    assert pins == {pin for pin in PROJECT["dependencies"] if "==" in pin}
    assert re.search(r"^  - python=3\.11$", conda, re.MULTILINE)
    (extras,) = re.findall(r"-e \.\[(\w+)\]", conda)
    assert extras in PROJECT["optional-dependencies"]
    assert PROJECT["requires-python"] == ">=3.11"


def test_the_lock_has_every_dependency_within_its_pin_and_names_no_host() -> None:
    lock = (ROOT / "requirements.lock").read_text()
    locked = dict(re.findall(r"^([\w.-]+)==([\w.]+)", lock, re.MULTILINE))
    for wanted in PROJECT["dependencies"] + PROJECT["optional-dependencies"]["dev"]:
        if wanted.startswith("bitferry["):  # its own extras
            continue
        name, relation, number = re.split(r"(==|>=)", re.sub(r"\[.*\]", "", wanted.partition(";")[0]))
        assert name in locked, name
        if relation == "==":
            assert locked[name].startswith(number.removesuffix("*"))
    assert "://" not in lock


def test_the_embedded_data_is_what_its_manifest_says() -> None:
    manifest = json.loads((EMBEDDED / "manifest.json").read_text())
    seen: set[bytes] = set()
    for name, entry in manifest["splits"].items():
        path = EMBEDDED / entry["file"]
        assert hashlib.sha256(path.read_bytes()).hexdigest() == entry["sha256"]
        with np.load(path) as arrays:
            images, labels = arrays["images"], arrays["labels"]
        assert images.shape == (entry["images"], 28, 28)
        counts = np.bincount(labels, minlength=10)
        assert counts.max() - counts.min() <= 1, name
        digests = {image.tobytes() for image in images}
        assert len(digests) == len(images)
        assert not digests & seen, name
        seen |= digests
    assert {name: entry["images"] for name, entry in manifest["splits"].items()} == {
        "train": 12_000,
        "calibration": 512,
        "evaluation": 4_000,
    }
    assert sum(path.stat().st_size for path in EMBEDDED.iterdir()) < 9_000_000


def test_the_script_picks_the_same_images_again(tmp_path: Path) -> None:
    originals = ROOT.parent / "shared/data/fashion-mnist"
    if not originals.is_dir():
        pytest.skip("the original Fashion-MNIST files are not on this machine")
    script = tmp_path / "pick.py"
    script.write_text((EMBEDDED / "pick.py").read_text())
    subprocess.run([sys.executable, script, originals], check=True)
    assert (tmp_path / "manifest.json").read_text() == (EMBEDDED / "manifest.json").read_text()


def commands(document: str) -> list[str]:
    """List the commands of a document's ```sh blocks, comments left out."""
    blocks = re.findall(r"^```sh\n(.*?)^```", (ROOT / document).read_text(), re.DOTALL | re.MULTILINE)
    return [line.split("  #")[0].strip() for block in blocks for line in block.splitlines() if line.strip()]


@pytest.mark.slow
def test_every_command_in_the_readme_runs(tmp_path: Path) -> None:
    """Run them in order in a copy of what git tracks; stages already in this checkout's build folder are reused.

    `make test` only collects one file's tests here: they are running already. What calls `bitferry` does so in this
    process, its own `main`, to be spared importing torch for each; make and the bundle's program are called as typed.
    """
    tracked = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(None, tracked.split("\0")):
        if (ROOT / name).exists():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            # with its time, by which make judges the environment; src/bitferry is a link
            shutil.copy2(ROOT / name, tmp_path / name, follow_symlinks=False)
    (ROOT / "build").mkdir(exist_ok=True)
    (tmp_path / "build").symlink_to(ROOT / "build")
    (tmp_path / ".venv").symlink_to(sys.prefix)
    current = make("-q", ".venv/.made-from-pyproject", cwd=tmp_path).returncode == 0
    assert current, (
        "the environment is older than pyproject.toml, and would be made anew from the copy; run `make` first"
    )
    prepare_what_the_readme_s_user_has(tmp_path)
    environment = plain_environment(
        PYTEST_ADDOPTS="--collect-only tests/test_statistics.py",
        PATH=f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    )
    listed = commands("README.md")
    assert "make deploy TARGET=openvino" in listed
    assert "make test" in listed
    for command in listed:
        words = shlex.split(command)
        done = Project(tmp_path).bitferry(*words[1:]) if words[0] == "bitferry" else subprocess.run(
            command, shell=True, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False, timeout=900
        )  # fmt: skip
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"


def prepare_what_the_readme_s_user_has(folder: Path) -> None:
    """Write the files that the README's commands name as the reader's own: a checkpoint, a folder of photographs."""
    torch.manual_seed(0)
    torch.save(timm.create_model("test_resnet", num_classes=2).state_dict(), folder / "weights.pth")  # the smallest
    with np.load(EMBEDDED / "evaluation.npz") as arrays:
        for label, name in enumerate(("cat", "dog")):
            (folder / "photos" / name).mkdir(parents=True)
            for number, index in enumerate(np.flatnonzero(arrays["labels"] == label)[:20]):
                Image.fromarray(arrays["images"][index]).save(folder / f"photos/{name}/{number}.png")
    Image.open(folder / "photos/dog/1.png").save(folder / "photo.png")
