"""A device's bundle: installed whole or not at all, whatever happens on the way."""

import hashlib
import itertools
import json
import os
import shutil
import subprocess
import sys
import tarfile
import threading
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from bitferry.device import agent, archive, fit, gpu, install, installed, signature, trust, versions
from bitferry.device.errors import BitferryError, InputError, StageFailed, TargetUnavailable
from bitferry.pipeline.bundle import write_agent
from bitferry.pipeline.shipping import keys, sign
from tests.conftest import Project
from tests.served import served
from tests.signed import TIED, Shop, open_shop


@pytest.fixture(scope="module")
def made(deployed: Project, tmp_path_factory: pytest.TempPathFactory) -> tuple[Shop, Path, Path]:
    """Give a shop with two versions of the bundle; tests must not change their archives."""
    shop = open_shop(deployed.folder / "dist/small-openvino-1.0.0", tmp_path_factory.mktemp("shop"))
    return shop, shop.archive("1.0.0"), shop.archive("1.10.0")


@pytest.fixture
def shop(made: tuple[Shop, Path, Path], tmp_path: Path) -> Shop:
    for name in ("fleet.key", "fleet.pub"):
        shutil.copy(made[0].folder / name, tmp_path / name)
    return Shop(made[0].bundle, tmp_path)


@pytest.fixture
def old(made: tuple[Shop, Path, Path]) -> Path:
    return made[1]


@pytest.fixture
def new(made: tuple[Shop, Path, Path]) -> Path:
    return made[2]


@pytest.fixture
def root(shop: Shop) -> Path:
    return shop.device()


@pytest.fixture
def tried(monkeypatch: pytest.MonkeyPatch) -> None:
    """Spare the self-test, which takes seconds, where it is not what is tested."""
    monkeypatch.setattr(install, "selftest", lambda folder: {"passed": (folder / "run.pyz").is_file()})


def version(root: Path) -> str:
    """Give the version that runs, once every byte of it was compared with its signature."""
    here = installed.current(root)
    assert here is not None
    signature.check(here.folder, trust.read(root).keys)
    return str(here.version)


def refused(root: Path, path: Path, kind: type[BitferryError] = InputError, **options: Any) -> str:
    """Expect an archive to be refused and what ran to run on; give the message."""
    before = (root / "current").readlink() if (root / "current").is_symlink() else None
    with pytest.raises(kind) as caught:
        install.install(path, root, **options)
    after = (root / "current").readlink() if (root / "current").is_symlink() else None
    assert before == after
    assert not (root / ".incoming").exists()
    left = {one.name.removesuffix(".json") for one in (root / "versions").glob("*")}
    assert before is None or before.name in left
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_installed_tried_replaced_and_back(
    root: Path, old: Path, new: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    assert agent.main(["install", str(old), "--root", str(root)]) == 0
    assert agent.main(["install", str(new), "--root", str(root)]) == 0
    assert version(root) == "1.10.0"
    assert agent.main(["install", str(new), "--root", str(root)]) == 0
    told = capsys.readouterr().out.splitlines()
    assert told[0].startswith("small 1.0.0 for openvino runs: ")
    assert told[1].startswith("small 1.10.0 for openvino runs: ")
    assert told[2].startswith("small 1.10.0 for openvino runs already: ")
    found = json.loads((root / "status.json").read_text())
    assert found["current"]["version"] == "1.10.0"
    assert found["previous"]["version"] == "1.0.0"
    assert found["last"] == "installed already"
    assert found["selftest"]["passed"] is True
    assert agent.main(["rollback", "--root", str(root)]) == 0
    assert version(root) == "1.0.0"
    assert agent.main(["rollback", "--root", str(root)]) == 2
    assert "has nothing to go back to" in capsys.readouterr().err


def test_the_self_test_of_what_runs_goes_back_where_it_fails(root: Path, old: Path, new: Path) -> None:
    install.install(old, root)
    install.install(new, root)
    assert install.prove(root)[1]["passed"] is True
    model = root / "current/model.bin"
    model.chmod(0o644)
    content = bytearray(model.read_bytes())
    content[len(content) // 2] ^= 1
    model.write_bytes(content)
    with pytest.raises(
        StageFailed, match=r"small 1\.10\.0 .* failed, so small 1\.0\.0 .* runs again: .*changed: model"
    ):
        install.prove(root)
    assert version(root) == "1.0.0"
    assert installed.status(root)["last"].startswith("rolled back from 1.10.0: ")


def other_scores(bundle: Path) -> None:
    """Expect scores that the model does not give."""
    path = bundle / "golden/expected.json"
    fields = json.loads(path.read_text())
    for file in fields["files"].values():
        file["scores"] = [score + 5 for score in file["scores"]]
    path.write_text(json.dumps(fields))


def test_48_a_bundle_whose_self_test_fails_never_runs(root: Path, shop: Shop, old: Path) -> None:
    install.install(old, root)
    message = refused(root, shop.archive("2.0.0", other_scores), StageFailed)
    assert "the self-test of small-openvino-2.0.0-" in message
    assert version(root) == "1.0.0"
    assert len([one for one in (root / "versions").iterdir() if one.is_dir()]) == 1


@pytest.mark.usefixtures("tried")
def test_40_an_older_version_is_refused_and_the_same_is_nothing_new(
    root: Path, shop: Shop, old: Path, new: Path
) -> None:
    install.install(new, root)
    assert "is version 1.0.0, which is not newer than 1.10.0" in refused(root, old)
    assert install.install(new, root)[1] is False
    other = shop.archive("1.10.0", lambda bundle: (bundle / "golden/note.txt").write_text("x"))
    assert "is another build of version 1.10.0" in refused(root, other)
    assert install.install(other, root, allow_downgrade=True)[1] is True
    install.install(old, root, allow_downgrade=True)
    assert version(root) == "1.0.0"
    stranger = shop.archive("3.0.0", name="other")
    assert "is 'other', and this root runs 'small'" in refused(root, stranger)


@pytest.mark.usefixtures("tried")
def test_a_damaged_copy_is_replaced_by_the_same_version(root: Path, old: Path) -> None:
    for _ in range(2):
        install.install(old, root)
        (root / "current/model.xml").chmod(0o644)
        (root / "current/model.xml").write_text("<net/>")
        assert install.install(old, root)[1] is True
        assert version(root) == "1.0.0"


@pytest.mark.usefixtures("tried")
@pytest.mark.parametrize(
    ("tied", "told"),
    [
        ({"os": "Plan9"}, "it was built for Plan9"),
        ({"machine": "riscv64"}, "it was built for riscv64"),
        ({"isa": ["amx_int9"]}, "the CPU lacks amx_int9"),
        ({"python": ">=4"}, "it needs Python >=4"),
        ({"packages": {"openvino": ">=2026,<2026.1"}}, "it needs openvino >=2026,<2026.1, and 2026"),
        (
            {"packages": {"no-such-runtime": ">=1"}},
            "the Python package 'no-such-runtime' (>=1), which is not installed",
        ),
        ({"gpu": ["8.6"]}, "NVIDIA GPU"),
    ],
)
def test_41_another_machine_is_refused_before_anything_is_unpacked(
    root: Path, shop: Shop, tied: dict[str, Any], told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = shop.archive("1.0.0", tied=TIED | tied)
    monkeypatch.setattr(install, "_unpack", lambda *_: pytest.fail("unpacked"))
    assert told in refused(root, path, TargetUnavailable)


def test_41_what_does_not_say_what_it_is_tied_to_is_refused() -> None:
    for tied in ({}, TIED | {"packages": []}, TIED | {"python": "about 3"}):
        with pytest.raises(InputError, match="does not say what it is tied to"):
            fit.check({"tied": tied}, "it")


def test_41_weights_of_8_bits_are_refused_where_the_kernels_saturate(
    root: Path, shop: Shop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    monkeypatch.setattr(fit, "CPUINFO", cpuinfo)
    cpuinfo.write_text("flags: sse4_2 avx2 fma\n")
    path = shop.archive("1.0.0", tied=TIED | {"vnni": True})
    told = refused(root, path, TargetUnavailable)
    assert "the int8 kernels of this processor saturate with the bundle's 8-bit weights" in told
    fit.check({"tied": TIED | {"vnni": False}}, "it")
    fit.check({"tied": TIED}, "it")  # an older bundle does not say
    for flag in ("avx512_vnni", "avx_vnni", "amx_int8"):
        cpuinfo.write_text(f"flags: sse4_2 avx2 fma {flag}\n")
        fit.check({"tied": TIED | {"vnni": True}}, "it")


def test_41_the_gpu_that_the_options_name_is_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    gpus = [gpu.Gpu("old", "7.5"), gpu.Gpu("new", "8.9")]
    monkeypatch.setattr(gpu, "find", gpus.__getitem__)
    tied = TIED | {"gpu": ["8.9"]}
    fit.check({"tied": tied, "model": {"options": {"device": 1}}}, "it")
    for options in ({}, {"device": 0}, {"device": "GPU.1"}):
        with pytest.raises(TargetUnavailable, match=r"built for compute capability 8\.9; old has 7\.5"):
            fit.check({"tied": tied, "model": {"options": options}}, "it")


def test_versions_are_ordered_as_semver_orders_them() -> None:
    given = ["1.0.0-alpha", "1.0.0-alpha.1", "1.0.0-beta.2", "1.0.0-beta.11", "1.0.0-rc.1", "1.0", "1.2", "1.10.0", "2"]
    assert all(versions.order(one) < versions.order(other) for one, other in itertools.pairwise(given))
    assert versions.order("1.0") == versions.order("1.0.0")
    assert versions.within("2026.4.1", ">=2026.4,<2027")
    assert not versions.within("2027.0", ">=2026.4,<2027")


@pytest.mark.usefixtures("tried")
def test_38_only_a_signature_of_a_trusted_key_over_these_files_counts(
    root: Path, shop: Shop, old: Path, tmp_path: Path
) -> None:
    stranger = keys.new(tmp_path / "stranger")[0]
    assert "which is not trusted here" in refused(root, shop.archive("1.0.0", key=stranger))
    assert "trusts no key yet" in refused(_bare(tmp_path), old)

    unsigned = shop.copy("1.1.0")
    with pytest.raises(InputError, match="is not signed; `bitferry sign"):
        sign.archive(unsigned)
    (unsigned / "model.sig").write_bytes(_signature(old))
    assert "holds a manifest that was not signed with it" in refused(root, sign.archive(unsigned))

    fields = json.loads(_signature(old))
    fields["dsseEnvelope"]["signatures"] *= 10_000
    (unsigned / "model.sig").write_text(json.dumps(fields))
    assert "has 10000 signatures" in refused(root, sign.archive(unsigned))
    for content, told in (
        (b"", "cannot be read"),
        (b"{}", "is no signature in the OpenSSF model-signing format"),
        (b"x" * (9 << 20), "bytes, and 8,388,608 are allowed"),
    ):
        (unsigned / "model.sig").write_bytes(content)
        assert told in refused(root, sign.archive(unsigned))


def _bare(tmp_path: Path) -> Path:
    (tmp_path / "bare").mkdir()
    return tmp_path / "bare"


def _signature(path: Path) -> bytes:
    return archive.read_head(path).signature


@pytest.mark.usefixtures("tried")
def test_37_every_file_that_is_extra_missing_changed_or_swapped_is_named(root: Path, shop: Shop) -> None:
    signed = shop.copy("1.1.0")
    sign.sign(signed, shop.key)

    def tampered(change: Callable[[Path], object]) -> str:
        place = shop.folder / "tampered" / signed.name
        shutil.rmtree(place, ignore_errors=True)
        shutil.copytree(signed, place)
        change(place)
        return refused(root, sign.archive(place))

    def flip(bundle: Path) -> None:
        content = bytearray((bundle / "model.bin").read_bytes())
        content[99] ^= 1
        (bundle / "model.bin").write_bytes(content)

    def lose(bundle: Path) -> None:
        for name in ("model.bin", "model.onnx"):
            (bundle / name).unlink()

    def swap(bundle: Path) -> None:
        one, two = ((bundle / f"golden/golden-{name}").read_bytes() for name in ("1.jpg", "4.jpg"))
        (bundle / "golden/golden-1.jpg").write_bytes(two)
        (bundle / "golden/golden-4.jpg").write_bytes(one)

    assert "changed: model.bin" in tampered(flip)
    assert "missing: model.bin, model.onnx" in tampered(lose)
    assert "extra.txt twice, unlisted or of another size" in tampered(lambda b: (b / "extra.txt").write_text("x"))
    assert "golden-1.jpg" in tampered(swap)
    assert "holds a manifest that was not signed" in tampered(lambda b: (b / "manifest.json").write_text("{ }"))
    bare = shop.copy("1.2.0")
    sign.sign(bare, shop.key)
    flip(bare)
    swap(bare)
    (bare / "extra.txt").write_text("x")
    (bare / "run.pyz").unlink()
    with pytest.raises(InputError) as caught:
        signature.check(bare, trust.read(root).keys)
    for told in (
        "missing: run.pyz",
        "changed: golden/golden-1.jpg, golden/golden-4.jpg, model.bin",
        "extra: extra.txt",
    ):
        assert told in str(caught.value)


@pytest.mark.usefixtures("tried")
def test_39_the_clock_does_not_matter(root: Path, old: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for seconds in (0.0, 4_070_908_800.0):  # 1970 and 2099
        monkeypatch.setattr("time.time", lambda now=seconds: now)
        monkeypatch.setattr("time.time_ns", lambda now=seconds: int(now * 1e9))
        install.install(old, root, allow_downgrade=True)
        assert version(root) == "1.0.0"


@pytest.mark.usefixtures("tried")
def test_42_what_is_swapped_after_it_was_checked_is_never_what_runs(
    root: Path, shop: Shop, old: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = shop.folder / "swapped.tar.gz"
    shutil.copy(old, path)
    evil = shop.archive(
        "9.0.0", lambda bundle: (bundle / "model.bin").write_bytes(b"evil"), key=keys.new(shop.folder / "e")[0]
    )
    real = signature.verify

    def swap(*given: Any) -> Any:
        found = real(*given)
        shutil.copy(evil, path.with_suffix(".new"))
        path.with_suffix(".new").replace(path)
        return found

    monkeypatch.setattr(signature, "verify", swap)
    install.install(path, root)
    monkeypatch.undo()
    assert version(root) == "1.0.0"
    path.write_bytes(old.read_bytes())

    def overwrite(*given: Any) -> Any:
        found = real(*given)
        path.write_bytes(evil.read_bytes())  # the very file that is open
        return found

    monkeypatch.setattr(signature, "verify", overwrite)
    with pytest.raises(BitferryError):
        install.install(path, shop.device("second"))
    assert installed.current(shop.folder / "second") is None


@pytest.mark.usefixtures("tried")
def test_46_a_corrupt_state_file_changes_nothing(root: Path, old: Path, new: Path) -> None:
    install.install(old, root)
    for content in (b"", b"{", b"[]", b"\xff" * 100, b'{"current": 5}'):
        (root / "status.json").write_bytes(content)
        assert installed.status(root)["current"]["version"] == "1.0.0"
    install.install(new, root)
    (root / "versions" / f"{(root / 'current').readlink().name}.json").write_bytes(b"../../etc\0")
    assert installed.status(root)["previous"] is None
    with pytest.raises(InputError, match="nothing to go back to"):
        install.rollback(root)
    (root / "keys.json").write_text("{}")
    assert "is no list of keys" in refused(root, old)
    assert (root / "current").readlink().name.startswith("small-openvino-1.10.0")


def test_47_two_installers_at_once_are_one_after_the_other(root: Path, old: Path, new: Path) -> None:
    both = [
        subprocess.Popen(
            [sys.executable, "-c", "import sys; from bitferry.device.agent import main; sys.exit(main())", "install", path,
             "--root", root, "--allow-downgrade"],
            stderr=subprocess.PIPE, text=True, cwd=Path(__file__).parents[1],
        )
        for path in (old, new)
    ]  # fmt: skip
    assert [one.communicate(timeout=300)[1] for one in both] == ["", ""]
    assert version(root) in ("1.0.0", "1.10.0")
    assert installed.status(root)["previous"]["version"] in ("1.0.0", "1.10.0")


def test_keys_are_rotated_by_a_list_that_a_trusted_key_signed(
    root: Path, shop: Shop, old: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second, third = shop.key, *(keys.new(tmp_path / name)[0] for name in ("second", "third"))

    def take(signer: Path, number: int, *names: str) -> int:
        publics = [tmp_path / f"{name}.pub" for name in names]
        (tmp_path / "keys.json").unlink(missing_ok=True)
        listed = keys.sign_list(publics, number, signer, tmp_path / "keys.json")
        return agent.main(["trust", str(listed), "--root", str(root)])

    assert take(third, 2, "third") == 2
    assert "which is not trusted here" in capsys.readouterr().err
    assert take(first, 2, "fleet", "second") == 0
    assert take(second, 2, "second") == 2
    assert "is list 2, and 2 is trusted already" in capsys.readouterr().err
    assert take(second, 3, "second") == 0
    assert take(first, 4, "fleet") == 2
    assert "which is not trusted here" in capsys.readouterr().err
    assert agent.main(["trust", str(tmp_path / "fleet.pub"), "--root", str(root)]) == 2
    assert "trusts keys already" in capsys.readouterr().err
    assert "which is not trusted here" in refused(root, old)
    content = json.loads((tmp_path / "keys.json").read_text())
    (tmp_path / "keys.json").write_text(json.dumps(content | {"payload": content["payload"][::-1]}))
    assert agent.main(["trust", str(tmp_path / "keys.json"), "--root", str(root)]) == 2
    assert len(trust.read(root).keys) == 1


def test_the_device_s_program_installs_where_there_is_no_torch(
    root: Path, shop: Shop, old: Path, tmp_path: Path, bare: Path
) -> None:
    write_agent(tmp_path / "agent.pyz")
    run = [str(bare), str(tmp_path / "agent.pyz")]
    done = subprocess.run([*run, "install", str(old), "--root", str(root)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    told = subprocess.run([*run, "status", "--root", str(root), "--json"], capture_output=True, text=True, check=True)
    assert json.loads(told.stdout)["current"]["version"] == "1.0.0"
    for words in (
        ["check", "--key", str(shop.public)],
        ["selftest"],
        ["predict", "current/golden/golden-1.jpg", "--json"],
    ):
        command = [str(bare), str(root / "current/run.pyz"), *words]
        done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=root)
        assert done.returncode == 0, done.stderr
    assert subprocess.run([bare, "-c", "import torch"], capture_output=True, check=False).returncode == 1
    again = tmp_path / "again.pyz"
    write_agent(again)
    assert again.read_bytes() == (tmp_path / "agent.pyz").read_bytes()


def test_the_same_bundle_and_key_give_the_same_archive(shop: Shop, old: Path) -> None:
    again = shop.archive("1.0.0")
    assert hashlib.sha256(again.read_bytes()).digest() == hashlib.sha256(old.read_bytes()).digest()
    with tarfile.open(again) as tar:
        members = tar.getmembers()
    assert [member.name.partition("/")[2] for member in members][:2] == ["manifest.json", "model.sig"]
    assert {(member.uid, member.gid, member.mtime, member.mode) for member in members} == {(0, 0, 0, 0o644)}


def test_the_signature_is_one_of_openssf_s_both_ways(shop: Shop) -> None:
    tool = Path(sys.executable).with_name("model_signing")
    bundle = shop.copy("1.0.0")
    path = sign.sign(bundle, shop.key)
    verify: list[str | Path] = [tool, "verify", "key", "--public_key", shop.public, "--signature", path, bundle]
    assert subprocess.run(verify, capture_output=True, check=False).returncode == 0
    (bundle / "model.bin").write_bytes(b"other")
    assert subprocess.run(verify, capture_output=True, check=False).returncode != 0
    bundle = shop.copy("1.0.0")
    done: list[str | Path] = [
        tool,
        "sign",
        "key",
        "--private_key",
        shop.key,
        "--signature",
        bundle / "model.sig",
        bundle,
    ]
    subprocess.run(done, capture_output=True, check=True)
    trusted = [signature.public_key(shop.public.read_bytes(), "it")]
    assert signature.check(bundle, trusted).name == bundle.name
    (bundle / "model.bin").write_bytes(b"other")
    with pytest.raises(InputError, match="changed: model.bin"):
        signature.check(bundle, trusted)


def test_a_key_is_never_written_over_and_its_password_is_asked_for(tmp_path: Path) -> None:
    secret, public = keys.new(tmp_path / "a", "word")
    assert secret.stat().st_mode & 0o777 == 0o600
    with pytest.raises(InputError, match="exists; bundles that it signed would be lost"):
        keys.new(tmp_path / "a")
    for password, told in ((None, "has a password"), ("other", "its password is another")):
        with pytest.raises(InputError, match=told):
            keys.private(secret, password)
    assert keys.private(secret, "word").curve.name == "secp256r1"
    with pytest.raises(InputError, match="it is no private key in PEM"):
        keys.private(public)
    with pytest.raises(InputError, match="cannot be read"):
        keys.private(tmp_path / "none.key")


KILL = """
import os, signal, sys
from pathlib import Path
at, what, archive, root = int(sys.argv[1]), sys.argv[2], Path(sys.argv[3]), Path(sys.argv[4])
from bitferry.device import install
install.selftest = lambda folder: {"passed": True}
count = 0
def counted(real):
    def call(*given, **named):
        global count
        count += 1
        if count == at:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*given, **named)
    return call
for name in ("open", "write", "fsync", "replace", "rename", "symlink", "unlink", "rmdir", "mkdir", "chmod"):
    setattr(os, name, counted(getattr(os, name)))
if what == "install":
    install.install(archive, root)
else:
    install.rollback(root)
print(count)
"""


@pytest.mark.slow
@pytest.mark.parametrize("what", ["install", "rollback"])
def test_44_killed_at_any_step_the_old_or_the_new_runs_whole(
    root: Path, old: Path, new: Path, tmp_path: Path, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(install, "selftest", lambda folder: {"passed": True})
    install.install(old, root)
    if what == "rollback":
        install.install(new, root)

    def killed(at: int, place: Path) -> subprocess.CompletedProcess[str]:
        shutil.copytree(root, place, symlinks=True)
        command = [sys.executable, "-c", KILL, str(at), what, str(new), str(place)]
        return subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(__file__).parents[1])

    steps = int(killed(0, tmp_path / "whole").stdout)
    assert steps > (60 if what == "install" else 8)
    seen = set()
    for at in range(1, steps + 1, 1 if what == "rollback" else 3):
        place = tmp_path / f"killed-{at}"
        assert killed(at, place).returncode == -9
        seen.add(version(place))
        here, _ = install.install(new, place)
        assert (here.version, version(place)) == ("1.10.0", "1.10.0")
        assert not (place / ".incoming").exists()
        shutil.rmtree(place)
    assert seen == {"1.0.0", "1.10.0"}


def test_45_a_full_disk_and_a_broken_one_leave_what_runs(
    root: Path, old: Path, new: Path, monkeypatch: pytest.MonkeyPatch, tried: None
) -> None:
    install.install(old, root)
    usage = shutil.disk_usage(root)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1_100_000))
    assert "MB free, and" in refused(root, new)
    monkeypatch.undo()
    monkeypatch.setattr(install, "selftest", lambda folder: {"passed": True})
    real = os.write
    for at in range(1, 1000):
        left = iter(range(at))

        def write(handle: int, content: Any, left: Iterator[int] = left) -> int:
            if next(left, None) is None:
                raise OSError(28, "No space left on device")
            return real(handle, content)

        monkeypatch.setattr(os, "write", write)
        try:
            found = str(install.install(new, root)[0].version)
        except OSError as error:
            found = str(error)
        monkeypatch.setattr(os, "write", real)
        assert not (root / ".incoming").exists()
        if found == "1.10.0":
            break
        assert "No space left" in found
        assert version(root) == "1.0.0"
    assert at > 10
    assert version(root) == "1.10.0"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_45_a_folder_that_may_not_be_written_is_told(root: Path, old: Path) -> None:
    root.chmod(0o555)
    try:
        assert agent.main(["install", str(old), "--root", str(root)]) == 2
    finally:
        root.chmod(0o755)


def test_a_root_that_is_not_there_is_told(tmp_path: Path, old: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert agent.main(["install", str(old), "--root", str(tmp_path / "none")]) == 2
    assert "is no folder; pin a key in it first" in capsys.readouterr().err
    assert agent.main(["selftest", "--root", str(tmp_path)]) == 2
    assert "nothing is installed in" in capsys.readouterr().err


def test_readers_see_the_old_or_the_new_while_installing(root: Path, old: Path, new: Path, tried: None) -> None:
    install.install(old, root)
    seen, stop = set(), threading.Event()

    def look() -> None:
        while not stop.is_set():
            seen.add(json.loads((root / "current/manifest.json").read_bytes())["version"])

    thread = threading.Thread(target=look)
    thread.start()
    try:
        for _ in range(5):
            install.install(new, root)
            install.rollback(root)
    finally:
        stop.set()
        thread.join()
    assert seen <= {"1.0.0", "1.10.0"}


def test_the_commands_of_bitferry_do_the_same(made: tuple[Shop, Path, Path], tmp_path: Path) -> None:
    here = Project(tmp_path)
    shop = made[0]
    bundle = Path(shutil.copytree(shop.folder / "small-openvino-1.0.0", tmp_path / "small-openvino-1.0.0"))
    for words, told in (
        (["keys", "new", "a"], "a.key\na.pub\n"),
        (["keys", "new", "b"], "b.key\nb.pub\n"),
        (["sign", bundle.name, "--key", "a.key"], f"{bundle}.tar.gz\n"),
        (["trust", "a.pub", "--root", "root"], "root trusts list 1: "),
        (["install", f"{bundle.name}.tar.gz", "--root", "root"], "small 1.0.0 for openvino runs: root/versions/"),
        (["selftest", "--root", "root"], "small 1.0.0 for openvino is as it was signed, and answers as it was"),
        (["keys", "list", "b.pub", "--number", "2", "--key", "a.key", "-o", "keys.json"], "keys.json\n"),
        (["trust", "keys.json", "--root", "root"], "root trusts list 2: "),
        (["status", "--root", "root"], "current\tname small, version 1.0.0, target openvino, folder root/versions/"),
        (["device", "-o", "agent.pyz"], "agent.pyz\n"),
    ):
        done = here.bitferry(*words)
        assert done.returncode == 0, done.stderr
        assert done.stdout.startswith(told)
    assert here.bitferry("selftest", "--root", "root").returncode == 0  # signed by a key that was trusted then
    (tmp_path / "root/current/golden/golden-1.jpg").unlink()
    assert "failed, and root has nothing to go back to: root/versions/small" in here.refused(
        "selftest", "--root", "root"
    )
    assert "has nothing to go back to" in here.refused("rollback", "--root", "root")
    assert "a.key exists" in here.refused("keys", "new", "a")
    assert "is not a bundle: it has no manifest.json" in here.refused("sign", "root", "--key", "a.key")
    (bundle / "model.bin").write_bytes(b"other")
    assert "changed: model.bin" in here.refused("sign", bundle.name, "--key", "a.key")


def test_a_device_updates_itself_from_what_was_published(made: tuple[Shop, Path, Path], tmp_path: Path) -> None:
    here, (shop, old, new) = Project(tmp_path), made
    with served(tmp_path / "public") as server:
        publish = ["--repository", "public", "--keys", "roles"]
        update = ["update", "--repository", server.url, "--root", "root"]

        def done(*words: str) -> str:
            run = here.bitferry(*words)
            assert run.returncode == 0, run.stderr
            return run.stdout

        assert "public offers small-openvino-1.0.0.tar.gz" in done("publish", str(old), *publish)
        done("trust", str(shop.public), "--root", "root")
        assert "trusts no publisher yet" in here.refused(*update)
        first = done(*update, "--trusted-root", "public/metadata/root.json")
        assert first.startswith("small 1.0.0 for openvino runs: ")
        assert done(*update).startswith("small 1.0.0 for openvino runs already: ")
        done("publish", str(new), *publish)
        done("publish", "--rotate", "timestamp", *publish)
        assert done(*update).startswith("small 1.10.0 for openvino runs: ")
        assert "'owner' is no role of a repository" in here.refused("publish", "--rotate", "owner", *publish)
        assert "expires first" in done("publish", *publish)


@dataclass(frozen=True)
class Fleet:
    """A device that takes its updates from a publisher, on loopback; version 1.0.0 runs on it."""

    folder: Path
    root: Path
    url: str
    capsys: pytest.CaptureFixture[str]

    def offer(self, archive: Path) -> None:
        """Publish a bundle."""
        words = ["publish", str(archive), "--repository", "public", "--keys", "roles"]
        assert Project(self.folder).bitferry(*words).returncode == 0

    def update(self) -> tuple[int, str]:
        """Update the device; give the exit code and what was said."""
        self.capsys.readouterr()
        trusted = ["--trusted-root", str(self.folder / "public/metadata/root.json")]
        code = agent.main(["update", "--repository", self.url, "--root", str(self.root), *trusted])
        return code, "".join(self.capsys.readouterr())


@pytest.fixture
def fleet(old: Path, shop: Shop, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Iterator[Fleet]:
    with served(tmp_path / "public") as server:
        fleet = Fleet(tmp_path, shop.device("edge"), server.url, capsys)
        fleet.offer(old)
        assert fleet.update()[0] == 0
        yield fleet


def test_an_update_does_not_take_again_what_was_rejected(fleet: Fleet, shop: Shop) -> None:
    fleet.offer(shop.archive("2.0.0", other_scores))
    code, told = fleet.update()
    assert (code, version(fleet.root)) == (2, "1.0.0")
    assert "the self-test of small-openvino-2.0.0-" in told
    code, told = fleet.update()
    assert (code, version(fleet.root)) == (2, "1.0.0")
    assert "was rejected here before: the self-test of small-openvino-2.0.0-" in told
    fleet.offer(shop.archive("3.0.0"))
    assert fleet.update()[0] == 0
    assert agent.main(["rollback", "--root", str(fleet.root)]) == 0
    code, told = fleet.update()
    assert (code, version(fleet.root)) == (2, "1.0.0")
    assert "was rejected here before: it was rolled back from" in told
    by_hand = ["install", str(fleet.root / "download/small-openvino-3.0.0.tar.gz"), "--root", str(fleet.root)]
    assert agent.main(by_hand) == 0
    assert fleet.update()[0] == 0
    assert version(fleet.root) == "3.0.0"


MOMENTS = {
    "killed": ("os.kill(os.getpid(), 9)", "it was ended by SIGKILL, as for want of memory"),
    "ended": ("sys.exit('error: no memory left')", "no memory left"),
    "late": ("time.sleep(60)", "did not end within 0.02 minutes"),
    "garbled": ("print(chr(123)); sys.exit(0)", "the self-test's answer of"),
}


def troubled(bundle: Path, moment: str, counter: Path) -> None:
    """Let the runner do something else, as often as a file outside the bundle says, before it answers."""
    with zipfile.ZipFile(bundle / "run.pyz") as packed:
        contents = {name: packed.read(name).decode() for name in packed.namelist()}
    contents["own.py"] = contents["__main__.py"]
    contents["__main__.py"] = (
        "import os, pathlib, runpy, sys, time\n"
        f"counter = pathlib.Path({str(counter)!r})\n"
        "left = int(counter.read_text())\n"
        "if left > 0:\n"
        "    counter.write_text(str(left - 1))\n"
        f"    {MOMENTS[moment][0]}\n"
        "runpy.run_module('own', run_name='__main__')\n"
    )
    with zipfile.ZipFile(bundle / "run.pyz", "w") as packed:
        for name, text in contents.items():
            packed.writestr(name, text)


@pytest.mark.parametrize("moment", MOMENTS)
def test_what_gave_no_answer_is_tried_three_times_by_updates(
    moment: str, fleet: Fleet, shop: Shop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No memory for a moment says nothing of a bundle; what the self-test itself finds wrong does."""
    counter, told = tmp_path / "counter", MOMENTS[moment][1]
    fleet.offer(shop.archive("2.0.0", partial(troubled, moment=moment, counter=counter)))
    counter.write_text("99")
    monkeypatch.setattr("bitferry.device.selftest.MINUTES", 0.02 if moment == "late" else 10)
    for number in (1, 2, 3):
        code, said = fleet.update()
        assert (code, version(fleet.root)) == (2, "1.0.0")
        assert told in said
        assert f"; that was try {number} of 3, and " in said
    code, said = fleet.update()
    assert (code, version(fleet.root)) == (2, "1.0.0")
    assert "was rejected here before: 3 tries ended without an answer, the last so: the self-test" in said
    assert told in said
    assert counter.read_text() == "96"  # it was not tried
    fleet.offer(shop.archive("3.0.0", partial(troubled, moment=moment, counter=counter)))
    counter.write_text("1")
    assert fleet.update()[0] == 2
    monkeypatch.setattr("bitferry.device.selftest.MINUTES", 10)
    assert fleet.update()[0] == 0
    assert version(fleet.root) == "3.0.0"
    assert len(json.loads((fleet.root / "rejected.json").read_text())) == 1  # of 3.0.0 nothing is held against it


def test_what_runs_and_gives_no_answer_for_a_moment_may_come_again(shop: Shop, old: Path, tmp_path: Path) -> None:
    root, counter = shop.device("moment"), tmp_path / "counter"
    counter.write_text("0")
    install.install(old, root)
    new = shop.archive("2.0.0", partial(troubled, moment="killed", counter=counter))
    install.install(new, root)
    counter.write_text("1")
    with pytest.raises(StageFailed, match="ended by SIGKILL"):
        install.prove(root)
    assert version(root) == "1.0.0"
    install.install(new, root, allow_rejected=False)
    assert version(root) == "2.0.0"


def test_an_update_mends_a_damaged_copy_that_was_gone_back_from(root: Path, old: Path, new: Path) -> None:
    install.install(old, root)
    install.install(new, root)
    (root / "current/golden/golden-1.jpg").unlink()
    with pytest.raises(StageFailed):
        install.prove(root)
    assert version(root) == "1.0.0"
    install.install(new, root, allow_rejected=False)
    assert version(root) == "1.10.0"


@pytest.mark.usefixtures("tried")
@pytest.mark.parametrize("damage", ["{", "{}", '{"name": 5}', None])
@pytest.mark.parametrize("name", ["manifest.json", "model.sig", "run.pyz"])
def test_whatever_is_damaged_of_what_runs_the_one_before_runs_again(
    root: Path, old: Path, new: Path, name: str, damage: str | None
) -> None:
    for repair in (False, True):
        install.install(old, root, allow_downgrade=True)
        install.install(new, root)
        path = root / "current" / name
        path.unlink()
        if damage is not None:
            path.write_text(damage)
        assert installed.status(root)["current"]["version"] == "1.10.0"
        if repair:
            assert install.install(new, root)[1] is True
            assert version(root) == "1.10.0"
            assert install.rollback(root).version == "1.0.0"
        else:
            with pytest.raises(StageFailed, match=r"small 1\.10\.0 .* failed, so small 1\.0\.0 .* runs again"):
                install.prove(root)
        assert version(root) == "1.0.0"
        assert installed.status(root)["selftest"] is None


@pytest.mark.usefixtures("tried")
def test_a_version_that_is_gone_or_cannot_be_read_is_replaced(
    root: Path, old: Path, new: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install.install(old, root)
    install.install(new, root)
    shutil.rmtree((root / "current").resolve())
    (root / ".incoming").mkdir()
    assert "is version 1.0.0, which is not newer" in refused(root, old)
    assert install.rollback(root).version == "1.0.0"
    install.install(new, root)

    def broken(path: Path) -> str:
        raise OSError(5, "Input/output error", str(path))

    with monkeypatch.context() as patched:
        patched.setattr("bitferry.device.whole.sha256", lambda path: broken(path) if "1.10.0" in str(path) else "x")
        with pytest.raises(InputError, match="cannot be read: Input/output error"):
            signature.check((root / "current").resolve(), trust.read(root).keys)
    assert version(root) == "1.10.0"


@pytest.mark.usefixtures("tried")
def test_damaged_notes_cost_no_more_than_the_way_back(root: Path, old: Path, new: Path) -> None:
    install.install(old, root)
    install.install(new, root)
    note = (root / "current").resolve().with_name((root / "current").readlink().name + ".json")
    for content in (note.read_text().replace("BEGIN", "BEGIM"), '{"key": "\\ud800"}', "", "[]"):
        note.write_text(content)
        assert version(root) == "1.10.0"
        assert install.prove(root)[0].version == "1.10.0"
        assert install.install(new, root)[1] is False


def test_a_folder_of_somebody_else_is_left_alone(
    shop: Shop, old: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "pyenv/versions/3.11.7").mkdir(parents=True)
    assert agent.main(["trust", str(shop.public), "--root", str(tmp_path / "pyenv")]) == 2
    assert "holds 'versions' and is no root of bitferry's" in capsys.readouterr().err
    root = shop.device()
    (root / "versions/3.11.7").mkdir(parents=True)
    (root / "junk.tar.gz").write_bytes(b"junk")
    refused(root, root / "junk.tar.gz")
    assert (root / "versions/3.11.7").is_dir()
    (root / "current").mkdir()
    with pytest.raises(InputError, match="is no symbolic link, so this is no root"):
        install.install(old, root)
    assert agent.main(["trust", str(tmp_path / "none.pub"), "--root", str(tmp_path / "other")]) == 2
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize(
    "program", ["print('{\"passed\": false}')", "import os; os.write(1, b'\\xff\\n')", "print('[]')", "print()", "1/0"]
)
def test_48_whatever_a_runner_says_that_is_no_pass_is_refused(root: Path, shop: Shop, old: Path, program: str) -> None:
    def other(bundle: Path) -> None:
        with zipfile.ZipFile(bundle / "run.pyz", "w") as packed:
            packed.writestr("__main__.py", program)

    message = refused(root, shop.archive("2.0.0", other), BitferryError)
    assert "small-openvino-2.0.0-" in message


def test_what_was_compiled_on_a_device_is_told_to_be_unsigned(
    root: Path, shop: Shop, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    foreign = shop.archive("1.0.0", lambda bundle: (bundle / "model.xml").write_text("<net/>"))  # loads nowhere
    with monkeypatch.context() as patched:
        patched.setattr(install, "selftest", lambda folder: {"passed": True})
        install.install(foreign, root)
    run = [sys.executable, str(root / "current/run.pyz")]
    check = [*run, "check", "--key", str(shop.public)]
    assert subprocess.run(check, capture_output=True, check=False).returncode == 0
    subprocess.run([*run, "rebuild"], capture_output=True, check=True)
    done = subprocess.run(check, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "rebuilt was compiled on a device, and nobody signed it" in done.stderr
    assert agent.main(["selftest", "--root", str(root)]) == 0
    assert "the model runs as it was compiled here, which nobody signed" in capsys.readouterr().out


def test_a_sign_that_fails_leaves_the_signature(shop: Shop, tmp_path: Path) -> None:
    bundle = shop.copy("1.0.0")
    path = sign.sign(bundle, shop.key)
    before = path.read_bytes()
    with pytest.raises(InputError, match="cannot be read"):
        sign.sign(bundle, tmp_path / "typo.key")
    (bundle / ".DS_Store").write_text("x")
    with pytest.raises(InputError, match="extra: .DS_Store"):
        sign.sign(bundle, shop.key)
    assert path.read_bytes() == before
    (bundle / ".DS_Store").unlink()
    strange = bundle.rename(bundle.with_name("we*ird"))
    with pytest.raises(InputError, match="is no name that every device can hold"):
        sign.archive(strange)


def test_the_device_s_program_needs_no_numpy_and_says_what_it_lacks(tmp_path: Path) -> None:
    write_agent(tmp_path / "agent.pyz")
    with zipfile.ZipFile(tmp_path / "agent.pyz") as packed:
        packed.extractall(tmp_path / "agent")  # noqa: S202 - our own
    hidden = "import sys; sys.modules[{!r}] = None; sys.argv[1:] = ['--help']; sys.path[0] = {!r}; import runpy; "
    for name, code in (("numpy", 0), ("cryptography", 2)):
        text = hidden.format(name, str(tmp_path / "agent")) + "runpy.run_path(sys.path[0] + '/__main__.py')"
        done = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, check=False, cwd=tmp_path)
        assert done.returncode == code, done.stderr
        assert name == "numpy" or done.stderr.startswith("error: this needs the Python package 'cryptography")


def test_a_list_of_keys_is_never_written_over_another_file(shop: Shop, tmp_path: Path) -> None:
    (tmp_path / "keys.json").write_text("mine")
    with pytest.raises(InputError, match="exists; name another file"):
        keys.sign_list([shop.public], 2, shop.key, tmp_path / "keys.json")
    both = tmp_path / "both.pub"
    both.write_bytes(shop.public.read_bytes() * 2)
    with pytest.raises(InputError, match="holds several keys; pin one"):
        trust.take(tmp_path / "new", both)
    with pytest.raises(InputError, match="is set and empty"):
        keys.new(tmp_path / "c", "")
