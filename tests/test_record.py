"""verdict.json: documented field by field, read back as it was written, refused in a line when it is damaged."""

import dataclasses
import json
import re
import subprocess
import sys
import types
import typing
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from bitferry.device.errors import InputError
from bitferry.pipeline import verdict
from bitferry.pipeline.artifacts import Verified
from bitferry.pipeline.data.split import Split
from bitferry.pipeline.report import record
from bitferry.pipeline.verdict import Verdict
from tests.conftest import ROOT, Project

DOCUMENT = (ROOT / "docs/verdict.md").read_text()
TARGETS = ("openvino", "onnxruntime")
PLAIN = {str: "string", int: "integer", float: "number", bool: "boolean"}


def nouns(noun: type = Verdict) -> dict[str, type]:
    """List every dataclass that a verdict is made of."""
    found = {noun.__name__: noun}
    for hint in typing.get_type_hints(noun).values():
        for inner in dataclasses_in(hint):
            found |= nouns(inner)
    return found


def dataclasses_in(hint: typing.Any) -> Iterator[type]:
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        yield hint
    for inner in typing.get_args(hint):
        yield from dataclasses_in(inner)


def shape(hint: typing.Any) -> str:
    """Say what JSON holds for a type, in the document's words."""
    arguments = typing.get_args(hint)
    if hint in PLAIN or typing.get_origin(hint) is typing.Literal:
        return PLAIN.get(hint, "string")
    if dataclasses.is_dataclass(hint):
        name = typing.cast(type, hint).__name__
        return f"[{name}](#{name.lower()})"
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        return f"{shape(arguments[0])} or null"
    if typing.get_origin(hint) is dict:
        return f"object of {shape(arguments[1])}"
    if arguments[1:] == (...,):
        return f"list of {shape(arguments[0])}"
    return f"[{', '.join(map(shape, arguments))}]"


def section(title: str) -> str:
    found = re.search(rf"^{re.escape(title)}$(.*?)(?=^##|\Z)", DOCUMENT, re.MULTILINE | re.DOTALL)
    assert found, f"docs/verdict.md has no '{title}'"
    return found[1]


def rows(title: str) -> dict[str, tuple[str, str]]:
    """Give each row of a section's table: its name, type and meaning."""
    found = re.findall(r"^\| `(\w+)` \| (.+?) \| (.+) \|$", section(title), re.MULTILINE)
    names = [name for name, *_ in found]
    assert len(names) == len(set(names)), f"{title} lists a name twice"
    assert len(found) == section(title).count("\n|") - 2, f"{title} has a row that cannot be read"
    return {name: (kind, meaning) for name, kind, meaning in found}


@pytest.mark.parametrize("noun", nouns().values(), ids=lambda noun: noun.__name__)
def test_every_field_is_documented_and_no_other(noun: type) -> None:
    found = rows(f"### {noun.__name__}")
    wanted = {name: shape(hint) for name, hint in typing.get_type_hints(noun).items()}
    if noun is Verdict:
        wanted["passed"] = "boolean"  # worked out from the outcome when it is written
    assert {name: kind for name, (kind, _) in found.items()} == wanted
    for name, (_, meaning) in found.items():
        assert meaning.endswith("."), name
        assert len(meaning) > 5, name


@pytest.mark.parametrize("noun", nouns().values(), ids=lambda noun: noun.__name__)
def test_every_value_of_a_fixed_choice_is_documented(noun: type) -> None:
    for name, hint in typing.get_type_hints(noun).items():
        if typing.get_origin(hint) is typing.Literal:
            missing = [
                value for value in typing.get_args(hint) if f"`{value}`" not in rows(f"### {noun.__name__}")[name][1]
            ]
            assert not missing, f"{noun.__name__}.{name}"


def test_no_noun_is_documented_that_is_gone() -> None:
    assert set(re.findall(r"^### (\w+)$", DOCUMENT, re.MULTILINE)) == set(nouns())
    assert f"`schema` is {verdict.SCHEMA}" in DOCUMENT


def reports(project: Project) -> Path:
    return project.folder / "build/small/reports"


def test_the_files_beside_it_are_documented(deployed: Project) -> None:
    with np.load(reports(deployed) / "openvino-int8/answers.npz") as arrays:
        documented = {name: kind.split(",")[0] for name, (kind, _) in rows("## answers.npz").items()}
        assert documented.pop("float_scores") == "float32"  # which top-1 does not need
        assert documented == {name: str(arrays[name].dtype) for name in arrays.files}
        assert arrays["digests"].shape == (600, 16)
    expected = json.loads((deployed.folder / "dist/small-openvino-1.0.0/golden/expected.json").read_text())
    assert set(rows("## golden/expected.json")) == set(expected)
    assert {tuple(file) for file in expected["files"].values()} == {("kind", "scores")}


def test_the_documented_example_runs(deployed: Project) -> None:
    found = re.search(r'```bash\npython -c "\n(.*?)"\n```', DOCUMENT, re.DOTALL)
    assert found
    program = found[1].replace("build/fashion-resnet18/", "build/small/")
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=deployed.folder, capture_output=True, text=True, check=True
    )
    assert re.fullmatch(
        r"top-1 at most \d+\.\d+ pp worse, confidence 0\.95\nallowed: 5\.0 pp, verdict: pass\n", done.stdout
    )


def shipped(project: Project, target: str) -> tuple[Path, Path]:
    """Give the two folders that hold a target's verdict."""
    return reports(project) / f"{target}-int8", project.folder / f"dist/small-{target}-1.0.0"


def strictly(text: str) -> typing.Any:
    """Parse JSON; NaN and infinity, which Python reads and JSON lacks, are refused."""

    def refuse(token: str) -> float:
        raise AssertionError(f"{token} in JSON")

    return json.loads(text, parse_constant=refuse)


@pytest.mark.parametrize("target", TARGETS)
def test_a_verdict_reads_back_as_it_was_written(deployed: Project, target: str, tmp_path: Path) -> None:
    for folder in shipped(deployed, target):
        text = (folder / "verdict.json").read_text()
        found = record.read_verdict(folder / "verdict.json")
        verdict.write(found, tmp_path / "again.json")
        assert (tmp_path / "again.json").read_text() == text
        assert record.read_verdict(tmp_path / "again.json") == found
        assert strictly(text)["schema"] == verdict.SCHEMA
        assert (found.recipe, found.target, found.precision, found.passed) == ("small", target, "int8", True)


@pytest.mark.parametrize("target", TARGETS)
def test_the_answers_agree_with_the_verdict(deployed: Project, target: str) -> None:
    for folder in shipped(deployed, target):
        accuracy = record.read_verdict(folder / "verdict.json").accuracy
        answers = record.read_answers(folder / "answers.npz")
        before, after = answers.float_right, answers.right
        assert len(answers.digests) == accuracy.images == 600
        assert accuracy.flips.lost == (before & ~after).sum()
        assert accuracy.flips.gained == (after & ~before).sum()
        assert accuracy.flips.flipped == (answers.float_answers != answers.answers).sum()
        assert accuracy.judged.float_percent == pytest.approx(100 * before.mean(), abs=1e-9)
        assert accuracy.judged.percent == pytest.approx(100 * after.mean(), abs=1e-9)
        assert accuracy.judged.drop_pp == pytest.approx(100 * (before.mean() - after.mean()), abs=1e-9)
        assert [one.images for one in accuracy.classes] == np.bincount(answers.labels).tolist()


@pytest.mark.parametrize("target", TARGETS)
def test_a_report_page_is_beside_it(deployed: Project, target: str) -> None:
    report, bundle = shipped(deployed, target)
    assert {path.name for path in report.iterdir()} == {"verdict.json", "answers.npz", "report.html"}
    assert (report / "report.html").read_text().startswith("<!doctype html>")
    assert not (bundle / "report.html").exists()


def texts(value: object) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    for inner in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from texts(inner)


def absolute(text: str) -> list[str]:
    """Find what begins like a path of a machine."""
    return re.findall(r"(?:^|[\s'\"(=:])(/\w[^\s'\"]*)", text)


@pytest.mark.parametrize("target", TARGETS)
def test_a_bundle_s_verdict_names_no_place_on_this_machine(deployed: Project, target: str) -> None:
    _, bundle = shipped(deployed, target)
    found = json.loads((bundle / "verdict.json").read_text())
    assert not [text for text in texts(found) if absolute(text)]


def test_nothing_private_is_shipped_wherever_the_recipe_lies(deployed: Project, tmp_path: Path) -> None:
    found = record.read_verdict(shipped(deployed, "openvino")[0] / "verdict.json")
    worst = dataclasses.replace(found.accuracy.worst[0], source="/home/Jane Doe/photos/a.png")
    rung = dataclasses.replace(found.ladder.rungs[1], missing="cannot load /home/jane/build/small/model.onnx: broken")
    found = dataclasses.replace(
        found,
        command="bitferry verify '/home/Jane Doe/secret plans/small.toml' --target openvino",
        accuracy=dataclasses.replace(found.accuracy, worst=(worst,)),
        ladder=dataclasses.replace(found.ladder, rungs=(found.ladder.rungs[0], rung)),
    )
    scores = np.eye(3, dtype=np.float32)
    evaluation = Split("evaluation", np.zeros((3, 2, 2, 3), np.uint8), np.arange(3), ("a",) * 3, (b"0" * 16,) * 3, "k")
    verified = Verified(found, scores, scores, scores, tmp_path, evaluation)
    record.write_figures(verified, tmp_path, private=False)
    text = (tmp_path / "verdict.json").read_text()
    assert not [word for word in ("/home", "Jane", "jane", "Doe", "secret") if word in text]
    shown = record.read_verdict(tmp_path / "verdict.json")
    assert shown.command == "bitferry verify small.toml --target openvino"
    assert shown.accuracy.worst[0].source == "a.png"


def without(fields: dict[str, typing.Any], *path: str) -> str:
    """Give the JSON text without the field that the path leads to."""
    inner = fields
    for name in path[:-1]:
        inner = inner[name]
    del inner[path[-1]]
    return json.dumps(fields)


@pytest.fixture
def damaged(deployed: Project, tmp_path: Path) -> Path:
    path = tmp_path / "verdict.json"
    path.write_bytes((shipped(deployed, "openvino")[1] / "verdict.json").read_bytes())
    return path


def refusal(path: Path, content: str | bytes) -> str:
    """Write a verdict that cannot be read; give the one line that says so."""
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(InputError) as caught:
        record.read_verdict(path)
    line = str(caught.value)
    assert line.startswith(str(path))
    assert "\n" not in line
    assert len(line) < len(str(path)) + 300
    return line


@pytest.mark.parametrize(
    "text",
    [
        "",
        "no JSON",
        b"\xff\xfe\x00",
        "[]",
        "[[1, 2]]",
        "3",
        "null",
        '"2"',
        '{"schema": 2',
        "[" * 100_000,
        '{"a":' * 100_000,
    ],
    ids=lambda text: repr(text[:12]),
)
def test_what_is_no_verdict_is_refused(damaged: Path, text: str | bytes) -> None:
    assert re.search(r"is no verdict|has schema None", refusal(damaged, text))


@pytest.mark.parametrize("schema", [None, 1, 2, "3", [3], {}])
def test_another_schema_is_refused_with_what_to_do(damaged: Path, schema: object) -> None:
    fields = json.loads(damaged.read_text()) | {"schema": schema}
    line = refusal(damaged, json.dumps(fields))
    assert f"has schema {schema!r}; this bitferry reads schema {verdict.SCHEMA}: verify again" in line


@pytest.mark.parametrize(
    "path", [("accuracy",), ("accuracy", "judged", "drop_upper_pp"), ("latency", "speedup", "value"), ("measured_at",)]
)
def test_a_missing_field_is_named(damaged: Path, path: tuple[str, ...]) -> None:
    line = refusal(damaged, without(json.loads(damaged.read_text()), *path))
    assert "is damaged: 1 faults" in line
    assert path[-1] in line


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("budget_drop_pp", "much"),
        ("budget_drop_pp", None),
        ("budget_drop_pp", "1.0"),
        ("outcome", "maybe"),
        ("reasons", "one"),
        ("accuracy", []),
        ("versions", {"torch": 2}),
    ],
)
def test_a_field_of_another_type_is_named(damaged: Path, name: str, value: object) -> None:
    line = refusal(damaged, json.dumps(json.loads(damaged.read_text()) | {name: value}))
    assert "is damaged" in line
    assert name in line


@pytest.mark.parametrize("token", ["NaN", "Infinity", "-Infinity"])
def test_a_number_that_json_lacks_is_refused(damaged: Path, token: str) -> None:
    refusal(damaged, damaged.read_text().replace('"budget_drop_pp": 5.0', f'"budget_drop_pp": {token}'))


@pytest.mark.parametrize("depth", [500, 100_000])
def test_huge_nesting_inside_a_field_is_refused(damaged: Path, depth: int) -> None:
    nested = "[" * depth + "]" * depth
    refusal(damaged, damaged.read_text().replace('"headline": ', f'"more": {nested},\n  "headline": '))


def test_a_field_that_a_newer_one_added_is_passed_over(damaged: Path) -> None:
    before = record.read_verdict(damaged)
    damaged.write_text(json.dumps(json.loads(damaged.read_text()) | {"new": [1]}))
    assert record.read_verdict(damaged) == before


@pytest.mark.parametrize("damage", ["empty", "text", "half", "other arrays", "other lengths", "gone"])
def test_damaged_answers_are_refused(deployed: Project, tmp_path: Path, damage: str) -> None:
    content = (shipped(deployed, "openvino")[0] / "answers.npz").read_bytes()
    path = tmp_path / "answers.npz"
    few = {name: np.zeros((2, 16) if name == "digests" else 3, np.uint8) for name in record.NAMES}
    if damage == "other arrays":
        np.savez(path, labels=np.zeros(3))
    elif damage == "other lengths":
        np.savez(path, **few)  # type: ignore[arg-type]
    elif damage != "gone":
        path.write_bytes({"empty": b"", "text": b"no archive" * 9, "half": content[: len(content) // 2]}[damage])
    with pytest.raises(InputError, match=re.escape(str(path))) as caught:
        record.read_answers(path)
    assert "\n" not in str(caught.value)


def test_no_damaged_byte_of_the_answers_ends_in_a_traceback(deployed: Project, tmp_path: Path) -> None:
    content = (shipped(deployed, "openvino")[0] / "answers.npz").read_bytes()
    path, refused = tmp_path / "answers.npz", []
    for place in range(0, len(content), len(content) // 200):
        path.write_bytes(content[:place] + bytes([content[place] ^ 0xFF]) + content[place + 1 :])
        try:
            record.read_answers(path)  # a time stamp in the archive may change and does no harm
        except InputError as error:
            refused.append(str(error))
    assert len(refused) > 180
    assert all(line.startswith(str(path)) and "\n" not in line for line in refused)
