"""What is taken of a checkpoint with several models in it, and what is said of a file that is none."""

import argparse
import io
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save
from torch import Tensor, nn

from bitferry.device.errors import InputError
from bitferry.pipeline import checkpoint

State = dict[str, Tensor]


def net(width: int = 4) -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, width, 3), nn.BatchNorm2d(width), nn.Flatten(), nn.Linear(width, 5))


torch.manual_seed(0)
ONE, OTHER, WIDE = dict(net().state_dict()), dict(net().state_dict()), dict(net(6).state_dict())


def under(prefix: str, state: State) -> State:
    return {f"{prefix}.{name}": tensor for name, tensor in state.items()}


def saved(stored: object, **options: Any) -> bytes:
    stream = io.BytesIO()
    torch.save(stored, stream, **options)
    return stream.getvalue()


def zipped(files: dict[str, bytes]) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return stream.getvalue()


def filled(path: Path) -> Tensor:
    model = net()
    checkpoint.fill(model, checkpoint.read(path), path)
    found: Tensor = model.state_dict()["0.weight"]
    return found


AVERAGE = {name: tensor for name, tensor in OTHER.items() if "running" not in name}


@pytest.mark.parametrize(
    ("stored", "expected", "told"),
    [
        ({"params": ONE, "params_ema": OTHER}, OTHER, "took 'params_ema', and not params"),
        ({"model": ONE, "ema": AVERAGE, "epoch": 3}, OTHER, "took 'ema', and not model"),
        ({"model_state": ONE, "optimizer": {"state": {"a": {"exp_avg": ONE["0.weight"]}}}}, ONE, ""),
        ({"checkpoint": {"state_dict": ONE, "epoch": 3}}, ONE, ""),
        ({"my_own_name": ONE, "epoch": 3}, ONE, ""),
        ({**ONE, "epoch": 3}, ONE, ""),
        ({"generator": ONE, "discriminator": WIDE}, ONE, "took what is under 'generator.', 9 of 18 tensors"),
        (under("student", WIDE) | under("teacher", ONE), ONE, "took what is under 'teacher.', 9 of 18 tensors"),
        (under("module.student", ONE) | under("module.teacher", WIDE), ONE, "under 'student.'"),
        (under("_fsdp_wrapped_module", ONE), ONE, ""),
        ({"state_dict": under("net", ONE) | {"criterion.weight": torch.ones(2)}}, ONE, "9 of 10 tensors"),
    ],
)
def test_the_model_that_is_meant_is_taken_and_said_so(
    tmp_path: Path, stored: dict[str, Any], expected: State, told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "w.pth").write_bytes(saved(stored))
    torch.testing.assert_close(filled(tmp_path / "w.pth"), expected["0.weight"], atol=0, rtol=0)
    said = capsys.readouterr().err
    assert told in said if told else not said


@pytest.mark.parametrize(
    ("stored", "told"),
    [
        ({"student": ONE, "teacher": OTHER}, "holds 2 copies of this model, under student, teacher; keep one"),
        (under("student", ONE) | under("teacher", OTHER), "2 copies of this model, under student, teacher"),
        (under("student", WIDE) | under("teacher", WIDE), r"names begin with student. \(9\), teacher. \(9\)"),
        ({"netG": ONE, "netD": OTHER}, "2 copies of this model, under netG, netD"),
        ({"epoch": 3, "losses": [1.0, 2.0]}, r"holds a dict \(epoch: int, losses: list of 2\), expected a state dict"),
        ({}, "holds an empty dict"),
        (3, "holds a int"),
        ({"model": ONE, "args": argparse.Namespace(lr=1)}, "opened: argparse.Namespace is in it. Save it again"),
        ({"model": ONE, "best": np.float64(1)}, r"opened: numpy\.\S+ .*in it\. Save it again"),
        (net(), r"torch.nn.modules\..*\(the whole model was saved, which is code\)"),
    ],
)
@pytest.mark.parametrize("options", [{}, {"_use_new_zipfile_serialization": False}], ids=["zip", "legacy"])
def test_what_is_in_the_way_is_named(tmp_path: Path, stored: object, told: str, options: dict[str, Any]) -> None:
    (tmp_path / "w.pth").write_bytes(saved(stored, **options))
    with pytest.raises(InputError, match=told) as caught:
        filled(tmp_path / "w.pth")
    assert "\x1b" not in str(caught.value)
    assert "weights_only" not in str(caught.value)


def arrays() -> bytes:
    stream = io.BytesIO()
    np.savez(stream, a=np.zeros(2))
    return stream.getvalue()


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (lambda: b"<!DOCTYPE html>\n<title>Sign in</title>", r"no checkpoint, but a web page \(HTML, 'Sign in'\)"),
        (lambda: b"\xef\xbb\xbf\n<HTML><body>404", "a web page"),
        (lambda: b"version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 9\n", "Git LFS.*git lfs pull"),
        (lambda: b"/annex/objects/SHA256E-s44--aa.pth\n", "git-annex.*git annex get"),
        (lambda: b'{"message": "Not Found"}', r'JSON \({"message": "Not Found"}\), as servers send'),
        (lambda: b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>', "an XML message"),
        (lambda: b"", "empty: 0 bytes"),
        (lambda: b"run fetch.sh first\n", r"text \(run fetch.sh first\)"),
        (lambda: b"\x1f\x8b\x08\x00", "compressed by gzip"),
        (lambda: b"\x89HDF\r\n\x1a\n", "HDF5"),
        (lambda: saved(ONE)[:900], "is cut off"),
        (lambda: saved(ONE, _use_new_zipfile_serialization=False)[:900], "broken or cut off"),
        (lambda: save(ONE)[:200], r"\(cut off: 200 bytes, and its header alone has"),
        (arrays, r"arrays of NumPy \(.npz\), of a.npy, not what torch.save writes"),
        (lambda: zipped({"config.json": b"{}"}), "another ZIP, of config.json"),
        (lambda: zipped({"runs/best.pth": b"x"}), "unpack it and give runs/best.pth"),
        (lambda: b"\x08\x08\x12\x07pytorch", "its pickle is broken or of another program"),
    ],
)
def test_what_is_no_checkpoint_is_told_as_what_it_is(tmp_path: Path, content: Callable[[], bytes], told: str) -> None:
    (tmp_path / "w.pth").write_bytes(content())
    with pytest.raises(InputError, match=told):
        checkpoint.read(tmp_path / "w.pth")


def test_a_link_to_what_was_not_fetched_is_told(tmp_path: Path) -> None:
    (tmp_path / "w.pth").symlink_to("../.git/annex/objects/ab/w.pth")
    with pytest.raises(InputError, match="git annex get"):
        checkpoint.read(tmp_path / "w.pth")
    (tmp_path / "v.pth").symlink_to("nowhere.pth")
    with pytest.raises(InputError, match="a link to nowhere.pth, which does not exist"):
        checkpoint.read(tmp_path / "v.pth")
