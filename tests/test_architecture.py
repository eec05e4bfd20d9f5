"""The house rules that a reader relies on: which way imports point, what stays small, what needs no torch."""

import ast
import importlib
import re
import statistics
import subprocess
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import pytest

from bitferry import targets
from bitferry.pipeline.own_source import shipped

ROOT = Path(__file__).parents[1]
FILES = sorted(p for package in ("pipeline", "targets", "device") for p in (ROOT / package).rglob("*.py"))
# Rank in the direction that imports may point: only to a lower rank, or within the package.
RANKS = {"pipeline": 3, "targets": 2, "device": 1}
STAGES = {"train", "load", "quantize", "trace", "export", "compile", "verify", "bundle"}


def package(path: Path) -> str:
    return path.relative_to(ROOT).parts[0]


def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def imports(path: Path, *, top_level: bool = False) -> set[str]:
    """List the dotted names a file imports, ours without their root, those inside functions too unless `top_level`."""
    found = set()
    nodes = tree(path).body if top_level else list(ast.walk(tree(path)))
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {node.module or ""} | {f"{node.module}.{alias.name}" for alias in node.names}
    return {name.removeprefix("bitferry.") for name in found}


def functions() -> Iterator[tuple[Path, ast.FunctionDef]]:
    for path in FILES:
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.FunctionDef):
                yield path, node


def lines(function: ast.FunctionDef) -> int:
    return (function.end_lineno or 0) - function.lineno + 1


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_imports_point_one_way(path: Path) -> None:
    rank = RANKS[package(path)]
    upward = {name for name in imports(path) if RANKS.get(name.partition(".")[0], 0) > rank}
    assert not upward, f"{path} imports {upward}"


def test_stages_know_neither_the_run_nor_the_command_line() -> None:
    for stage in STAGES:
        used = imports(ROOT / f"pipeline/{stage}.py")
        assert not {"pipeline.run", "pipeline.cli", "pipeline.report.terminal"} & used, stage


def test_no_target_is_named_outside_its_own_file() -> None:
    names = {path.stem for path in (ROOT / "targets").glob("*.py")} - {"__init__"}
    for path in (ROOT / "pipeline").rglob("*.py"):
        compared = {
            constant.value
            for node in ast.walk(tree(path))
            if isinstance(node, ast.Compare)
            for constant in ast.walk(node)
            if isinstance(constant, ast.Constant)
        }
        assert not names & compared, f"{path} decides by target name"


@pytest.mark.parametrize("path", [p for p in FILES if package(p) != "pipeline"], ids=lambda p: p.stem)
def test_device_and_targets_import_no_torch_at_the_top(path: Path) -> None:
    heavy = {name.partition(".")[0] for name in imports(path, top_level=True)} & {"torch", "torchvision", "torchao"}
    assert not heavy


def test_every_package_that_is_imported_is_declared() -> None:
    """What another package brings along today may be gone tomorrow."""
    declared = {re.split(r"[<=>!~;\[ ]", line)[0] for line in metadata.requires("bitferry") or ()} | {"bitferry"}
    providers = metadata.packages_distributions()
    used = {name.partition(".")[0] for path in FILES for name in imports(path)} & set(providers)
    undeclared = {
        name for name in used if not {re.sub("[-_.]+", "-", one).lower() for one in providers[name]} & declared
    }
    assert {"torch", "psutil", "urllib3"} <= used
    assert not undeclared


def test_the_help_loads_no_torch() -> None:
    code = "import sys; import bitferry.pipeline.cli; sys.exit('torch' in sys.modules or 'pydantic' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, cwd=ROOT).returncode == 0


def test_functions_and_files_stay_small() -> None:
    long_functions = [f"{p.name}:{f.name}" for p, f in functions() if lines(f) > 40]
    long_files = [path.name for path in FILES if len(path.read_text().splitlines()) > 450]
    assert not long_functions
    assert not long_files
    assert statistics.median(lines(f) for _, f in functions()) < 12


def test_every_file_and_public_function_says_what_it_is() -> None:
    assert not [path.name for path in FILES if not ast.get_docstring(tree(path))]
    silent = [
        f"{path.name}:{node.name}"
        for path in FILES
        if package(path) != "targets" or path.stem == "__init__"
        for node in tree(path).body
        if isinstance(node, ast.FunctionDef | ast.ClassDef)
        and not node.name.startswith("_")
        and not ast.get_docstring(node)
    ]
    assert not [name for name in silent if name not in PLAIN]


PLAIN = {"recipe.py:Section", "recipe.py:Training", "recipe.py:Quantization", "recipe.py:Budget",
         "recipe.py:Recipe", "cli.py:options"}  # fmt: skip


NO_MATTER = {
    "pipeline/__init__": "nothing",
    "device/__init__": "nothing",
    "device/errors": "messages",
    "pipeline/progress": "messages",
    "pipeline/unsupported": "messages",
    "pipeline/interrupt": "when it stops",
    "pipeline/cache": "where it is kept",
    "pipeline/artifacts": "nouns",
    "pipeline/verdict": "nouns",
    "pipeline/data/split": "the data have a key of their own",
    "pipeline/recipe": "what a recipe says is in the key",
    "pipeline/section": "how a recipe is read",
    "pipeline/measure/metrics": "what is measured afterwards",
    "targets/__init__": "the scheme is in the key",
}
"""Modules that quantization imports whose code does not change what comes out."""


def closure(path: Path) -> set[Path]:
    """List the files of ours that a file imports, directly or not, and itself; none behind one of NO_MATTER."""
    found, waiting = set[Path](), [path]
    while waiting:
        one = waiting.pop()
        if one in found or one.relative_to(ROOT).with_suffix("").as_posix() in NO_MATTER:
            continue
        found.add(one)
        places = [ROOT / name.replace(".", "/") for name in imports(one)]
        waiting += [file for at in places for file in (at.with_suffix(".py"), at / "__init__.py") if file in FILES]
    return found


@pytest.mark.parametrize(
    ("stage", "sources"), [("quantize", "STEPS"), ("onnx_in/quantize", "SOURCES")], ids=["PyTorch", "ONNX"]
)
def test_the_key_of_an_int8_program_holds_all_code_that_decides_it(stage: str, sources: str) -> None:
    """What was made by other code is not taken out of the cache."""
    module = importlib.import_module(f"bitferry.pipeline.{stage.replace('/', '.')}")
    hashed = {Path(str(module.__file__)), *getattr(module, sources)}
    assert {file.resolve() for file in hashed} == closure(ROOT / f"pipeline/{stage}.py")


@pytest.mark.parametrize("name", targets.names())
def test_the_key_of_an_artifact_holds_what_its_target_imports_and_no_more(name: str) -> None:
    """A comment in the installer makes no artifact anew."""
    found = {place.removeprefix("bitferry/") for place in shipped([targets.source(name).read_text()])}
    assert {"targets/__init__.py", "device/arrays.py"} <= found
    assert not {"device/install.py", "device/agent.py", "device/runner.py", "device/update.py"} & found
