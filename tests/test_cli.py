"""The command line as a person meets it: help, output, exit codes, bad input, bring your own model."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from PIL import Image

from bitferry.pipeline import progress
from tests.conftest import BITFERRY, Project, subset

COMMANDS = (
    "deploy",
    "train",
    "quantize",
    "trace",
    "export",
    "compile",
    "verify",
    "bundle",
    "tune",
    "predict",
    "targets",
    "init",
    "compare",
)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_with_an_example(command: str) -> None:
    done = subprocess.run([BITFERRY, command, "--help"], capture_output=True, text=True, check=True)
    assert re.search(r"Example: bitferry \w+", done.stdout)
    assert len(done.stdout) > 300


def test_the_help_lists_every_command() -> None:
    done = subprocess.run([BITFERRY, "--help"], capture_output=True, text=True, check=True)
    listed = re.findall(r"^│ (\w+) ", done.stdout, re.MULTILINE)
    assert tuple(name for name in listed if name in COMMANDS) == COMMANDS


def test_a_second_run_repeats_only_verification(deployed: Project, tmp_path: Path) -> None:
    again = Project(Path(shutil.copytree(deployed.folder, tmp_path / "again")))
    done = again.bitferry("deploy", "small.toml", "--target", "openvino", "--quick", "--json")
    assert done.returncode == 0, done.stderr
    worked = {line.split()[0] for line in done.stderr.splitlines() if " done in " in line}
    assert worked == {"verify", "bundle"}


def test_stage_commands_print_where_their_output_is(deployed: Project) -> None:
    for command, name in (
        ("train", "weights.safetensors"),
        ("quantize", "program.pt2"),
        ("trace", "model.ts"),
        ("export", "model.onnx"),
        ("compile", "model.xml"),
    ):
        options = [] if command == "train" else ["--target", "openvino"]
        done = deployed.bitferry("--quiet", command, "small.toml", *options)
        assert done.returncode == 0, done.stderr
        assert done.stderr == ""
        (line,) = done.stdout.splitlines()
        assert (deployed.folder / line.split("\t")[1]).name == name
        assert (deployed.folder / line.split("\t")[1]).is_file()


def test_the_table_is_on_stdout_and_the_talk_on_stderr(deployed: Project) -> None:
    done = deployed.bitferry("verify", "small.toml", "--target", "onnxruntime", "--quick")
    assert done.returncode == 0
    assert "drop at most" in done.stdout
    assert "2 of 2 convolutions int8; 1 of 1 matrix product int8" in done.stdout
    assert "reused from" in done.stderr
    assert "reused from" not in done.stdout


def test_a_missed_budget_is_exit_1_and_no_bundle(deployed: Project, tmp_path: Path) -> None:
    strict = Project(Path(shutil.copytree(deployed.folder, tmp_path / "strict")))
    strict.edit(("accuracy_drop_pp = 5.0", "accuracy_drop_pp = 5.0\nmin_speedup = 1000.0"))
    done = strict.bitferry("deploy", "small.toml", "--target", "openvino", "--out", "new", "--quick", "--json")
    assert done.returncode == 1
    (verdict,) = json.loads(done.stdout)
    assert verdict["outcome"] == "fail"
    assert verdict["bundle"] is None
    assert not list((strict.folder / "new").glob("small-*"))


class TestBadInput:
    """Each one clear line and exit 2, before any long work."""

    def test_options_that_exclude_each_other(self, deployed: Project) -> None:
        assert "--quick and --thorough exclude each other" in deployed.refused(
            "verify", "small.toml", "--quick", "--thorough"
        )
        line = deployed.refused("verify", "dist/small-openvino-1.0.0", "--target", "openvino")
        assert "is a bundle; leave out --target, --precision and --allow-unmeasured" in line
        assert "--data is for a bundle" in deployed.refused("verify", "small.toml", "--data", "evaluation.npz")

    def test_a_precision_the_target_does_not_run(self, deployed: Project) -> None:
        line = deployed.refused("-q", "compile", "small.toml", "-t", "onnxruntime", "--precision", "bfloat16")
        assert "target 'onnxruntime' cannot run bfloat16; it runs int8, float32" in line

    def test_a_folder_that_is_no_bundle(self, project: Project) -> None:
        assert "is not a bundle: it has no manifest.json" in project.refused("predict", ".", "photo.png")

    def test_debug_shows_the_traceback(self, project: Project) -> None:
        done = project.bitferry_process("deploy", "small.toml", "--target", "nothing", "--debug")
        assert done.returncode != 0
        assert "Traceback" in done.stderr


def test_init_says_when_it_cannot_tell_the_model(project: Project) -> None:
    (project.folder / "photos/a").mkdir(parents=True)
    torch.save({"strange.weight": torch.zeros(3)}, project.folder / "mine.pth")
    assert "has 1 class folders; expected at least two" in project.refused("init", "mine.pth", "photos")
    (project.folder / "photos/b").mkdir()
    assert "photos/a has 0 images; expected one or more" in project.refused("init", "mine.pth", "photos")
    for name, image in zip(("a/1", "a/2", "b/1", "b/2"), subset("evaluation", 4)["images"], strict=True):
        Image.fromarray(image).save(project.folder / f"photos/{name}.png")
    assert "say what it is with --source" in project.refused("init", "mine.pth", "photos")


def test_brackets_in_a_path_are_printed_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    progress.console.quiet = False
    progress.stage("bundle", "dist[red]/a[/nope]b")
    assert "dist[red]/a[/nope]b" in capsys.readouterr().err
