"""The notebook of the first minutes, executed by the kernel of this environment on the small project."""

import shutil
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

from bitferry.device.errors import InputError
from bitferry.pipeline import api
from tests.conftest import ROOT, Project, plain_environment

NOTEBOOK = ROOT / "docs/notebook.ipynb"


class Balanced(HTMLParser):
    """Notes what is fetched or run, and whether every element is closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.suspect: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in ("img", "br"):
            self.open.append(tag)
        addresses = [value or "" for name, value in attrs if name in ("src", "href")]
        self.suspect += [tag] if tag in ("script", "link", "iframe") else []
        self.suspect += [address for address in addresses if not address.startswith("data:image/png")]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


@pytest.fixture(scope="module")
def executed(deployed: Project, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The notebook after every cell ran, its stages reused from the deployed project."""
    folder = tmp_path_factory.mktemp("notebook") / "project"
    shutil.copytree(deployed.folder, folder)
    notebook = nbformat.read(NOTEBOOK, as_version=4)  # type: ignore[no-untyped-call]
    environment = plain_environment(RECIPE=str(folder / "small.toml"), TARGET="onnxruntime")
    client = NotebookClient(notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(folder)}})
    client.create_kernel_manager()
    client.execute(env=environment)
    return notebook


def outputs(notebook: Any) -> list[Any]:
    return [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]


def test_every_cell_runs_and_results_are_rich(executed: Any) -> None:
    assert not [output for output in outputs(executed) if output.output_type == "error"]
    results = [output.data for output in outputs(executed) if output.output_type == "execute_result"]
    rich = [data["text/html"] for data in results if "text/html" in data]
    assert len(rich) == 2  # the verdict, the bundle
    for text in rich:
        assert "onnxruntime int8" in text
        found = Balanced(text)
        assert not found.open
        assert not found.suspect
    assert "dist/small-onnxruntime-1.0.0" in rich[1]
    assert "run.pyz predict" in rich[1]


def test_the_committed_notebook_holds_no_outputs_and_opens_what_the_tour_writes() -> None:
    notebook = nbformat.read(NOTEBOOK, as_version=4)  # type: ignore[no-untyped-call]
    nbformat.validate(notebook)
    assert not outputs(notebook)
    assert "quickstart/quickstart.toml" in notebook.cells[1].source


def test_the_api_refuses_as_the_commands_do(deployed: Project) -> None:
    run = api.open(deployed.recipe, build=deployed.folder / "build")
    with pytest.raises(InputError, match="onnxruntime' cannot run bfloat16; it runs int8"):
        api.to(run, "onnxruntime", "bfloat16")
    with pytest.raises(InputError, match="does not exist"):
        api.open(Path("nowhere.toml"))
    assert str(api.to(run, "onnxruntime").compiled.path).startswith(str(deployed.folder)), sys.prefix
