"""Checkpoints that are programs, bombs, torn or of another model: nothing in them is run, and each is told."""

import io
import json
import pickle
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save
from torch import Tensor, nn

from bitferry.pipeline import recipe
from bitferry.pipeline.load import architecture
from tests.conftest import Project, write_project

State = dict[str, Tensor]


@pytest.fixture(scope="module")
def user(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """Give the small project with weights of its own, `weights.pt`, which each test writes anew."""
    made = write_project(tmp_path_factory.mktemp("checkpoints") / "project")
    made.edit(('source = "module', 'weights = "weights.pt"\nsource = "module'))
    return made


@pytest.fixture
def state(user: Project) -> State:
    torch.manual_seed(0)
    return dict(architecture(recipe.read(user.recipe), user.folder).state_dict())


def saved(stored: object, **options: Any) -> bytes:
    stream = io.BytesIO()
    torch.save(stored, stream, **options)
    return stream.getvalue()


def refused(user: Project, content: bytes, *more: str) -> str:
    """Give the one line that a checkpoint of this content is refused with, which left nothing but the build folder."""
    before = {path.name for path in user.folder.parent.rglob("*")}
    (user.folder / "weights.pt").write_bytes(content)
    line = user.refused("deploy", "small.toml", *more)
    new = {path.name for path in user.folder.parent.iterdir()} | {path.name for path in user.folder.iterdir()}
    assert new - before <= {"build", "dist", "weights.pt", "__pycache__"}
    return line


class Evil:
    """Unpickling this writes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return (_write, (str(self.path),))


def _write(path: str) -> None:
    Path(path).write_text("run")


def test_01_a_pickle_that_writes_a_file(user: Project, tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    for content in (pickle.dumps(Evil(trace)), saved({"weight": Evil(trace)}), saved({"w": Evil(trace)}, **LEGACY)):
        assert "weights.pt holds more than tensors, so it was not opened" in refused(user, content)
    assert not trace.exists()
    pickle.loads(pickle.dumps(Evil(trace)))  # noqa: S301 - it would have
    assert trace.exists()


LEGACY = {"_use_new_zipfile_serialization": False}


@pytest.mark.parametrize("name", ["weights.safetensors", "weights.jpg"])
def test_02_the_same_under_another_name(user: Project, tmp_path: Path, name: str) -> None:
    (user.folder / name).write_bytes(saved({"weight": Evil(tmp_path / "trace")}))
    text = user.recipe.read_text()
    try:
        user.edit(("weights.pt", name))
        assert f"{name} holds more than tensors, so it was not opened" in user.refused("deploy", "small.toml")
    finally:
        user.recipe.write_text(text)
    assert not (tmp_path / "trace").exists()


def test_03_a_payload_before_a_broken_stream(user: Project, tmp_path: Path) -> None:
    content = pickle.dumps(Evil(tmp_path / "trace"))
    for end in (b"", b"\xff\xff\xff", b"\x80"):
        assert "weights.pt" in refused(user, content[:-1] + end)
    assert not (tmp_path / "trace").exists()


def test_04_a_whole_pickled_module(user: Project) -> None:
    line = refused(user, saved(nn.Linear(3, 3)))
    assert "holds more than tensors, so it was not opened" in line
    assert "Save it again with torch.save(model.state_dict(), …)" in line


def test_05_torchscript_given_as_a_state_dict(user: Project) -> None:
    stream = io.BytesIO()
    torch.jit.save(torch.jit.script(nn.Linear(3, 3)), stream)
    assert "is a TorchScript program, not a state dict; save model.state_dict()" in refused(user, stream.getvalue())
    assert "is a TorchScript program" in refused(user, stream.getvalue(), "--trust")


def test_06_a_program_is_only_opened_with_trust(project: Project) -> None:
    project.edit(("module:smallmodel:make", "pt2:given.pt2"))
    (project.folder / "given.pt2").write_bytes(b"PK no")
    line = project.refused("deploy", "small.toml")
    assert "given.pt2: an exported program can run code when it is loaded; pass --trust if you trust it" in line
    assert "is not an exported program (.pt2)" in project.refused("deploy", "small.toml", "--trust")
    torch.jit.script(nn.Linear(3, 3)).save(project.folder / "given.pt2")  # type: ignore[no-untyped-call]
    assert "is not an exported program (.pt2)" in project.refused("deploy", "small.toml", "--trust")


def other_name(content: bytes) -> bytes:
    """Call the first record in its own header otherwise than in the directory at the end."""
    return content.replace(b"data.pkl", b"late.pkl", 1)


def bad_sum(content: bytes) -> bytes:
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        place = max(archive.infolist(), key=lambda record: record.file_size).header_offset
    return content[: place + 200] + bytes([content[place + 200] ^ 1]) + content[place + 201 :]


def twice(content: bytes) -> bytes:
    stream = io.BytesIO(content)
    with zipfile.ZipFile(stream, "a") as archive, pytest.warns(UserWarning, match="Duplicate name"):
        archive.writestr(archive.namelist()[0], b"another head")
    return stream.getvalue()


def two_folders(content: bytes) -> bytes:
    stream = io.BytesIO(content)
    with zipfile.ZipFile(stream, "a") as archive:
        archive.writestr("other/data.pkl", pickle.dumps({}))
    return stream.getvalue()


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (other_name, "is a broken ZIP (File name in directory"),
        (bad_sum, "is a broken ZIP (Bad CRC-32 for file"),
        (twice, "has two records called"),
        (two_folders, "holds 2 archives in one"),
        (lambda content: content + content, "is two files in one: there is something else before its ZIP"),
        (lambda content: pickle.dumps({}) + content, "is two files in one: there is something else before its ZIP"),
    ],
    ids=["names", "sum", "twice", "folders", "after", "before"],
)
def test_07_a_zip_that_could_be_read_in_two_ways(
    user: Project, state: State, change: Callable[[bytes], bytes], told: str
) -> None:
    assert told in refused(user, change(saved(state)))


def test_08_a_bomb(user: Project, state: State) -> None:
    stream = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(saved(state))) as plain, zipfile.ZipFile(stream, "w", compresslevel=1) as bomb:
        for record in plain.infolist():
            bomb.writestr(record.filename, plain.read(record), zipfile.ZIP_DEFLATED)
        bomb.writestr("archive/data/999", bytes(1 << 28), zipfile.ZIP_DEFLATED)
    assert "and says that it unpacks to 268" in refused(user, stream.getvalue())
    assert "is 4000000000000 bytes unpacked, far more than the file" in refused(
        user, saved({"weight": torch.zeros(1).expand(10**12)})
    )
    assert "wants far more memory than it has bytes" in refused(user, b"\x80\x02X\xff\xff\xff\x7f")


def test_09_cut_off_anywhere(user: Project, state: State) -> None:
    for whole in (saved(state), saved(state, **LEGACY), save(state)):
        for length in (0, 1, 7, 8, 9, 100, len(whole) // 3, len(whole) // 2, len(whole) - 100, len(whole) - 1):
            assert "weights.pt" in refused(user, whole[:length]), length


def header(entries: dict[str, object], data: int = 64, length: int | None = None) -> bytes:
    text = json.dumps(entries).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + bytes(data)


def entry(start: int, end: int, shape: tuple[int, ...] = (4,)) -> dict[str, object]:
    return {"dtype": "F32", "shape": list(shape), "data_offsets": [start, end]}


@pytest.mark.parametrize("length", [0, 5, 10**6, 2**63, 2**64 - 1])
def test_10_a_safetensors_header_of_another_length(user: Project, length: int) -> None:
    assert "is not a readable state dict (" in refused(user, header({"a": entry(0, 16)}, length=length))


@pytest.mark.parametrize(
    "entries",
    [
        {"a": entry(0, 16), "b": entry(8, 24)},
        {"a": entry(0, 16), "b": entry(0, 16)},
        {"a": entry(0, 1600, (400,))},
        {"a": entry(16, 0)},
        {"a": entry(0, 16, (2**62, 8))},
        {"a": entry(0, 16), "b": entry(32, 48)},
    ],
    ids=["overlap", "same", "beyond", "backwards", "overflow", "gap"],
)
def test_11_safetensors_offsets_that_overlap_or_overflow(user: Project, entries: dict[str, object]) -> None:
    assert "is not a readable state dict (" in refused(user, header(entries))


def test_12_missing_extra_and_misshapen_keys_are_listed(user: Project, state: State) -> None:
    state["strange.weight"] = state.pop("first.0.weight")
    state["head.bias"] = torch.zeros(5)
    line = refused(user, saved(state))
    assert "is not a state dict of this model: 1 missing: first.0.weight; 1 unexpected: strange.weight; " in line
    assert "1 misshapen: head.bias [5] where the model has [3]" in line


@pytest.mark.parametrize("value", ["nan", "inf", "0"])
def test_13_weights_that_are_no_numbers_or_all_zero(user: Project, state: State, value: str) -> None:
    for tensor in state.values():
        if value == "0" and tensor.ndim > 1:
            tensor.zero_()
    if value != "0":
        state["second.0.weight"][3, 2, 1, 1] = float(value)
    told = {"0": "has nothing but zeros in its weights"}.get(value, "has NaN or infinity in second.0.weight")
    assert told in refused(user, saved(state))


def test_14_another_number_of_classes(user: Project, state: State) -> None:
    state |= {"head.weight": torch.zeros(7, 16), "head.bias": torch.zeros(7)}
    assert "misshapen: head.weight [7, 16] where the model has [3, 16]" in refused(user, saved(state))
    text = user.recipe.read_text()
    try:
        user.edit(('"Pullover"]', '"Pullover", "Dress"]'))
        del state["head.weight"], state["head.bias"]
        state |= dict(architecture(recipe.read(user.recipe), user.folder).state_dict())
        line = refused(user, saved(state))
    finally:
        user.recipe.write_text(text)
    assert "gives (2, 3) for 2 images; the recipe has 4 classes, so (2, 4) was expected" in line
