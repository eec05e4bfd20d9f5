"""Publishing: what a repository holds, who may write to it, and that a kill in the middle of writing spoils nothing."""

import json
import shutil
import stat
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from tuf.api.metadata import Metadata, Root, Targets

from bitferry.device.errors import InputError
from bitferry.pipeline.shipping import publish
from bitferry.pipeline.shipping.repository import Days
from bitferry.pipeline.shipping.roles import ROLES, Role
from tests.conftest import ROOT
from tests.publisher import Late, Publisher, write_archive
from tests.served import served

KILLING = """
import os, shutil, signal, sys
from pathlib import Path
from bitferry.pipeline.shipping import publish

def deadly(real, left):
    def call(*arguments, **options):
        left[0] -= 1
        if left[0] < 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*arguments, **options)
    return call

base, cases = Path(sys.argv[1]), Path(sys.argv[2])
for count in range(1000):
    case = cases / f"{count:03}"
    shutil.copytree(base, case)
    child = os.fork()
    if child == 0:
        left = [count]
        os.replace, os.fsync = deadly(os.replace, left), deadly(os.fsync, left)
        repository, keys, made = case / "repository", case / "keys", case / "made"
        WORK
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    if status == 0:
        break
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, status
"""
"""Does the same work in one copy after another, killed before its first, second, … replace or fsync, until it ends."""
ADDING = """
archive = made / "small-openvino-1.1.0.tar.gz"
publish.add(repository, keys, archive, {"name": "small", "target": "openvino", "version": "1.1.0"})
"""


@pytest.fixture
def shop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Publisher]:
    monkeypatch.setenv("no_proxy", "*")
    with served(tmp_path / "shop/repository") as server:
        yield Publisher(tmp_path / "shop", server)


def killed(shop: Publisher, work: str) -> list[Path]:
    """Run the work with every kill; list the folders it leaves, the last of them from a run that ended."""
    code = KILLING.replace("        WORK\n", textwrap.indent(work, " " * 8))
    cases = shop.folder.with_name("cases")
    command: list[str | Path] = [sys.executable, "-c", code, shop.folder, cases]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return sorted(cases.iterdir())


def test_the_first_archive_makes_the_repository_and_its_keys(shop: Publisher) -> None:
    done = shop.publish("1.0.0")
    assert done.created
    assert done.archives == ("small-openvino-1.0.0.tar.gz",)
    assert sorted(path.name for path in shop.keys.iterdir()) == sorted(f"{role}.pem" for role in ROLES)
    assert {stat.S_IMODE(path.stat().st_mode) for path in shop.keys.iterdir()} == {0o600}
    assert stat.S_IMODE(shop.keys.stat().st_mode) == 0o700
    names = {path.name for path in (shop.repository / "metadata").iterdir()}
    assert names == {f"{role}.json" for role in ROLES} | {"1.root.json", "1.targets.json", "1.snapshot.json"}
    (target,) = (shop.repository / "targets").iterdir()
    made = shop.folder / "made/small-openvino-1.0.0.tar.gz"
    assert target.read_bytes() == made.read_bytes()
    entry = Metadata[Targets].from_file(str(shop.metadata("targets"))).signed.targets[made.name]
    assert entry.custom == {"bitferry": {"name": "small", "target": "openvino", "version": "1.0.0"}}
    assert target.name == f"{entry.hashes['sha256']}.{made.name}"
    assert not [path for path in shop.repository.rglob("*") if path.name.startswith(".")]


def test_a_further_archive_keeps_those_before(shop: Publisher) -> None:
    shop.publish("1.0.0")
    keys = {path.name: path.read_bytes() for path in shop.keys.iterdir()}
    done = shop.publish("1.1.0")
    assert not done.created
    assert done.archives == ("small-openvino-1.0.0.tar.gz", "small-openvino-1.1.0.tar.gz")
    assert {path.name: path.read_bytes() for path in shop.keys.iterdir()} == keys
    assert [Metadata.from_file(str(shop.metadata(role))).signed.version for role in ROLES] == [1, 2, 2, 2]


def test_signatures_hold_as_long_as_asked(shop: Publisher) -> None:
    done = shop.publish("1.0.0", days=Days(root=50, targets=40, snapshot=30, timestamp=2))
    left = {role: end - datetime.now(UTC) for role, end in done.expires.items()}
    assert {role: round(time / timedelta(days=1)) for role, time in left.items()} == {
        "root": 50,
        "targets": 40,
        "snapshot": 30,
        "timestamp": 2,
    }
    assert done.first[0] == "timestamp"
    with pytest.raises(InputError, match="cannot hold 0 days; give 1 or more"):
        Days(snapshot=0)
    with pytest.raises(InputError, match="cannot hold 99999999 days; give fewer"):
        shop.publish("1.1.0", days=Days(targets=99999999))


def test_refreshing_needs_only_the_two_keys_of_every_day(shop: Publisher) -> None:
    shop.publish("1.0.0", days=Days(timestamp=1, snapshot=1))
    for role in ("root", "targets"):
        (shop.keys / f"{role}.pem").rename(shop.folder / f"{role}.pem")
    done = publish.refresh(shop.repository, shop.keys, days=Days(timestamp=20, snapshot=20))
    assert done.expires["timestamp"] - datetime.now(UTC) > timedelta(days=19)
    assert not (shop.repository / "metadata/2.targets.json").exists()
    shop.pin()
    assert shop.fetch().name == "small-openvino-1.0.0.tar.gz"
    with pytest.raises(
        InputError, match="lets other keys sign targets than those given; name the folder with the keys"
    ):
        shop.publish("1.1.0")
    assert shop.fetch().name == "small-openvino-1.0.0.tar.gz"


def test_a_version_is_published_once(shop: Publisher) -> None:
    shop.publish("1.0.0")
    again = shop.publish("1.0.0")
    assert again.archives == ("small-openvino-1.0.0.tar.gz",)
    fields = {"name": "small", "target": "openvino", "version": "1.0.0"}
    other = write_archive(shop.folder / "other", "1.0.0")
    other.write_bytes(b"others")
    with pytest.raises(
        InputError, match="small 1.0.0 for openvino is published already, as small-openvino-1.0.0.tar.gz"
    ):
        publish.add(shop.repository, shop.keys, other, fields)
    renamed = other.rename(other.with_name("same.tar.gz"))
    with pytest.raises(InputError, match="is published already, as small-openvino-1.0.0.tar.gz with other contents"):
        publish.add(shop.repository, shop.keys, renamed, fields)


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        ("a b.tar.gz", {}, "cannot be published under its name"),
        ("a.zip", {}, "cannot be published under its name"),
        ("a.tar.gz", {"version": "new"}, "'new' is no version; it has the form 1.2.3"),
        ("a.tar.gz", {"version": None, "target": ""}, "has a manifest without target, version"),
    ],
)
def test_an_archive_that_no_device_could_choose_is_refused(
    shop: Publisher, name: str, fields: dict[str, object], message: str
) -> None:
    shop.folder.mkdir()
    path = shop.folder / name
    path.write_bytes(b"an archive")
    with pytest.raises(InputError, match=message):
        publish.add(shop.repository, shop.keys, path, {"name": "a", "target": "b", "version": "1"} | fields)
    assert not (shop.repository / "metadata/timestamp.json").exists()


def test_folders_that_cannot_be_right_are_refused(shop: Publisher) -> None:
    archive = write_archive(shop.folder, "1.0.0")
    fields = {"name": "small", "target": "openvino", "version": "1.0.0"}
    inside = shop.folder / "link"
    inside.symlink_to(shop.repository)
    for keys in (shop.repository / "keys", shop.repository, inside / "metadata/keys"):
        with pytest.raises(InputError, match="which anyone may read; name a folder outside for the keys"):
            publish.add(shop.repository, keys, archive, fields)
    photos = shop.folder / "photos"
    photos.mkdir()
    (photos / "cat.png").touch()
    with pytest.raises(InputError, match="photos is not empty and no repository"):
        publish.add(photos, shop.keys, archive, fields)
    assert not shop.keys.exists()
    for command in (publish.refresh, publish.rotate):
        with pytest.raises(InputError, match="holds no repository; publish a bundle there first"):
            command(shop.folder / "new", shop.keys)
    with pytest.raises(InputError, match="missing.tar.gz cannot be read: No such file"):
        publish.add(shop.repository, shop.keys, shop.folder / "missing.tar.gz", fields)


def test_other_keys_change_nothing(shop: Publisher) -> None:
    shop.publish("1.0.0")
    before = {path: path.read_bytes() for path in shop.repository.rglob("*.json")}
    theirs = Publisher(shop.folder / "theirs", shop.server)
    theirs.publish("1.0.0")
    shutil.rmtree(shop.keys)
    shutil.copytree(theirs.keys, shop.keys)
    with pytest.raises(InputError, match="1.root.json lets other keys sign targets than those given"):
        shop.publish("1.1.0")
    (shop.keys / "root.pem").write_text("nothing")
    with pytest.raises(InputError, match="root.pem is no private key that can be used"):
        shop.publish("1.1.0")
    assert {path: path.read_bytes() for path in shop.repository.rglob("*.json")} == before


@pytest.mark.parametrize("role", ROLES)
def test_what_was_changed_on_the_server_is_not_signed_anew(shop: Publisher, role: Role) -> None:
    shop.publish("1.0.0")
    path = shop.metadata(role)
    changed = json.loads(path.read_bytes())
    changed["signed"]["expires"] = "2999-01-01T00:00:00Z"
    path.write_text(json.dumps(changed))
    with pytest.raises(InputError, match=f"{role}.json is not what this repository's keys signed"):
        shop.publish("1.1.0")
    path.write_text("nothing")
    with pytest.raises(InputError, match=f"{role}.json cannot be read: .*; bring it back from a copy"):
        shop.publish("1.1.0")


@pytest.mark.parametrize("role", ROLES)
def test_a_new_key_is_followed_and_the_old_one_counts_no_more(shop: Publisher, role: Role) -> None:
    shop.publish("1.0.0")
    shop.pin()
    shop.fetch()
    publish.rotate(shop.repository, shop.keys, role)
    old = Metadata[Root].from_file(str(shop.repository / "metadata/1.root.json")).signed
    new = Metadata[Root].from_file(str(shop.repository / "metadata/root.json")).signed
    changed = {one for one in ROLES if old.roles[one].keyids != new.roles[one].keyids}
    assert (new.version, changed) == (2, {role})
    assert shop.fetch().name == "small-openvino-1.0.0.tar.gz"
    (shop.keys / f"{role}.pem").unlink()
    shop.publish("1.1.0")
    publish.rotate(shop.repository, shop.keys, role)
    assert shop.fetch().name == "small-openvino-1.1.0.tar.gz"
    (shop.keys / f"{role}-2.pem").rename(shop.keys / f"{role}.pem")
    (shop.keys / f"{role}-3.pem").unlink()
    with pytest.raises(InputError, match=f"3.root.json lets other keys sign {role}"):
        publish.rotate(shop.repository, shop.keys, role)


def test_two_publishers_take_turns(shop: Publisher) -> None:
    shop.publish("1.0.0")
    code = """
import sys
from pathlib import Path
from bitferry.pipeline.shipping import publish
for path in map(Path, sys.argv[3:]):
    fields = {"name": "small", "target": "openvino", "version": path.name[15:-7]}
    publish.add(Path(sys.argv[1]), Path(sys.argv[2]), path, fields)
"""
    versions = ["1.1.0", "1.2.0", "1.3.0", "1.4.0", "1.5.0", "1.6.0"]
    paths = [write_archive(shop.folder / "made", version) for version in versions]
    common: list[str | Path] = [sys.executable, "-c", code, shop.repository, shop.keys]
    both = [subprocess.Popen([*common, *part], cwd=ROOT) for part in (paths[::2], paths[1::2])]
    assert [process.wait() for process in both] == [0, 0]
    listed = Metadata[Targets].from_file(str(shop.metadata("targets"))).signed
    assert (listed.version, len(listed.targets)) == (7, 7)
    shop.pin()
    assert shop.fetch().name == "small-openvino-1.6.0.tar.gz"


def test_a_kill_at_any_write_leaves_a_repository_that_devices_can_use(shop: Publisher) -> None:
    shop.publish("1.0.0")
    shop.pin()
    shop.fetch()
    write_archive(shop.folder / "made", "1.1.0")
    cases = killed(shop, ADDING)
    found = []
    for case in cases:
        there = Publisher(case, shop.server)
        shop.server.folder = there.repository
        found.append(there.fetch().name)
        there.publish("1.1.0")
        assert there.fetch().name == "small-openvino-1.1.0.tar.gz"
        assert not list(there.repository.rglob(".*"))
    assert len(found) > 10
    assert set(found[:-3]) == {"small-openvino-1.0.0.tar.gz"}, "the timestamp is not last"
    assert found[-1] == "small-openvino-1.1.0.tar.gz"


def test_a_kill_while_a_repository_is_made_is_mended_by_publishing_again(shop: Publisher) -> None:
    write_archive(shop.folder / "made", "1.1.0")
    cases = killed(shop, ADDING)
    assert len(cases) > 20
    for case in cases[::2]:
        there = Publisher(case, shop.server)
        shop.server.folder = there.repository
        there.publish("1.1.0")
        there.pin()
        assert there.fetch().name == "small-openvino-1.1.0.tar.gz"
        assert not list(there.repository.rglob(".*"))
        assert {path.name for path in there.keys.iterdir()} >= {f"{role}.pem" for role in ROLES}


@pytest.mark.parametrize("role", ["root", "timestamp"])
def test_a_kill_while_a_key_is_replaced_leaves_old_and_new_devices_served(shop: Publisher, role: Role) -> None:
    shop.publish("1.0.0")
    shop.pin()
    shop.fetch()
    write_archive(shop.folder / "made", "1.1.0")
    cases = killed(shop, f"publish.rotate(repository, keys, {role!r})\n")
    for number, case in enumerate(cases):
        there = Publisher(case, shop.server)
        shop.server.folder = there.repository
        assert there.fetch().name == "small-openvino-1.0.0.tar.gz"
        if number % 3 == 0 or case == cases[-1]:
            there.publish("1.1.0")
            newest = there.metadata("root")
            assert (there.repository / "metadata/root.json").read_bytes() == newest.read_bytes()
            assert there.fetch().name == "small-openvino-1.1.0.tar.gz"
    assert len(cases) > 6


def test_late_signatures_are_made_good_by_the_next_command(shop: Publisher) -> None:
    shop.publish("1.0.0", days=Late(role="timestamp"))
    shop.pin()
    with pytest.raises(InputError, match="has expired"):
        shop.fetch()
    publish.refresh(shop.repository, shop.keys)
    assert shop.fetch().name == "small-openvino-1.0.0.tar.gz"
