"""The documentation: the site builds, every command in it is one, and every page that an error names is there."""

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.main import get_command

from bitferry import targets
from bitferry.device.errors import InputError, TargetUnavailable
from bitferry.pipeline import cli, pages
from tests.conftest import ROOT, Project

DOCUMENTS = sorted(path for path in (ROOT / "docs").rglob("*.md") if "decisions" not in path.parts)
EVERYWHERE = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")
FENCED = re.compile(r"^```(?:sh|bash|console)\n(.*?)^```", re.DOTALL | re.MULTILINE)
INLINE = re.compile(r"`((?:bitferry|make) [^`]+)`")
CHEAP = ("targets", "completion", "--help")
"""Commands that are run for real wherever they stand: they take a second."""


def commands(path: Path) -> Iterator[str]:
    """Give what a page tells a reader to type: fenced, indented or within a sentence, comments left out."""
    text = path.read_text()
    for block in FENCED.findall(text):
        yield from _lines(block)
    for block in re.findall(r"(?:^    .*\n)+", FENCED.sub("", text), re.MULTILINE):
        yield from _lines("\n".join(line[4:] for line in block.splitlines()))
    yield from (" ".join(command.split()) for command in INLINE.findall(text))


def _lines(block: str) -> Iterator[str]:
    for line in block.replace("\\\n", " ").splitlines():
        command = re.split(r"\s+#\s", line)[0].strip().removeprefix("$ ")
        if re.match(r"(bitferry|make) \S", command):
            yield command


ALL = [
    (path, command) for path in [*DOCUMENTS, ROOT / "README.md", ROOT / "CONTRIBUTING.md"] for command in commands(path)
]


def parsed(words: list[str]) -> None:
    """Resolve a command and every option of it as typer does, and run nothing; raise what it raises."""
    group = get_command(cli.app)
    context = group.make_context("bitferry", list(words), resilient_parsing=True)
    names = [word for word in words if not word.startswith("-")]
    found = group.get_command(context, names[0])  # type: ignore[attr-defined]
    assert found is not None, f"there is no command {names[0]}"
    known = {option for parameter in found.params for option in (*parameter.opts, *parameter.secondary_opts)}
    given = {word.partition("=")[0] for word in words if re.match(r"--?[a-z]", word)}
    assert given <= known | {"--quiet", "-q", "--debug", "--download", "--help"}, f"{names[0]} has no {given - known}"


@pytest.mark.parametrize(("path", "command"), ALL, ids=lambda value: str(value).rpartition("/")[2][:60])
def test_every_command_in_a_page_is_one(path: Path, command: str) -> None:
    words = shlex.split(command.replace("…", "PLACE"), comments=True)
    words = words[: next((i for i, word in enumerate(words) if word in ("|", ">", "&&", ";")), None)]
    if words[0] == "make":
        makefile = (ROOT / "Makefile").read_text()
        for target in (word for word in words[1:] if "=" not in word and word != "PLACE"):
            assert re.search(rf"^{re.escape(target)}:", makefile, re.MULTILINE), f"{path.name}: make {target}"
        return
    parsed(words[1:])
    for word in (word for word in words if re.match(r"(recipes|docs|benchmarks)/.*\.\w+$", word) and "*" not in word):
        assert (ROOT / word).exists(), f"{path.name} names {word}"


def test_commands_were_found_and_a_wrong_one_is_noticed() -> None:
    assert len(ALL) > 60
    with pytest.raises(AssertionError, match="no {'--fast'}"):
        parsed(["deploy", "mine.toml", "--fast"])
    with pytest.raises(AssertionError, match="no command deplou"):
        parsed(["deplou", "mine.toml"])


def test_cheap_commands_run(tmp_path: Path) -> None:
    user = Project(tmp_path)
    ran = 0
    for _, command in ALL:
        words = shlex.split(command.partition(">")[0].partition("|")[0])
        if words[0] == "bitferry" and words[1] in CHEAP:
            assert user.bitferry(*words[1:]).returncode == 0, command
            ran += 1
    assert ran >= 2


def test_the_site_builds_strictly_and_fetches_nothing(tmp_path: Path) -> None:
    site = tmp_path / "site"
    subprocess.run(
        [Path(sys.executable).with_name("mkdocs"), "build", "--strict", "--quiet", "--site-dir", site],
        cwd=ROOT, env=os.environ | {"NO_MKDOCS_2_WARNING": "1"}, check=True, capture_output=True,
    )  # fmt: skip
    start = (site / "index.html").read_text()
    assert "First minutes" in start
    for page in site.rglob("*.html"):
        text = page.read_text()
        fetched = re.findall(r"<(?:script|link|img)[^>]+(?:src|href)=\"?(https?:[^\s\">]+)", text)
        assert not [address for address in fetched if "canonical" not in address], page
    assert (site / "targets/openvino.html").is_file()


def test_every_target_has_a_page_in_the_navigation() -> None:
    listed = (ROOT / "mkdocs.yml").read_text()
    assert [name for name in targets.names() if f"targets/{name}.md" not in listed and "PYTEST" not in name] == []


def test_every_decision_is_listed() -> None:
    listed = (ROOT / "docs/decisions/README.md").read_text()
    assert [path.name for path in (ROOT / "docs/decisions").glob("0*.md") if f"({path.name})" not in listed] == []


def anchors(path: Path) -> set[str]:
    """Give the anchors of a page's headings, as its site and code hosts make them."""
    headings = re.findall(r"^#+ (.+)$", path.read_text(), re.MULTILINE)
    return {re.sub(r"[\s]+", "-", re.sub(r"[^\w\s-]", "", heading).strip().lower()) for heading in headings}


def test_every_page_that_an_error_names_is_there() -> None:
    for _, name in pages.PAGES:
        for target in targets.names() if "{}" in name else [""]:
            file, _, anchor = name.format(target).partition("#")
            assert (ROOT / "docs" / file).is_file(), file
            assert not anchor or anchor in anchors(ROOT / "docs" / file), name


def test_an_error_ends_with_the_page_that_helps(project: Project) -> None:
    project.edit(("version =", "vesion ="))
    assert project.refused("train", "small.toml").endswith("; see docs/recipes.md")
    assert project.refused("deploy", "small.toml", "--target", "openvin").count("docs/") == 1
    needs = TargetUnavailable("target 'tensorrt' needs the Python package 'tensorrt'")
    assert pages.told(needs).endswith("see docs/targets/tensorrt.md")
    assert pages.told(InputError("target 'mine' needs the Python package 'mine'")).endswith(
        "'mine'"
    )  # has no page here
    assert pages.told(OSError("disk full")) == "disk full"


def test_the_changelog_names_every_command() -> None:
    told = (ROOT / "CHANGELOG.md").read_text()
    assert [name for name in ("init", "quickstart", "completion") if f"bitferry {name}" not in told] == []
