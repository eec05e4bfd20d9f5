"""Updating a device: the newest is brought whole, over bad connections too, and every known attack is refused."""

import fcntl
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from securesystemslib.signer import CryptoSigner
from tuf.api.metadata import Metadata, MetaFile, Root, Signed, Snapshot, Timestamp

from bitferry.device import download, update, versions
from bitferry.device.errors import InputError
from bitferry.pipeline.shipping import publish, roles
from bitferry.pipeline.shipping.roles import Role
from tests.conftest import ROOT
from tests.publisher import SIZE, Late, Publisher
from tests.served import Handler, served

NEWEST = "small-openvino-1.1.0.tar.gz"


@pytest.fixture
def shop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Publisher]:
    """A repository with two versions, of which the device has the first."""
    monkeypatch.setattr(download, "PAUSE_S", 0.001)
    monkeypatch.setenv("no_proxy", "*")
    with served(tmp_path / "shop/repository") as server:
        made = Publisher(tmp_path / "shop", server)
        made.publish("1.0.0")
        made.pin()
        made.fetch()
        made.copy("first")
        made.publish("1.1.0")
        server.asked.clear()
        yield made


def content(shop: Publisher, name: str = NEWEST) -> bytes:
    return (shop.folder / "made" / name).read_bytes()


def edit(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change a metadata file as text, signatures and all."""
    whole = json.loads(path.read_bytes())
    change(whole)
    path.write_text(json.dumps(whole))


# What is chosen


@pytest.mark.parametrize(
    "ascending",
    [
        ["1.9.0", "1.10.0", "2.0.0", "10"],
        ["1.0.0-alpha", "1.0.0-alpha.1", "1.0.0-alpha.beta", "1.0.0-beta.2", "1.0.0-beta.11", "1.0.0-rc.1", "1.0.0"],
        ["0.9", "1.0a2", "1.0rc1", "1.0.0", "1.0.0+2", "1.0.0+10", "1.0.1-dev"],
    ],
)
def test_versions_compare_by_their_numbers(ascending: list[str]) -> None:
    shuffled = [*ascending[1::2], *ascending[::2]]
    assert sorted(shuffled, key=versions.order) == ascending
    assert len({versions.order(version) for version in ascending}) == len(ascending)


def test_versions_that_are_none() -> None:
    assert versions.order("1.0") == versions.order("1") == versions.order("1.0.0")
    for text in ("", "v1", "1.0 ", "1/0", "1" * 101, "1.0+a+b/c"):
        with pytest.raises(InputError, match="is no version; it has the form 1.2.3"):
            versions.order(text)


def test_the_newest_is_brought_and_kept(shop: Publisher) -> None:
    shop.publish("1.10.0")
    shop.publish("1.9.0")
    path = shop.fetch()
    assert path == shop.device / "download/small-openvino-1.10.0.tar.gz"
    assert path.read_bytes() == content(shop, path.name)
    assert sorted(one.name for one in path.parent.iterdir()) == [path.name]
    assert shop.server.ranges() == [None]
    assert shop.fetch() == path
    assert shop.server.ranges() == []
    path.write_bytes(bytes(SIZE))
    assert shop.fetch().read_bytes() == content(shop, path.name)


def test_what_is_newest_is_told_without_bringing_it(shop: Publisher) -> None:
    offer = update.newest(shop.server.url + "/", shop.device)
    assert offer == update.Offer("small", "openvino", "1.1.0", NEWEST, SIZE)
    assert shop.server.ranges() == []


def test_one_of_several_must_be_named(shop: Publisher) -> None:
    shop.publish("3.0.0", name="large")
    shop.publish("1.2.0", target="onnxruntime")
    with pytest.raises(InputError, match="offers large, small; name the one for this device"):
        shop.fetch()
    with pytest.raises(InputError, match="offers no tiny; it offers large, small"):
        shop.fetch(name="tiny")
    with pytest.raises(InputError, match="offers small for onnxruntime, openvino; name the target of this device"):
        shop.fetch(name="small")
    with pytest.raises(InputError, match="offers small not for coreml, but for onnxruntime, openvino"):
        shop.fetch(name="small", target="coreml")
    with pytest.raises(InputError, match="offers large, small; name the one"):
        shop.fetch(target="openvino")
    brought = [shop.fetch(name="large"), shop.fetch(name="small", target="openvino")]
    assert [path.name for path in brought] == ["large-openvino-3.0.0.tar.gz", NEWEST]
    assert all(path.exists() for path in brought)


def test_foreign_targets_are_passed_over(shop: Publisher) -> None:
    def add(signed: Signed) -> None:
        entries = signed.targets  # type: ignore[attr-defined]
        mine = entries[NEWEST].to_dict()
        for path, fields in (
            ("notes.txt", None),
            ("a.tar.gz", "text"),
            ("../b.tar.gz", {"name": "small", "target": "openvino", "version": "9"}),
            ("c.tar.gz", {"name": "small", "target": "openvino", "version": "new"}),
            ("d.tar.gz", {"name": "small", "target": 3, "version": "9"}),
        ):
            entries[path] = type(entries[NEWEST]).from_dict({**mine, "custom": {"bitferry": fields}}, path)

    shop.forge("targets", add)
    repoint(shop)
    assert shop.fetch().name == NEWEST


def test_nothing_on_offer_is_said(shop: Publisher) -> None:
    shop.forge("targets", lambda signed: signed.targets.clear())  # type: ignore[attr-defined]
    repoint(shop)
    with pytest.raises(InputError, match="offers no bundles; publish one there first"):
        shop.fetch()


# Who is trusted


def test_trust_is_never_taken_from_the_network(shop: Publisher) -> None:
    fresh = shop.folder / "fresh"
    with pytest.raises(InputError, match="trusts no publisher yet; copy the repository's metadata/root.json here"):
        update.fetch(shop.server.url, fresh)
    assert shop.server.asked == []
    root = shop.repository / "metadata/root.json"
    assert update.fetch(shop.server.url, fresh, trusted_root=root).name == NEWEST
    assert (fresh / "tuf/root.json").read_bytes() == root.read_bytes()
    publish.rotate(shop.repository, shop.keys)
    assert update.fetch(shop.server.url, fresh).name == NEWEST
    assert update.fetch(shop.server.url, fresh, trusted_root=root).name == NEWEST, "the newer one was followed"


def test_another_root_is_not_taken_over(shop: Publisher) -> None:
    theirs = Publisher(shop.folder / "theirs", shop.server)
    theirs.publish("9.0.0")
    pinned = (shop.device / "tuf/root.json").read_bytes()
    with pytest.raises(InputError, match="trusts another publisher than .*; remove .*/device/tuf if"):
        update.fetch(shop.server.url, shop.device, trusted_root=theirs.repository / "metadata/root.json")
    for name, message in (
        ("timestamp.json", "timestamp.json is a timestamp.json; copy the repository's root.json"),
        ("missing.json", "missing.json cannot be read or written: No such file"),
    ):
        with pytest.raises(InputError, match=message):
            update.fetch(shop.server.url, shop.folder / "fresh", trusted_root=shop.repository / "metadata" / name)
    forged = shop.folder / "forged.json"
    shutil.copyfile(shop.repository / "metadata/root.json", forged)
    edit(forged, lambda whole: whole["signed"].update(version=7))
    with pytest.raises(InputError, match="forged.json is no root.json of a repository: root was signed by 0/1 keys"):
        update.fetch(shop.server.url, shop.folder / "fresh", trusted_root=forged)
    assert not (shop.folder / "fresh/tuf/root.json").exists()
    assert (shop.device / "tuf/root.json").read_bytes() == pinned
    assert shop.fetch().name == NEWEST


def test_a_server_of_others_is_refused(shop: Publisher) -> None:
    theirs = Publisher(shop.folder / "theirs", shop.server)
    theirs.publish("9.0.0")
    shop.server.folder = theirs.repository
    with pytest.raises(
        InputError, match="is not signed by the keys that .*/device trusts .timestamp was signed by 0/1"
    ):
        shop.fetch()


# Attacks. Each changes what is served, and says what must be answered.


def repoint(shop: Publisher, *, snapshot: int = 1, timestamp: int = 1) -> None:
    """Sign a snapshot of the targets there are, and a timestamp of that, as whoever stole both keys could."""

    def point(signed: Signed, role: Role) -> None:
        path = shop.metadata(role)
        number = Metadata.from_file(str(path)).signed.version
        entry = MetaFile.from_data(number, path.read_bytes(), ["sha256"])
        if isinstance(signed, Snapshot):
            signed.version, signed.meta["targets.json"] = signed.version + snapshot, entry
        elif isinstance(signed, Timestamp):
            signed.version, signed.snapshot_meta = signed.version + timestamp, entry

    made = shop.forge("snapshot", lambda signed: point(signed, "targets"), place=shop.folder / "snapshot.json")
    number = Metadata.from_file(str(made)).signed.version
    made.rename(shop.repository / f"metadata/{number}.snapshot.json")
    shop.forge("timestamp", lambda signed: point(signed, "snapshot"))


def old_copy(shop: Publisher) -> str:
    shop.restore(shop.folder / "first")
    return "offers older metadata than there was before (New timestamp version 1 must be >= 2)"


def old_snapshot(shop: Publisher) -> str:
    old = MetaFile.from_data(1, (shop.repository / "metadata/1.snapshot.json").read_bytes(), ["sha256"])

    def point(signed: Signed) -> None:
        assert isinstance(signed, Timestamp)
        signed.version, signed.snapshot_meta = 3, old

    shop.forge("timestamp", point)
    return "offers older metadata than there was before (New snapshot version must be >= 2"


def old_targets(shop: Publisher) -> str:
    shop.metadata("targets").unlink()
    repoint(shop)
    return "offers older metadata than there was before (Expected targets.json version 1, got 2.)"


def mixed(shop: Publisher) -> str:
    """The snapshot of another time under the name of the newest."""
    shop.publish("1.2.0")
    shop.copy("good")
    shutil.copyfile(shop.repository / "metadata/2.snapshot.json", shop.repository / "metadata/3.snapshot.json")
    return "sends other bytes than were signed"


def mixed_targets(shop: Publisher) -> str:
    """The targets of another time under the name of the newest."""
    shop.publish("1.2.0")
    shop.copy("good")
    shutil.copyfile(shop.repository / "metadata/2.targets.json", shop.repository / "metadata/3.targets.json")
    return "sends other bytes than were signed"


def late_timestamp(shop: Publisher) -> str:
    publish.refresh(shop.repository, shop.keys, days=Late(role="timestamp"))
    return "has expired (timestamp.json is expired) by this device's clock"


def late_snapshot(shop: Publisher) -> str:
    publish.refresh(shop.repository, shop.keys, days=Late(role="snapshot"))
    return "has expired (snapshot.json is expired) by this device's clock"


def late_targets(shop: Publisher) -> str:
    shop.publish("1.2.0", days=Late(role="targets"))
    return "has expired (New targets is expired) by this device's clock"


def late_root(shop: Publisher) -> str:
    publish.rotate(shop.repository, shop.keys, days=Late(role="root"))
    return "has expired (Final root.json is expired) by this device's clock"


def unsigned(shop: Publisher) -> str:
    shop.publish("1.2.0")
    edit(shop.metadata("timestamp"), lambda whole: whole["signatures"].clear())
    return "is not signed by the keys that .* trusts (timestamp was signed by 0/1 keys)"


def wrongly_signed(shop: Publisher) -> str:
    shop.publish("1.2.0")
    edit(shop.metadata("timestamp"), lambda whole: whole["signed"].update(version=9))
    return "is not signed by the keys that .* trusts (timestamp was signed by 0/1 keys)"


def targets_of_a_thief(shop: Publisher) -> str:
    """Targets that the snapshot's thief made up: the snapshot fits, but the targets' key is missing."""
    place = shop.repository / "metadata/3.targets.json"
    shutil.copyfile(shop.metadata("targets"), place)
    edit(place, lambda whole: whole["signed"].update(version=3))
    repoint(shop)
    return "is not signed by the keys that .* trusts (targets was signed by 0/1 keys)"


def root_of_a_thief(shop: Publisher) -> str:
    """A root that names the thief's keys, signed by them and not by the root before."""
    thief = CryptoSigner.generate_ed25519()
    root: Metadata[Root] = Metadata.from_file(str(shop.metadata("root")))
    for role in roles.ROLES:
        root.signed.revoke_key(root.signed.roles[role].keyids[0], role)
        root.signed.add_key(thief.public_key, role)
    root.signed.version = 2
    root.sign(thief)
    root.to_file(str(shop.repository / "metadata/2.root.json"))
    return "is not signed by the keys that .* trusts (root was signed by 0/1 keys)"


def root_skipped(shop: Publisher) -> str:
    """A root whose own number is not the next: the way back to an older one."""
    shutil.copyfile(shop.repository / "metadata/1.root.json", shop.repository / "metadata/2.root.json")
    return "offers older metadata than there was before (Expected root version 2 instead got version 1)"


def one_signature_twice(shop: Publisher) -> str:
    shop.publish("1.2.0")
    edit(shop.metadata("timestamp"), lambda whole: whole["signatures"].append(whole["signatures"][0]))
    return "is no usable repository (Failed to deserialize JSON)"


def another_kind(shop: Publisher) -> str:
    shutil.copyfile(shop.metadata("snapshot"), shop.metadata("timestamp"))
    return "is no usable repository (Expected 'timestamp', got 'snapshot')"


def no_json(shop: Publisher) -> str:
    shop.metadata("timestamp").write_text("<html>login</html>")
    return "is no usable repository (Failed to deserialize JSON)"


def vast_timestamp(shop: Publisher) -> str:
    shop.metadata("timestamp").write_bytes(b" " * 20_000)
    return "timestamp.json is longer than the 16384 bytes it can have"


def other_contents(shop: Publisher) -> str:
    (path,) = shop.repository.glob(f"targets/*.{NEWEST}")
    path.write_bytes(path.read_bytes()[:-1] + b"!")
    return "sends other bytes than were signed"


def longer(shop: Publisher) -> str:
    (path,) = shop.repository.glob(f"targets/*.{NEWEST}")
    path.write_bytes(path.read_bytes() + b"!")
    return f"is longer than the {SIZE} bytes it can have"


def shorter(shop: Publisher) -> str:
    (path,) = shop.repository.glob(f"targets/*.{NEWEST}")
    path.write_bytes(path.read_bytes()[:-1])
    return f"ended after {SIZE - 1} of {SIZE} bytes; nothing was taken over; try again"


def endless(shop: Publisher) -> str:
    def send(handler: Handler, content: bytes) -> None:
        handler.send_response(200)
        handler.end_headers()
        while True:
            handler.wfile.write(content)

    shop.server.fault = send
    return f"is longer than the {SIZE} bytes it can have"


def endless_timestamp(shop: Publisher) -> str:
    shop.server.faulty = "timestamp.json"
    endless(shop)
    return "timestamp.json is longer than the 16384 bytes it can have"


def gone(shop: Publisher) -> str:
    (path,) = shop.repository.glob(f"targets/*.{NEWEST}")
    path.unlink()
    return f"{NEWEST} is refused: the server answers 404; nothing was taken over"


def gone_snapshot(shop: Publisher) -> str:
    shop.metadata("snapshot").unlink()
    return "2.snapshot.json is refused: the server answers 404; nothing was taken over"


AFTER_AN_UPDATE = [old_copy, old_snapshot, old_targets]
"""Going back is an attack on a device that has been further."""
STOLEN = [old_snapshot, old_targets, targets_of_a_thief]
"""The thief of the snapshot's and the timestamp's keys did these; it takes new keys to be rid of him."""
LATE = [late_snapshot, late_targets, late_root]
"""Signed by the publisher, so that there is no way back: it takes the publisher's next."""
ATTACKS = [
    *AFTER_AN_UPDATE, mixed, mixed_targets, late_timestamp, late_snapshot, late_targets, late_root, unsigned, wrongly_signed,
    targets_of_a_thief, root_of_a_thief, root_skipped, one_signature_twice, another_kind, no_json, vast_timestamp,
    other_contents, longer, shorter, endless, endless_timestamp, gone, gone_snapshot,
]  # fmt: skip


@pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: attack.__name__)
def test_attacks_are_refused_and_leave_a_device_that_goes_on(
    shop: Publisher, attack: Callable[[Publisher], str]
) -> None:
    before = shop.device / "download/small-openvino-1.0.0.tar.gz"
    if attack in AFTER_AN_UPDATE:
        before = shop.fetch()
    kept, good = before.read_bytes(), shop.copy("before")
    message = attack(shop)
    for _ in range(2):  # it is not by being tried again that an attack succeeds
        with pytest.raises(InputError, match=".*".join(map(re.escape, message.split(".*")))) as refused:
            shop.fetch()
        assert "\n" not in str(refused.value)
    assert [path.read_bytes() for path in before.parent.glob("*.gz")] == [kept]
    mend(shop, attack, good)
    brought = shop.fetch()
    assert brought.name != "small-openvino-1.0.0.tar.gz"
    assert brought.read_bytes() == content(shop, brought.name)
    shop.publish("2.0.0")
    assert shop.fetch().name == "small-openvino-2.0.0.tar.gz"


def mend(shop: Publisher, attack: Callable[[Publisher], str], before: Path) -> None:
    """Do what a publisher does after an attack."""
    shop.server.fault = None
    if attack in LATE:
        shop.publish("1.2.0")
        publish.rotate(shop.repository, shop.keys)
        return
    good = before.with_name("good")
    shop.restore(good if good.exists() else before)
    if attack in STOLEN:
        publish.rotate(shop.repository, shop.keys, "snapshot")
        publish.rotate(shop.repository, shop.keys, "timestamp")


def test_a_fast_forward_is_undone_by_new_keys(shop: Publisher) -> None:
    """A thief's timestamp of a high number must not shut the publisher's own out for ever."""
    good = shop.copy("good")
    repoint(shop, snapshot=1_000_000, timestamp=1_000_000)
    assert shop.fetch().name == NEWEST
    shop.restore(good)
    shop.publish("1.2.0")
    with pytest.raises(
        InputError, match="offers older metadata than there was before .New timestamp version 3 must be"
    ):
        shop.fetch()
    publish.rotate(shop.repository, shop.keys, "snapshot")
    publish.rotate(shop.repository, shop.keys, "timestamp")
    assert shop.fetch().name == "small-openvino-1.2.0.tar.gz"


def test_two_keys_are_two_keys(shop: Publisher) -> None:
    """Where a role needs two signatures, one key gives no two, under whatever names."""
    second = roles.make(shop.keys, "timestamp-second")
    root: Metadata[Root] = Metadata.from_file(str(shop.metadata("root")))
    root.signed.version = 2
    root.signed.add_key(second.public_key, "timestamp")
    root.signed.roles["timestamp"].threshold = 2
    root.sign(roles.load(shop.keys)[root.signed.roles["root"].keyids[0]])
    root.to_file(str(shop.repository / "metadata/2.root.json"))
    with pytest.raises(InputError, match="timestamp.json is not what this repository's keys signed .* 1/2 keys"):
        shop.publish("1.2.0")
    single = json.loads(shop.metadata("timestamp").read_bytes())["signatures"][0]
    both = Metadata[Timestamp].from_file(str(shop.metadata("timestamp")))
    both.sign(second, append=True)
    both.to_file(str(shop.metadata("timestamp")))
    shop.publish("1.2.0")
    assert shop.fetch().name == "small-openvino-1.2.0.tar.gz"
    shop.publish("1.3.0")
    signatures = json.loads(shop.metadata("timestamp").read_bytes())["signatures"]
    one = next(signature for signature in signatures if signature["keyid"] == single["keyid"])
    under_both = [one, {"keyid": second.public_key.keyid, "sig": one["sig"]}]
    for forged, message in (
        ([one], "timestamp was signed by 1/2 keys"),
        (under_both, "timestamp was signed by 1/2 keys"),
        ([one, one], "is no usable repository"),
    ):
        edit(shop.metadata("timestamp"), lambda whole, forged=forged: whole.update(signatures=forged))  # type: ignore[misc]
        with pytest.raises(InputError, match=message):
            shop.fetch()
    edit(shop.metadata("timestamp"), lambda whole: whole.update(signatures=signatures))
    assert shop.fetch().name == "small-openvino-1.3.0.tar.gz"


def test_a_clock_that_is_wrong_is_named(shop: Publisher) -> None:
    late_timestamp(shop)
    with pytest.raises(InputError) as refused:
        shop.fetch()
    today = f"{datetime.now(UTC):%Y-%m-%d}"
    yesterday = f"{datetime.now(UTC) - timedelta(minutes=1):%Y-%m-%d}"
    assert any(f"by this device's clock, {day}" in str(refused.value) for day in (today, yesterday))
    assert str(refused.value).endswith("check the clock, and if it is right, have the publisher refresh the repository")


# Connections


def test_a_broken_download_goes_on_in_the_same_run(shop: Publisher) -> None:
    shop.server.fault = lambda handler, content: handler.send(content, only=100_000)
    assert shop.fetch().read_bytes() == content(shop)
    assert shop.server.ranges() == [None, "bytes=100000-", "bytes=200000-"]


def test_a_broken_download_goes_on_in_the_next_run(shop: Publisher) -> None:
    shop.server.fault = lambda handler, content: handler.send(content, only=10_000)
    with pytest.raises(InputError, match=f"{NEWEST} cannot be read: the connection broke; nothing was taken over"):
        shop.fetch()
    assert shop.server.ranges() == [None, *[f"bytes={n}0000-" for n in range(1, download.ATTEMPTS)]]
    (part,) = shop.device.glob("download/*.part")
    assert part.read_bytes() == content(shop)[:50_000]
    assert sorted(path.name for path in part.parent.glob("*.gz")) == ["small-openvino-1.0.0.tar.gz"]
    shop.server.fault = None
    assert shop.fetch().read_bytes() == content(shop)
    assert shop.server.ranges() == ["bytes=50000-"]
    assert [path.name for path in part.parent.iterdir()] == [NEWEST]


def test_attempts_that_bring_much_are_not_counted(shop: Publisher, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(download, "RENEWED", 20_000)
    shop.server.fault = lambda handler, content: handler.send(content, only=20_000)
    assert shop.fetch().read_bytes() == content(shop)
    assert len(shop.server.ranges()) == SIZE // 20_000


def test_a_killed_update_goes_on_where_it_was(shop: Publisher) -> None:
    """The server stands still in the middle; the process is killed there, and the next one asks for the rest only."""

    def stand_still(handler: Handler, content: bytes) -> None:
        handler.send(content, only=200_000)
        handler.rfile.read(1)  # until the client is gone

    shop.server.fault = stand_still
    code = "import sys; from pathlib import Path; from bitferry.device import update; update.fetch(sys.argv[1], Path(sys.argv[2]))"
    process = subprocess.Popen([sys.executable, "-c", code, shop.server.url, shop.device], cwd=ROOT)
    while not any(part.stat().st_size > 100_000 for part in shop.device.glob("download/*.part")):
        assert process.poll() is None
    process.kill()
    process.wait()
    shop.server.fault = None
    shop.server.asked.clear()
    assert shop.fetch().read_bytes() == content(shop)
    (asked,) = shop.server.ranges()
    assert asked is not None
    assert 100_000 < int(asked[6:-1]) <= 200_000


def test_a_server_without_ranges_is_asked_from_the_beginning(shop: Publisher) -> None:
    broken: list[int] = []

    def send(handler: Handler, content: bytes) -> None:
        broken.append(1)
        handler.send(content, ranges=False, only=None if len(broken) > 2 else 200_000 - 1000 * len(broken))

    shop.server.fault = send
    assert shop.fetch().read_bytes() == content(shop)
    assert shop.server.ranges() == [None, "bytes=199000-", "bytes=198000-"]


def test_another_part_than_was_asked_for_is_not_put_together(shop: Publisher) -> None:
    broken: list[int] = []

    def send(handler: Handler, content: bytes) -> None:
        broken.append(1)
        if len(broken) == 1:
            handler.send(content, only=1000)
        elif len(broken) == 2:
            handler.send_response(206)
            handler.send_header("Content-Range", f"bytes 500-{SIZE - 1}/{SIZE}")
            handler.end_headers()
            handler.wfile.write(content[500:])
        else:
            handler.send(content)

    shop.server.fault = send
    assert shop.fetch().read_bytes() == content(shop)
    assert shop.server.ranges() == [None, "bytes=1000-", None]


@pytest.mark.parametrize("begun", [b"wrong" * 100, b"w" * SIZE, b"w" * (SIZE + 5)], ids=["part", "whole", "more"])
def test_a_wrong_beginning_is_thrown_away(shop: Publisher, begun: bytes) -> None:
    (path,) = shop.repository.glob(f"targets/*.{NEWEST}")
    part = shop.device / "download" / f"{path.name.partition('.')[0]}.part"
    part.write_bytes(begun)
    assert shop.fetch().read_bytes() == content(shop)
    assert shop.server.ranges()[-1] is None


def test_metadata_survives_a_broken_connection(shop: Publisher) -> None:
    broken: list[int] = []

    def send(handler: Handler, content: bytes) -> None:
        broken.append(1)
        handler.send(content, only=20 if len(broken) < 3 else None)

    shop.server.fault, shop.server.faulty = send, ".json"
    assert shop.fetch().name == NEWEST
    shop.server.faulty, shop.server.fault = "timestamp.json", lambda handler, _: handler.send_error(503)
    with pytest.raises(
        InputError, match="timestamp.json is refused: the server answers 503; nothing was taken over; try"
    ):
        shop.fetch()
    assert [path for path, _ in shop.server.asked].count("/metadata/timestamp.json") >= download.ATTEMPTS


def test_a_download_that_trickles_is_given_up(shop: Publisher, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(download, "PATIENCE_S", 0.0)
    monkeypatch.setattr(download, "SLOWEST", 1 << 60)
    with pytest.raises(InputError, match="came too slowly: [0-9]+ bytes in 0 s; nothing was taken over"):
        shop.fetch()


def test_redirects_are_followed_within_a_scheme(shop: Publisher) -> None:
    with served(shop.folder / "elsewhere") as elsewhere:
        (path,) = shop.repository.glob(f"targets/*.{NEWEST}")
        elsewhere.folder.mkdir()
        shutil.copyfile(path, elsewhere.folder / "stored")

        def lead(place: str) -> None:
            def send(handler: Handler, _: bytes) -> None:
                handler.send_response(302)
                handler.send_header("Location", place or handler.path)
                handler.end_headers()

            shop.server.fault = send

        lead(f"{elsewhere.url}/stored")
        assert shop.fetch().read_bytes() == content(shop)
        shop.fetch().unlink()
        for place, message in (
            ("file:///etc/passwd", "leads to file:///etc/passwd, which is not http"),
            ("https://127.0.0.1/stored", "leads to https://127.0.0.1/stored, which is not http"),
            ("http://[::1/stored", "cannot be read: this is no address of a file"),
            ("", "leads from one address to the next without an end"),
        ):
            lead(place)
            with pytest.raises(InputError, match=message):
                shop.fetch()


def test_the_proxy_of_the_environment_is_used(shop: Publisher, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "")
    monkeypatch.setenv("http_proxy", shop.server.url)
    assert update.fetch("http://bundles.invalid", shop.device).name == NEWEST
    assert "http://bundles.invalid/metadata/timestamp.json" in [path for path, _ in shop.server.asked]


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("ftp://example.org", "is no address of a repository; it begins with https:// or http://"),
        ("file:///srv/repository", "is no address of a repository"),
        ("repository", "is no address of a repository"),
        ("http://", "cannot be read: this is no address of a file|cannot be read: its server has no address"),
        ("http://[::1", "cannot be read: this is no address of a file"),
        ("http://127.0.0.1:1", "cannot be read: no server answers there; nothing was taken over; try again"),
        ("http://nowhere.invalid", "cannot be read: its server has no address; check its name"),
    ],
)
def test_addresses_where_nothing_is(shop: Publisher, url: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        update.fetch(url, shop.device)


def test_one_update_at_a_time(shop: Publisher) -> None:
    with (shop.device / "tuf/lock").open("w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(InputError, match="device is being updated by another process; try again when it has ended"):
            shop.fetch()
    assert shop.fetch().name == NEWEST


def test_a_device_that_cannot_write_says_so(shop: Publisher) -> None:
    shutil.rmtree(shop.device / "download")
    (shop.device / "download").write_text("a file")
    with pytest.raises(InputError, match="download cannot be read or written: File exists"):
        shop.fetch()


def test_metadata_that_a_power_cut_spoiled_is_brought_anew(shop: Publisher) -> None:
    shop.fetch()
    for path in (shop.device / "tuf/metadata").rglob("*.json"):
        os.truncate(path, 0)
    assert shop.fetch().name == NEWEST
