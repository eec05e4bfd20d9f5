"""The ZIP that torch.save writes: refused before it is opened where it is anything else than that."""

import zipfile
from collections import Counter
from pathlib import Path
from typing import BinaryIO

from bitferry.device.errors import InputError

HEAD = b"PK\x03\x04"
EXPECTED = "expected the archive as torch.save writes it; get the file again from where it was made"
PIECE = 1 << 20
WEIGHTS = (".pt", ".pth", ".safetensors", ".ckpt", ".bin")


def refuse(stream: BinaryIO, path: Path) -> None:
    """Raise InputError for a ZIP that two readers could read in two ways, that is broken, or that is a program.

    PyTorch's own reader compares no checksums, and would hand TorchScript, which is code, to torch.jit.load.
    """
    stream.seek(0)
    begins, ends = stream.read(4) == HEAD, zipfile.is_zipfile(stream)
    if not begins and not ends:
        return
    if not ends:
        raise InputError(f"{path} is cut off: it begins as a ZIP and has no directory at its end; copy it again")
    try:
        with zipfile.ZipFile(stream) as archive:
            _refuse_odd(archive.infolist(), path, stream.seek(0, 2))
            for record in archive.infolist():  # to its end, where its checksum is compared
                with archive.open(record) as content:
                    while content.read(PIECE):
                        pass
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError, EOFError, ValueError) as error:
        raise InputError(f"{path} is a broken ZIP ({error}); {EXPECTED}") from error


def _refuse_other(records: list[zipfile.ZipInfo], path: Path) -> None:
    """Raise InputError for a ZIP of something else, naming what is in it."""
    names = [record.filename for record in records if not record.is_dir()]
    if any(name.endswith(("/data.pkl", "/constants.pkl")) for name in names):
        return
    shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "") or "nothing"
    inside = next((name for name in names if name.endswith(WEIGHTS)), None)
    what = "arrays of NumPy (.npz)" if names and all(name.endswith(".npy") for name in names) else "another ZIP"
    hint = f"; unpack it and give {inside}" if inside else ""
    raise InputError(f"{path} is {what}, of {shown}, not what torch.save writes{hint}")


def _refuse_odd(records: list[zipfile.ZipInfo], path: Path, size: int) -> None:
    _refuse_other(records, path)
    names = Counter(record.filename for record in records)
    folders = {name.partition("/")[0] for name in names}
    declared = sum(record.file_size for record in records)
    if any(name.endswith("/constants.pkl") for name in names):
        raise InputError(f"{path} is a TorchScript program, not a state dict; save model.state_dict() instead")
    if records and min(record.header_offset for record in records) > 0:
        raise InputError(f"{path} is two files in one: there is something else before its ZIP; {EXPECTED}")
    if len(names) < len(records):
        raise InputError(f"{path} has two records called {names.most_common(1)[0][0]!r}; {EXPECTED}")
    if len(folders) > 1:
        raise InputError(f"{path} holds {len(folders)} archives in one ({', '.join(sorted(folders)[:3])}); {EXPECTED}")
    if declared > size or any(record.compress_type != zipfile.ZIP_STORED for record in records):
        raise InputError(f"{path} has {size} bytes and says that it unpacks to {declared}, compressed; {EXPECTED}")
