"""The store: what goes in comes out, damage and tricks do not, and nodes with a cache each make a stage once."""

import io
import multiprocessing
import os
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from bitferry.device.errors import InputError, TargetUnavailable
from bitferry.pipeline.cache import Cache
from bitferry.pipeline.nightly import parcel
from bitferry.pipeline.nightly.store import Store
from bitferry.pipeline.recipe import read
from tests.conftest import Project


@pytest.fixture(params=["path", "file", "memory"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Store]:
    urls = {"path": str(tmp_path / "store"), "file": f"file://{tmp_path}/store", "memory": "memory://bitferry-test"}
    made = Store(urls[request.param])
    yield made
    files, root = made._place
    files.rm(root, recursive=True)


@pytest.fixture
def local(tmp_path: Path) -> Store:
    return Store(str(tmp_path / "store"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "made"
    (made / "deep/er").mkdir(parents=True)
    (made / "empty").mkdir()
    (made / "weights.bin").write_bytes(os.urandom(3 << 20))
    (made / "deep/er/ä name of more than one hundred letters ".ljust(150, "x")).write_text("content")
    return made


def content(folder: Path) -> dict[str, bytes | None]:
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in sorted(folder.rglob("*"))}


def objects(root: Path) -> list[Path]:
    return sorted((root / "store/objects").iterdir())


def test_a_folder_comes_out_as_it_went_in(store: Store, folder: Path, tmp_path: Path) -> None:
    assert not store.has("compile-1")
    assert not store.get_folder("compile-1", tmp_path / "none")
    store.put_folder("compile-1", folder)
    assert store.has("compile-1")
    assert store.get_folder("compile-1", tmp_path / "out")
    assert content(tmp_path / "out") == content(folder)


def test_bytes_come_out_as_they_went_in(store: Store) -> None:
    assert store.get_bytes("parcel-1") is None
    store.put_bytes("parcel-1", b"recipe")
    assert store.get_bytes("parcel-1") == b"recipe"


def test_equal_folders_are_one_object_whatever_their_times(local: Store, folder: Path, tmp_path: Path) -> None:
    first = local.put_folder("a-1", folder)
    os.utime(folder / "weights.bin", (1, 1))
    (folder / "weights.bin").chmod(0o600)
    assert local.put_folder("b-2", folder) == first
    assert [path.name for path in objects(tmp_path)] == [first]


def test_a_damaged_object_is_not_used_and_can_be_put_again(local: Store, folder: Path, tmp_path: Path) -> None:
    local.put_folder("compile-1", folder)
    damaged = bytearray(objects(tmp_path)[0].read_bytes())
    damaged[1 << 20] ^= 1
    objects(tmp_path)[0].write_bytes(damaged)
    assert not local.get_folder("compile-1", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    local.put_folder("compile-1", folder)
    assert local.get_folder("compile-1", tmp_path / "out")
    assert content(tmp_path / "out") == content(folder)


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE])
@pytest.mark.parametrize("name", ["plain", "../out", "/out"])
def test_only_plain_files_inside_the_folder_are_unpacked(local: Store, tmp_path: Path, kind: bytes, name: str) -> None:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as tar:
        member = tarfile.TarInfo(name)
        member.type, member.linkname = (kind, "/etc/passwd") if name == "plain" else (tarfile.REGTYPE, "")
        tar.addfile(member)
    local.put_bytes("compile-1", stream.getvalue())
    with pytest.raises(InputError, match="which is no plain file or folder; it is not used"):
        local.get_folder("compile-1", tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())


def test_a_link_is_not_packed(local: Store, folder: Path) -> None:
    (folder / "link").symlink_to("weights.bin")
    with pytest.raises(InputError, match="link is neither a file nor a folder"):
        local.put_folder("compile-1", folder)


def test_places_that_cannot_be_used_are_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be used"):
        Store(str(tmp_path / "file/store")).has("a")
    with pytest.raises(InputError, match="is no folder and no URL that fsspec knows"):
        Store("nowhere://x").has("a")
    with pytest.raises(TargetUnavailable, match="s3fs"):
        Store("s3://bucket/x").has("a")


def _put(arguments: tuple[str, Path]) -> None:
    url, folder = arguments
    for _ in range(5):
        Store(url).put_folder("compile-1", folder)


def test_several_may_put_the_same_at_once(local: Store, folder: Path, tmp_path: Path) -> None:
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        pool.map(_put, [(local.url, folder)] * 2)
    assert len(objects(tmp_path)) == 1
    assert local.get_folder("compile-1", tmp_path / "out")
    assert content(tmp_path / "out") == content(folder)


def test_pruning_leaves_what_was_used(local: Store, folder: Path, tmp_path: Path) -> None:
    local.put_folder("old-1", folder)
    used = local.put_bytes("used-2", b"used")
    long_ago = time.time() - 40 * 86400
    for path in (tmp_path / "store").rglob("*"):
        os.utime(path, (long_ago, long_ago))
    local.get_bytes("used-2")
    local.put_bytes("new-3", b"new")
    assert local.prune(30) > 3 << 20
    assert not local.has("old-1")
    assert local.get_bytes("used-2") == b"used"
    assert local.get_bytes("new-3") == b"new"
    assert used in [path.name for path in objects(tmp_path)]
    assert len(objects(tmp_path)) == 2


def test_a_second_node_fetches_what_the_first_made(local: Store, tmp_path: Path) -> None:
    made = []

    def make(folder: Path) -> None:
        made.append(folder)
        (folder / "artifact").write_text("content")

    def refuse(folder: Path) -> None:
        raise AssertionError("made again")

    first = Cache(tmp_path / "first", local).folder("compile", "1", make)
    second = Cache(tmp_path / "second", local).folder("compile", "1", refuse)
    assert (second / "artifact").read_text() == (first / "artifact").read_text() == "content"
    assert len(made) == 1
    Cache(tmp_path / "second", local).folder("compile", "1", refuse)
    assert sorted(path.name for path in second.parent.iterdir()) == [".bitferry", "compile-1"]


def _make_slowly(folder: Path) -> None:
    (folder / "start").write_text(str(time.monotonic()))
    time.sleep(0.5)
    (folder / "end").write_text(str(time.monotonic()))


def _folder(arguments: tuple[Path, str]) -> tuple[float, float]:
    root, key = arguments
    made = Cache(root).folder("compile", key, _make_slowly)
    return float((made / "start").read_text()), float((made / "end").read_text())


def test_two_outputs_of_one_stage_are_made_at_once_and_one_output_once(tmp_path: Path) -> None:
    with multiprocessing.get_context("spawn").Pool(3) as pool:
        pool.map(_folder, [(tmp_path, "warm")] * 3)  # the processes are up
        one, other, same = pool.map(_folder, [(tmp_path, "1"), (tmp_path, "2"), (tmp_path, "1")], chunksize=1)
    assert one == same
    assert one[0] < other[1]
    assert other[0] < one[1]
    assert not list(tmp_path.glob(".*.lock"))


def test_a_parcel_holds_what_a_training_starts_from(project: Project, tmp_path: Path) -> None:
    def start(name: str) -> None:
        project.edit(("[training]\n", f'[training]\nstart = "{name}"\n'))

    place = str(tmp_path / "store")
    start("weights/start.safetensors")
    with pytest.raises(InputError, match=r"training\.start: the file .*start\.safetensors does not exist"):
        parcel.pack(read(project.recipe), project.recipe, Store(place))
    (project.folder / "weights").mkdir()
    (project.folder / "weights/start.safetensors").write_bytes(b"learned")
    name, recipe = parcel.pack(read(project.recipe), project.recipe, Store(place))
    there = read(parcel.unpack(name, recipe, place, tmp_path / "node"))
    assert there.training.start != read(project.recipe).training.start
    assert Path(str(there.training.start)).read_bytes() == b"learned"
    project.edit(("weights/start.safetensors", str(project.folder / "weights/start.safetensors")))
    with pytest.raises(InputError, match=r"names an absolute path, training\.start"):
        parcel.pack(read(project.recipe), project.recipe, Store(place))
