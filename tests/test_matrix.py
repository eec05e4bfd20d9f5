"""Whole nights of the small project on a local Ray: what is reused, found, isolated, resumed and blamed."""

import json
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from bitferry import targets
from bitferry.device.errors import InputError
from bitferry.pipeline.nightly import bisect, inputs, plan
from bitferry.pipeline.nightly.history import History
from bitferry.pipeline.nightly.night import Cell
from bitferry.pipeline.nightly.ray_session import _importable
from bitferry.pipeline.nightly.work import Order
from bitferry.pipeline.recipe import read
from tests import nights
from tests.conftest import BITFERRY, Project, plain_environment, write_project

WEIGHTED = (
    'source = "module:smallmodel:make"\n',
    'source = "module:smallmodel:make"\nweights = "weights.safetensors"\n',
)
"""Trained once: a change of the preprocessing is then one that the weights were not trained for."""


def with_weights(folder: Path, deployed: Project) -> Project:
    made = write_project(folder)
    (trained,) = (deployed.folder / "build/small").glob("train-*/weights.safetensors")
    (folder / "weights.safetensors").write_bytes(trained.read_bytes())
    made.edit(WEIGHTED, ('train = "train.npz"\n', ""))
    return made


def matrix(project: Project, *arguments: str) -> tuple[int, dict[str, Any]]:
    """Run a night as a user does; give the exit code and what --json prints."""
    done = project.bitferry_process("matrix", *arguments, "--quick", "--json")
    assert done.stdout, done.stderr
    assert "Traceback" not in done.stderr
    return done.returncode, json.loads(done.stdout)


def by_cell(night: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {one["cell"]: one for one in night["cells"]}


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory, deployed: Project) -> tuple[Project, list[tuple[int, Any]]]:
    """Three nights: the first, the same again, and one with broken preprocessing beside a recipe that cannot run."""
    project = with_weights(tmp_path_factory.mktemp("nights") / "project", deployed)
    asked = ("small.toml", "--targets", "openvino", "--precisions", "float32,int8")
    ran = [matrix(project, *asked), matrix(project, *asked)]
    project.edit(("mean = [0.3, 0.3, 0.3]", "mean = [0.9, 0.9, 0.9]"))
    broken = (project.folder / "small.toml").read_text().replace('name = "small"', 'name = "broken"')
    (project.folder / "broken.toml").write_text(broken.replace("smallmodel:make", "smallmodel:absent"))
    ran.append(matrix(project, "broken.toml", *asked))
    return project, ran


@pytest.mark.slow
def test_a_night_measures_every_cell_and_the_next_reuses_what_did_not_change(
    three: tuple[Project, list[tuple[int, Any]]],
) -> None:
    project, ((code, first), (again, second), _) = three
    assert (code, again) == (0, 0)
    assert {name: one["status"] for name, one in by_cell(first).items()} == {
        "small/openvino/float32": "measured",
        "small/openvino/int8": "measured",
    }
    assert {one["status"] for one in second["cells"]} == {"reused"}
    assert first["findings"] == second["findings"] == []
    for name, one in by_cell(second).items():
        assert one["percent"] == by_cell(first)[name]["percent"] > 80
        assert one["ratio"] == by_cell(first)[name]["ratio"]
    with sqlite3.connect(project.folder / "nightly/history.sqlite") as kept:
        (count,) = kept.execute("SELECT count(*) FROM results").fetchone()
    assert count == 8
    with History(project.folder / "nightly/history.sqlite", read_only=True) as history:
        samples = history.samples(second["night"], Cell("small", "openvino", "int8"))
    assert set(samples) == {"eager", "runtime float", "artifact"}
    assert all(one.shape[0] == 40 and (one > 0).all() for one in samples.values())


@pytest.mark.slow
def test_a_night_forgets_what_is_no_longer_kept(three: tuple[Project, list[tuple[int, Any]]], tmp_path: Path) -> None:
    project = Project(Path(shutil.copytree(three[0].folder, tmp_path / "project")))
    asked = ("broken.toml", "small.toml", "--targets", "openvino", "--precisions", "float32,int8")
    _, night = matrix(project, *asked, "--keep-days", "1e-5")
    with History(project.folder / "nightly/history.sqlite", read_only=True) as history:
        first, second, *_ = history.nights()
        cell = Cell("small", "openvino", "int8")
        assert history.samples(first, cell)  # the reference
        assert not history.samples(second, cell)
        assert history.samples(night["night"], cell)


@pytest.mark.slow
def test_a_finding_names_the_broken_preprocessing_and_a_failure_stays_alone(
    three: tuple[Project, list[tuple[int, Any]]],
) -> None:
    project, (_, (_, second), (code, third)) = three
    assert code == 1
    cells = by_cell(third)
    assert cells["broken/openvino/int8"]["status"] == "failed"
    assert "absent" in cells["broken/openvino/int8"]["headline"]
    assert cells["small/openvino/int8"]["status"] == "measured"
    found = [one for one in third["findings"] if one["cell"] == "small/openvino/int8"]
    accuracy = next(one for one in found if one["kind"] == "accuracy")
    assert accuracy["severity"] == "regression"
    assert accuracy["after"] < accuracy["before"] - 10
    assert accuracy["changed"][0].startswith("recipe preprocessing.mean")
    assert "float" in accuracy["sentence"]
    assert accuracy["reference"] < second["night"]
    page = (project.folder / "nightly/index.html").read_text()
    assert "preprocessing.mean" in page
    assert "preprocessing.mean" in (project.folder / "nightly/summary.md").read_text()
    assert "<failure" in (project.folder / "nightly/junit.xml").read_text()
    for name in ("small/openvino/int8", "small/openvino/float32"):
        reports = sorted((project.folder / "nightly/reports").glob(f"{name.replace('/', '--')}--*.html"))
        assert len(reports) == 2
        assert f"reports/{reports[-1].name}" in page or reports[-1].name in _data(project)


def _data(project: Project) -> str:
    return "".join(path.read_text() for path in (project.folder / "nightly").glob("data-*/*.js"))


@pytest.mark.slow
def test_accepting_moves_what_later_nights_are_compared_with(three: tuple[Project, list[tuple[int, Any]]]) -> None:
    project, (_, _, (_, third)) = three
    done = project.bitferry("accept", "small/*", "--why", "this camera is darker")
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 2
    code, night = matrix(project, "small.toml", "--targets", "openvino", "--precisions", "float32,int8")
    assert code == 0
    assert [one["status"] for one in night["cells"]] == ["reused", "reused"]
    told = project.bitferry("history", "small", "openvino", "--precision", "int8", "--json")
    (cell,) = json.loads(told.stdout)
    assert cell["reference"] == third["night"]
    assert cell["accepted"][0]["why"] == "this camera is darker"
    assert "small/openvino/int9" in project.refused("accept", "small/openvino/int9", "--why", "")


@pytest.mark.slow
def test_a_killed_night_is_gone_on_with(tmp_path: Path, deployed: Project) -> None:
    """The driver is killed as soon as one cell is in the history."""
    project = with_weights(tmp_path / "project", deployed)
    asked = ["matrix", "small.toml", "--targets", "openvino", "--precisions", "float32,int8", "--quick", "--json"]
    kept = project.folder / "nightly/history.sqlite"
    with subprocess.Popen(
        [BITFERRY, *asked], cwd=project.folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as running:
        while running.poll() is None and _rows(kept) < 1:
            time.sleep(0.1)
        running.send_signal(signal.SIGKILL)
    assert running.returncode == -signal.SIGKILL
    assert _rows(kept) == 1
    done = project.bitferry_process(*asked)
    assert done.returncode == 0, done.stderr
    assert "goes on with the night" in done.stderr
    assert "1 done before, 0 reused, 1 to measure" in done.stderr
    with History(kept, read_only=True) as history:
        assert len(history.nights()) == 1
        assert len(history.results(history.nights()[0])) == 2


@pytest.mark.slow
def test_nodes_that_share_no_disk_exchange_files_through_the_store(tmp_path: Path, deployed: Project) -> None:
    """Each of two nodes keeps its builds in a folder of its own, and has never seen the recipe's."""
    from ray.cluster_utils import Cluster  # noqa: PLC0415

    project = with_weights(tmp_path / "project", deployed)
    store, size = tmp_path / "store", {"num_cpus": 1, "memory": 4 << 30, "object_store_memory": 80 << 20}
    with _importable():
        cluster = Cluster(initialize_head=True, head_node_args=size | {"num_cpus": 0, "include_dashboard": False})
        for name in ("a", "b"):
            cluster.add_node(wait=False, env_vars={"BITFERRY_BUILD": str(tmp_path / name)}, **size)
        cluster.wait_for_nodes()
        try:
            asked = ("small.toml", "--targets", "openvino,onnxruntime", "--precisions", "int8")
            code, night = matrix(project, *asked, "--ray", cluster.address, "--store", str(store))
        finally:
            cluster.shutdown()
    assert code == 0
    assert [one["outcome"] for one in night["cells"]] == ["pass", "pass"]
    assert not (project.folder / "build").exists()
    assert [(tmp_path / name / "small").is_dir() for name in ("a", "b")] == [True, True]
    made = {path.name.partition("-")[0] for path in (store / "stages").iterdir()}
    assert made >= {"parcel", "data", "quantize", "compile", "answers"}


def _rows(path: Path) -> int:
    try:
        with sqlite3.connect(f"file:{path}?mode=ro", uri=True) as kept:
            return int(kept.execute("SELECT count(*) FROM results").fetchone()[0])
    except sqlite3.Error:
        return 0


def test_equal_stages_are_one_task_and_cells_wait_for_all_they_need(deployed: Project) -> None:
    recipe = read(deployed.recipe, precision="auto")
    cells = [Cell("small", target, precision) for target in ("openvino", "onnxruntime", "torchscript")
             for precision in ("float32", "int8", "auto")]  # fmt: skip
    planned = [_planned(deployed, recipe, cell) for cell in cells]
    tasks = plan.graph(planned)
    names = [task.name.partition(": ")[2] for task in tasks]
    assert names.count("prepare") == 1
    assert names.count("measure") == len(cells)
    ready = {name: targets.get(name) for name in ("openvino", "onnxruntime", "torchscript")}
    short = {"bfloat16", "float16"}  # which auto weighs where this processor computes in them
    fast = [short & set(one.SCHEMES) & set(one.environment(options=one.Options()).fast) for one in ready.values()]
    assert names.count("compile") == 6 + sum(map(len, fast))
    by_key = {task.key: task for task in tasks}
    assert len(by_key) == len(tasks)
    floats = [task for task in tasks if task.name.endswith("convert") and "float32" in task.name]
    assert len(floats) == 2  # ONNX for two targets, TorchScript for one
    assert {name for task in floats for name in task.cells} == {cell.name for cell in cells}
    for task in tasks:
        assert task.whole == task.name.endswith("measure")
        assert set(task.needs) <= by_key.keys()
        assert set(task.cells) <= {name for need in task.needs for name in by_key[need].cells} or not task.needs


def _planned(project: Project, recipe: Any, cell: Cell) -> plan.Planned:
    order = Order(str(project.recipe), cell.target, cell.precision, str(project.folder / "build"))
    made_of = inputs.inputs(recipe, project.recipe, cell, {})
    return plan.Planned(cell, recipe, order, made_of, "here", inputs.key(cell, made_of, "here"))


def test_a_key_changes_with_what_the_result_depends_on_and_with_nothing_else(project: Project) -> None:
    (project.folder / "weights.safetensors").write_bytes(b"1")
    project.edit(WEIGHTED)
    cell = Cell("small", "openvino", "int8")

    def key(**changes: Any) -> str:
        made_of = inputs.inputs(read(project.recipe), project.recipe, cell, {"hostname": "a"})
        return inputs.key(cell, replace(made_of, **changes), "here")

    first, packages = key(), inputs.installed()
    assert key(machine={"hostname": "b"}, commit="c") == first
    assert key(packages=packages | {"pytest": "0"}) == first
    project.edit(('version = "1.0.0"', 'version = "1.0.1"'))
    assert key() == first
    others = {key(packages=packages | {name: "0"}) for name in ("openvino", "torch", "numpy", "pillow")}
    others |= {key(code="x"), key(weights="x")}
    project.edit(("epochs = 6", "epochs = 7"))
    others.add(key())
    (project.folder / "smallmodel.py").write_text((project.folder / "smallmodel.py").read_text() + "\n# edited\n")
    others.add(key())
    (project.folder / "weights.safetensors").write_bytes(b"2")
    others.add(key())
    assert len(others - {first}) == 9


@pytest.mark.parametrize(
    ("edit", "asked", "told"),
    [
        (None, ["--precisions", "int7"], "'int7' is no precision"),
        (None, ["--targets", "openvno"], "did you mean"),
        ('[nightly]\nnodes = { openvino = "H100" }', [], "wants 'H100' for openvino"),
        ("[nightly]\nnodes = 3", [], "nightly.nodes"),
        (None, ["--store", "memory://x"], "--store is for nodes"),
        (None, ["--quick", "--thorough"], "exclude each other"),
        (None, ["small.toml"], "both called 'small'"),
    ],
)
def test_what_cannot_be_meant_is_told_before_anything_is_made(
    project: Project, edit: str | None, asked: list[str], told: str
) -> None:
    if edit:
        project.recipe.write_text(f"{project.recipe.read_text()}\n{edit}\n")
    targets = [] if "--targets" in asked else ["--targets", "openvino"]
    assert told in project.refused("matrix", "small.toml", *targets, *asked)
    assert not (project.folder / "build").exists()


def test_the_fewest_packages_are_found_among_many() -> None:
    every = {f"p{number}": "1" for number in range(20)}
    tried: list[set[str]] = []

    def needs(*guilty: str) -> dict[str, str]:
        tried.clear()

        def good(some: Any) -> bool:
            tried.append(set(some))
            return set(guilty) <= set(some)

        return bisect.fewest_that(every, good)

    assert set(needs("p7")) == {"p7"}
    assert len(tried) < 15
    assert set(needs("p3", "p15")) == {"p3", "p15"}
    assert set(needs(*every)) == set(every)


BRIGHTNESS = "def factor():\n    return {0}\n"


def wheel(folder: Path, version: str, factor: float) -> None:
    """Write a wheel of a package that the project's model is made with."""
    source = folder / f"source-{version}"
    source.mkdir(parents=True)
    (source / "brightness.py").write_text(BRIGHTNESS.format(factor))
    (source / "pyproject.toml").write_text(
        '[build-system]\nrequires = ["hatchling"]\nbuild-backend = "hatchling.build"\n'
        f'[project]\nname = "brightness"\nversion = "{version}"\n'
        '[tool.hatch.build.targets.wheel]\ninclude = ["brightness.py"]\n'
    )
    done = subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", folder],
        cwd=source, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_bisect_names_the_package_at_fault(tmp_path: Path, deployed: Project) -> None:
    """A package that the model is made with becomes worse between two nights; another changes with it."""
    project = with_weights(tmp_path / "project", deployed)
    model = project.folder / "smallmodel.py"
    text = model.read_text().replace("import torch\n", "import torch\nimport brightness\n", 1)
    model.write_text(text.replace("self.first(x)", "self.first(x * brightness.factor())"))
    wheels, here = tmp_path / "wheels", tmp_path / "site"
    wheel(wheels, "1.0", 1.0)
    wheel(wheels, "1.1", -1.0)
    uv = Path(sys.executable).with_name("uv")
    environment = plain_environment(PYTHONPATH=str(here), UV_FIND_LINKS=str(wheels), UV_OFFLINE="1", UV_NO_INDEX="1")

    def install(version: str) -> None:
        shutil.rmtree(here, ignore_errors=True)
        command: list[str | Path] = [
            uv,
            "pip",
            "install",
            "--quiet",
            "--no-deps",
            "--target",
            here,
            f"brightness=={version}",
        ]
        subprocess.run(command, check=True, env=environment)

    def bitferry(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [BITFERRY, *arguments], cwd=project.folder, env=environment, capture_output=True, text=True, check=False
        )

    asked = ("matrix", "small.toml", "--targets", "torchscript", "--precisions", "float32", "--quick", "--json")
    install("1.0")
    assert bitferry(*asked).returncode == 0
    install("1.1")
    done = bitferry(*asked)
    assert done.returncode == 1, done.stderr
    findings = json.loads(done.stdout)["findings"]
    assert all("package brightness 1.0 → 1.1" in one["changed"] for one in findings)
    blamed = bitferry("bisect", "small/torchscript/float32", "small.toml", "--yes", "--json")
    assert blamed.returncode == 0, blamed.stderr
    found = json.loads(blamed.stdout)
    assert found["fault"] == "package"
    assert found["packages"] == ["brightness==1.0"]
    assert [one["verdict"] for one in found["trials"]] == ["bad", "good"]


def test_bisect_refuses_what_was_not_worse(tmp_path: Path) -> None:
    first, second = nights.nights(2)
    with History(tmp_path / "history.sqlite") as history:
        for night in (first, second):
            history.begin(night)
            history.write(night, nights.result())
            history.finish(night, (), 1.0)
    recipe = write_project(tmp_path / "project").recipe
    with pytest.raises(InputError, match="nothing was found to be worse"):
        bisect.bisect("small/openvino/int8", recipe, tmp_path, tmp_path, bad=None, good=None, trust=False, agreed=True)
    with pytest.raises(InputError, match="no result in the night"):
        bisect.bisect(
            "small/openvino/int8", recipe, tmp_path, tmp_path, bad="2020", good=None, trust=False, agreed=True
        )
    with pytest.raises(InputError, match="is no cell"):
        bisect.bisect("small/openvino", recipe, tmp_path, tmp_path, bad=None, good=None, trust=False, agreed=True)
