"""Archives from strangers: read as they were written, or refused before a byte lands outside."""

import contextlib
import gzip
import io
import json
import os
import tarfile
import tracemalloc
import zipfile
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bitferry.device import archive, install, installed, strict
from bitferry.device.errors import InputError
from tests.conftest import Project
from tests.signed import Shop, open_shop


@pytest.fixture(scope="module")
def shop(deployed: Project, tmp_path_factory: pytest.TempPathFactory) -> Shop:
    return open_shop(deployed.folder / "dist/small-openvino-1.0.0", tmp_path_factory.mktemp("shop"))


@pytest.fixture(scope="module")
def right(shop: Shop) -> Path:
    return shop.archive("1.0.0")


@pytest.fixture(scope="module")
def root(shop: Shop) -> Path:
    return shop.device()


def members(path: Path) -> list[tuple[tarfile.TarInfo, bytes]]:
    with tarfile.open(path) as tar:
        return [(one, (tar.extractfile(one) or io.BytesIO()).read()) for one in tar.getmembers()]


def written(path: Path, given: Iterable[tuple[tarfile.TarInfo, bytes]], form: int = tarfile.USTAR_FORMAT) -> Path:
    with tarfile.open(path, "w:gz", format=form) as tar:
        for member, content in given:
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def refused(path: Path, root: Path) -> str:
    """Expect an archive to be refused, with nothing left anywhere; give the message."""
    before = sorted(one for one in root.parent.rglob("*") if one.name != "status.json")
    with pytest.raises(InputError) as caught:
        install.install(path, root)
    after = sorted(one for one in root.parent.rglob("*") if one.name != "status.json")
    assert [one for one in after if one not in before and one.parent != root.parent] == []
    assert installed.current(root) is None
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_an_archive_is_read_as_it_was_written(right: Path) -> None:
    with archive.Reader(right) as reader:
        found = [(member.name, member.size, b"".join(reader.parts())) for member in reader]
    wanted = [(one.name.partition("/")[2], one.size, content) for one, content in members(right)]
    assert found == wanted
    assert len(found) > 10


def change(index: int, **fields: object) -> Callable[[list[tuple[tarfile.TarInfo, bytes]]], None]:
    def changed(given: list[tuple[tarfile.TarInfo, bytes]]) -> None:
        for name, value in fields.items():
            setattr(given[index][0], name, value)

    return changed


KINDS = {
    "34-parent": (change(5, name="small-openvino-1.0.0/../../evil"), "no plain name inside its one folder"),
    "34-absolute": (change(5, name="/etc/evil"), "no plain name inside its one folder"),
    "34-other-folder": (change(5, name="elsewhere/evil"), "no plain name inside its one folder"),
    "34-top": (change(5, name="evil"), "no plain name inside its one folder"),
    "34-backslash": (change(5, name="small-openvino-1.0.0/a\\b"), "no plain name inside its one folder"),
    "34-colon": (change(5, name="small-openvino-1.0.0/C:evil"), "no plain name inside its one folder"),
    "34-link": (change(5, type=tarfile.SYMTYPE, linkname="/etc/passwd"), "holds a symbolic link"),
    "34-hard-link": (change(5, type=tarfile.LNKTYPE, linkname="/etc/passwd"), "holds a hard link"),
    "34-device": (change(5, type=tarfile.CHRTYPE), "holds a device"),
    "34-fifo": (change(5, type=tarfile.FIFOTYPE), "holds a FIFO"),
    "34-folder": (change(5, type=tarfile.DIRTYPE), "holds a folder"),
    "34-sparse": (change(5, type=tarfile.GNUTYPE_SPARSE), "holds a sparse file"),
    "34-duplicate": (lambda given: given.insert(6, given[5]), "twice, unlisted or of another size"),
    "34-manifest-again": (lambda given: given.append(given[0]), "twice, unlisted or of another size"),
    "36-manifest-later": (lambda given: given.insert(0, given.pop(3)), "it has no manifest.json"),
    "38-no-signature": (lambda given: given.pop(1), "it is not signed"),
    "37-one-file-less": (lambda given: given.pop(), "missing: "),
    "34-only-a-manifest": (lambda given: given.__delitem__(slice(1, None)), "it holds 1 files"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_34_members_that_lead_out_or_are_no_files_are_refused(
    kind: str, right: Path, root: Path, tmp_path: Path
) -> None:
    changed, told = KINDS[kind]
    given = members(right)
    changed(given)
    assert told in refused(written(tmp_path / "changed.tar.gz", given), root)


def test_34_headers_of_any_length_are_refused_unread(right: Path, root: Path, tmp_path: Path) -> None:
    given = members(right)
    given[5][0].name = "small-openvino-1.0.0/" + "n" * 300
    for form in (tarfile.PAX_FORMAT, tarfile.GNU_FORMAT):
        told = refused(written(tmp_path / f"{form}.tar.gz", given, form), root)
        assert "an extended header" in told or "a header that bitferry does not write" in told


def test_35_other_archives_are_refused(right: Path, root: Path, tmp_path: Path) -> None:
    path = tmp_path / "slip.zip"
    with zipfile.ZipFile(path, "w") as packed:
        packed.writestr("../../evil", "x")
    assert "it is no gzipped tar" in refused(path, root)
    plain = tmp_path / "plain.tar"
    plain.write_bytes(gzip.decompress(right.read_bytes()))
    assert "it is no gzipped tar" in refused(plain, root)
    plain.write_bytes(b"")
    assert "it ends too early" in refused(plain, root)
    assert "is no file" in refused(tmp_path, root)


def test_35_a_million_files_and_a_bomb_cost_little(right: Path, root: Path, tmp_path: Path) -> None:
    header = tarfile.TarInfo("small-openvino-1.0.0/x").tobuf(tarfile.USTAR_FORMAT)
    first = gzip.decompress(right.read_bytes())
    start = sum(512 + -(-one.size // 512) * 512 for one, _ in members(right)[:2])
    many = tmp_path / "many.tar.gz"
    with gzip.open(many, "wb", 1) as file:
        file.write(first[:start])
        for _ in range(1000):
            file.write(header * 1000)
    assert "twice, unlisted" in refused(many, root)
    with archive.Reader(many) as reader, pytest.raises(InputError, match="holds more than 10,000 files"):
        list(reader)
    bomb, zeros = tmp_path / "bomb.tar.gz", bytes(1 << 20)
    packing = zlib.compressobj(9, wbits=31)
    with bomb.open("wb") as raw:
        raw.write(packing.compress(first[: start + 512]))
        for _ in range(200):
            raw.write(packing.compress(zeros))
        raw.write(packing.flush())
    assert bomb.stat().st_size < 4 << 20
    tracemalloc.start()
    refused(bomb, root)
    assert tracemalloc.get_traced_memory()[1] < 64 << 20
    tracemalloc.stop()


def test_36_manifests_of_every_wrong_kind_are_refused(shop: Shop, right: Path, root: Path, tmp_path: Path) -> None:
    given = members(right)
    fields = json.loads(given[0][1])
    twice = given[0][1].replace(b'"files"', b'"name": "x", "files"', 1)
    for content, told in (
        (twice, "the key 'name' is there twice"),
        (b"{", "cannot be read"),
        (b"[]", "expected a JSON object"),
        (b"\xff\xfe", "cannot be read"),
        (b'{"a": NaN}', "NaN is no JSON number"),
        (b'{"a":' * 100_000, "nested too deeply"),
        (b" " * (9 << 20), "bytes, and 8,388,608 are allowed"),
        (json.dumps(fields | {"x": 1}).encode(), "holds a manifest that was not signed with it"),
    ):
        given[0] = (given[0][0], content)
        assert told in refused(written(tmp_path / "changed.tar.gz", given), root)
    wrong: list[tuple[dict[str, object], str]] = [
        ({"files": {"../evil": {"sha256": "0" * 64, "size_bytes": 1}}}, "which is no plain name inside a folder"),
        ({"tied": None}, "has no usable tied"),
        ({"files": {}}, "was signed with other files than its manifest lists"),
    ]
    for changed, told in wrong:
        assert told in refused(shop_archive(shop, changed), root)


def shop_archive(shop: Shop, fields: dict[str, object]) -> Path:
    """Sign what no `bitferry sign` would."""
    from bitferry.device import signature, whole  # noqa: PLC0415
    from bitferry.pipeline.shipping import keys, sign  # noqa: PLC0415

    bundle = shop.copy("5.0.0")
    manifest = json.loads((bundle / "manifest.json").read_text())
    (bundle / "manifest.json").write_text(json.dumps(manifest | fields))
    payload = signature.statement(bundle.name, whole.digests(bundle))
    key = keys.private(shop.key)
    made = keys.sign(signature.encoded(payload), key)
    (bundle / "model.sig").write_bytes(signature.enclose(payload, made, keys.name_of(key, "it")))
    return sign.archive(bundle)


def test_43_a_short_or_an_endless_file_is_refused(right: Path, root: Path, tmp_path: Path) -> None:
    content, path = right.read_bytes(), tmp_path / "part.tar.gz"
    for share in (0.001, 0.1, 0.5, 0.9, 0.999):
        path.write_bytes(content[: int(share * len(content))])
        assert "it ends too early" in refused(path, root)
    path.write_bytes(content[:-1])
    assert "it ends too early" in refused(path, root)
    for more in (b"x", content, gzip.compress(b"x"), gzip.compress(bytes(1 << 20))):
        path.write_bytes(content + more)
        assert "something follows its end" in refused(path, root)
    os.mkfifo(tmp_path / "fifo")
    assert "is no file" in refused(tmp_path / "fifo", root)


@pytest.mark.parametrize(
    "name", ["", "/a", "a/", "a//b", "./a", "a/../b", "a\0b", "a\nb", "a:b", "n" * 101, "a\\b", "é" * 60]
)
def test_names_that_lead_anywhere_else_are_not_plain(name: str) -> None:
    assert not strict.plain(name)


def test_names_that_are_one_file_somewhere_are_refused() -> None:
    for names, told in ((["A", "a"], "names 'a' twice"), (["a", "a/b"], "as a file and as a folder")):
        with pytest.raises(InputError, match=told):
            strict.names(names, "it")


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_bytes_changed_in_an_archive_end_in_one_line(
    data: st.DataObject, right: Path, root: Path, tmp_path: Path
) -> None:
    content = bytearray(gzip.decompress(right.read_bytes()))
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, len(content) - 1) | st.integers(0, 4096))
        content[place] = data.draw(st.integers(0, 255))
    path = tmp_path / "changed.tar.gz"
    path.write_bytes(gzip.compress(content, 1))
    with contextlib.suppress(InputError), archive.opened(path) as (_, reader):
        for _ in reader:
            pass


def test_36_many_keys_are_read_in_no_time_and_a_second_one_is_found() -> None:
    keys = [f'"{i}": 0' for i in range(200_000)]
    content = ("{" + ",".join([*keys, '"199999": 1']) + "}").encode()
    with pytest.raises(InputError, match="the key '199999' is there twice"):
        strict.read(content, "it")


def test_35_headers_without_end_are_refused(right: Path, root: Path, tmp_path: Path) -> None:
    path = tmp_path / "idle.tar.gz"
    path.write_bytes(bytes((0x1F, 0x8B, 8, 8, 0, 0, 0, 0, 0, 255)) + b"n" * (4 << 20))
    assert "its beginning says nothing" in refused(path, root)
    path.write_bytes(gzip.compress(b"") * 100_000)
    assert "something follows its end" in refused(path, root)
    content = bytearray(right.read_bytes())
    content[-8] ^= 1
    path.write_bytes(content)
    assert "it is damaged" in refused(path, root)
