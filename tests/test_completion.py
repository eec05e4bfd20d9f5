"""Completion as a shell asks for it: a variable that names the shell, the words typed so far, answers on stdout."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from bitferry import targets
from tests.conftest import BITFERRY, ROOT


def asked(line: str, cwd: Path = ROOT) -> list[str]:
    """Complete the last word of a line by the protocol that the bash script speaks."""
    words = line.split(" ")
    environment = {
        "_BITFERRY_COMPLETE": "complete_bash", "COMP_WORDS": "\n".join(words), "COMP_CWORD": str(len(words) - 1)
    }  # fmt: skip
    done = subprocess.run([BITFERRY], cwd=cwd, env=os.environ | environment, capture_output=True, text=True, check=True)
    return done.stdout.split("\n")[:-1]


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("bitferry dep", ["deploy"]),
        ("bitferry deploy --allow", ["--allow-unmeasured"]),
        ("bitferry deploy recipes/fashion-r", ["recipes/fashion-resnet18.toml"]),
        ("bitferry deploy rec", ["recipes/"]),
        ("bitferry deploy --target openv", ["openvino"]),
        ("bitferry deploy -t openvino,onn", ["openvino,onnxruntime"]),
        ("bitferry deploy --precision bf", ["bfloat16"]),
        ("bitferry matrix recipes/fashion-s", ["recipes/fashion-shufflenetv2.toml"]),
        ("bitferry completion f", ["fish"]),
    ],
)
def test_the_next_word_is_completed(line: str, expected: list[str]) -> None:
    assert asked(line) == expected


def test_every_target_is_offered() -> None:
    assert set(asked("bitferry compile --target ")) == {*targets.names(), "all"}


def test_bash_itself_completes_with_the_printed_script(tmp_path: Path) -> None:
    shell = shutil.which("bash")
    assert shell, "bash is part of every machine that make runs on"
    code = f"""
        eval "$({BITFERRY} completion bash)"
        COMP_WORDS=(bitferry deploy --target openv); COMP_CWORD=3
        $(complete -p bitferry | sed 's/.*-F \\([^ ]*\\).*/\\1/') bitferry
        printf '%s\\n' "${{COMPREPLY[@]}}"
    """
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    done = subprocess.run([shell, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["openvino"]


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_each_shell_has_a_script(shell: str) -> None:
    done = subprocess.run([BITFERRY, "completion", shell], capture_output=True, text=True, check=True)
    assert f"_BITFERRY_COMPLETE=complete_{shell}" in done.stdout


def test_completing_loads_no_torch_and_the_help_shows_no_options_of_it() -> None:
    done = subprocess.run([BITFERRY, "--help"], capture_output=True, text=True, check=True)
    assert "--install-completion" not in done.stdout
    code = (
        "import sys; from bitferry.pipeline import cli, completion; completion.recipes(''); completion.target_names('')"
    )
    subprocess.run([sys.executable, "-c", f"{code}; assert 'torch' not in sys.modules"], cwd=ROOT, check=True)
