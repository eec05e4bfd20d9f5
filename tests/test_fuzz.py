"""Bytes nobody thought of: whatever a file holds, it is read or refused with BitferryError, and nothing else comes out.

Each reader gets changes of a real file. FUZZ_SECONDS lengthens each reader's time from a few seconds.
"""

import io
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import openvino as ov
import pytest
import torch
from cryptography.hazmat.primitives.asymmetric import ec
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save

from bitferry.device import archive, ir_file, onnx_file, runner, signature, trust
from bitferry.device.errors import BitferryError
from bitferry.pipeline import checkpoint
from bitferry.pipeline.shipping import keys, sign
from tests.conftest import Project

SECONDS = float(os.environ.get("FUZZ_SECONDS", "3"))
MOST_EXAMPLES = 1_000_000


@dataclass(frozen=True)
class Entry:
    """A reader of files from outside, and the real files that are changed for it."""

    name: str
    read: Callable[[Path], object]
    seeds: Callable[[Project], list[bytes]]
    file: str
    """What the changed file is called."""
    beside: Callable[[Project], dict[str, bytes]] = lambda _: {}
    """Files that belong to it and stay as they are."""


STATE = {"first.weight": torch.arange(24.0).view(4, 6), "first.bias": torch.ones(4), "steps": torch.tensor(3)}


def _checkpoints(_: Project) -> list[bytes]:
    found = []
    for options in ({}, {"_use_new_zipfile_serialization": False}):
        stream = io.BytesIO()
        torch.save({"epoch": 3, "state_dict": STATE}, stream, **options)
        found.append(stream.getvalue())
    return found


def _of_bundle(target: str, name: str) -> Callable[[Project], list[bytes]]:
    return lambda deployed: [(deployed.folder / f"dist/small-{target}-1.0.0" / name).read_bytes()]


def _model_bin(deployed: Project) -> dict[str, bytes]:
    return {"model.bin": (deployed.folder / "dist/small-openvino-1.0.0/model.bin").read_bytes()}


def _ir(path: Path) -> None:
    """Give the runtime what passes the check: it may refuse it with an error of its own, and must not fall."""
    ir_file.check(path)
    try:
        ov.Core().read_model(path)
    except RuntimeError as error:
        raise BitferryError(str(error)) from error


def _archive(path: Path) -> None:
    with archive.opened(path) as (head, reader):
        signature.verify(head.signature, [KEY], "it")
        for _ in reader:
            pass


def _archives(deployed: Project) -> list[bytes]:
    bundle = Path(tempfile.mkdtemp(dir=deployed.folder)) / "small"
    shutil.copytree(deployed.folder / "dist/small-openvino-1.0.0", bundle)
    (bundle / "model.sig").write_bytes(_signature())
    return [sign.archive(bundle).read_bytes()]


def _signature(payload: bytes = signature.statement("small", {"a": "0" * 64})) -> bytes:
    return signature.enclose(payload, keys.sign(signature.encoded(payload), SECRET), KEY)


def _key_list(_: Project) -> list[bytes]:
    payload = trust.text(2, (KEY,))
    return [trust.enclose(payload, keys.sign(signature.encoded(payload, trust.KIND), SECRET), KEY)]


def _trusted(path: Path) -> None:
    trust.newer(trust.Trusted(1, (KEY,)), path.read_bytes(), "it")


def _manifest(path: Path) -> None:
    runner.check(path.parent, runner.read_manifest(path.parent))


def _rest_of_bundle(deployed: Project) -> dict[str, bytes]:
    bundle = deployed.folder / "dist/small-openvino-1.0.0"
    files = {path.relative_to(bundle).as_posix(): path for path in bundle.rglob("*") if path.is_file()}
    return {name: path.read_bytes() for name, path in files.items() if name != "manifest.json"}


SECRET = ec.generate_private_key(ec.SECP256R1())
KEY = keys.name_of(SECRET, "it")
ENTRIES = [
    Entry("manifest", _manifest, _of_bundle("openvino", "manifest.json"), "manifest.json", _rest_of_bundle),
    Entry("archive", _archive, _archives, "small.tar.gz"),
    Entry(
        "signature",
        lambda path: signature.verify(path.read_bytes(), [KEY], "it"),
        lambda _: [_signature()],
        "model.sig",
    ),
    Entry("keys", _trusted, _key_list, "keys.json"),
    Entry("checkpoint", checkpoint.read, _checkpoints, "weights.pt"),
    Entry("safetensors", checkpoint.read, lambda _: [save(STATE)], "weights.safetensors"),
    Entry("onnx", onnx_file.check, _of_bundle("onnxruntime", "model.onnx"), "model.onnx"),
    Entry("ir", _ir, _of_bundle("openvino", "model.xml"), "model.xml", _model_bin),
]


@st.composite
def changed(draw: st.DrawFn, seeds: list[bytes]) -> bytes:
    """Change a real file: bytes put over, in or out, a part doubled, its end cut off; or no real file at all."""
    content = bytearray(draw(st.sampled_from(seeds)))
    if draw(st.integers(0, 19)) == 0:
        return draw(st.binary(max_size=300))
    for _ in range(draw(st.integers(1, 4))):
        place, size = draw(st.integers(0, len(content))), draw(st.integers(0, 40))
        kind = draw(st.sampled_from(("over", "in", "out", "double", "cut")))
        if kind == "over":
            content[place : place + size] = draw(st.binary(min_size=size, max_size=size))
        elif kind == "in":
            content[place:place] = draw(st.binary(max_size=size))
        elif kind == "out":
            del content[place : place + size]
        elif kind == "double":
            content[place:place] = content[place : place + size]
        else:
            del content[len(content) - size :]
    return bytes(content)


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry.name)
def test_only_our_own_errors_come_out(entry: Entry, deployed: Project, tmp_path: Path) -> None:
    seeds, place = entry.seeds(deployed), tmp_path / entry.file
    for name, content in entry.beside(deployed).items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    for seed in seeds:
        place.write_bytes(seed)
        entry.read(place)  # the real one is read
    end, tried = time.monotonic() + SECONDS, {"read": 0, "refused": 0}

    @settings(
        max_examples=MOST_EXAMPLES,
        deadline=None,
        database=None,
        suppress_health_check=[*HealthCheck],
        derandomize=SECONDS < 10,
    )
    @given(changed(seeds))
    def tries(content: bytes) -> None:
        if time.monotonic() > end:
            raise _Over
        place.unlink()
        place.write_bytes(content)  # a new file: what was read before may still be mapped
        try:
            entry.read(place)
            tried["read"] += 1
        except BitferryError as error:
            tried["refused"] += bool(str(error))

    with pytest.raises(_Over):
        tries()
    assert tried["refused"] > 0, tried


class _Over(BaseException):
    """The time is over; not an Exception, for Hypothesis would look for a smaller one."""
