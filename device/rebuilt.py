"""A bundle's model compiled again on the device, into `rebuilt/`, where the file that was shipped does not fit."""

import json
import shutil
from pathlib import Path
from typing import Any, Protocol

from bitferry.device import atomic, onnx_file
from bitferry.device.errors import BitferryError, InputError, StageFailed, TargetUnavailable, first_line
from bitferry.device.whole import REBUILT, sha256

SOURCE = "model.onnx"
OLD = ".rebuilt.old"


class Compiler(Protocol):
    """The part of a target that building again needs."""

    CONSUMES: Any

    def environment(self, *, options: Any) -> Any: ...

    def compile(self, model: Path, out: Path, *, precision: Any, options: Any) -> None: ...


def rebuild(bundle: Path, manifest: dict[str, Any], compiler: Compiler, options: Any) -> Path:
    """Compile the bundle's ONNX for this machine into `rebuilt/`, whole or not at all; give the compiled file."""
    listed, model = manifest["files"], manifest["model"]
    if compiler.CONSUMES != "onnx" or SOURCE not in listed:
        raise InputError(
            f"{bundle} is of target '{manifest['target']}', which compiles from PyTorch; that is not on a device: "
            "deploy again on a machine with bitferry"
        )
    found = compiler.environment(options=options)
    if found.unmeasured:
        raise TargetUnavailable(f"what is built here would not run here: {found.unmeasured}")
    part = bundle / ".rebuilt"
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir()
    try:
        _compile(bundle / SOURCE, part / model["file"], compiler, model["precision"], options)
        note = {
            "from": {"file": SOURCE, "sha256": listed[SOURCE]["sha256"]},
            "runtime": {"name": found.runtime, "version": found.version, "device": found.device},
            "precision": model["precision"],
            "options": model["options"],
            "files": {path.name: sha256(path) for path in sorted(part.iterdir())},
        }
        (part / "manifest.json").write_text(json.dumps(note, indent=2) + "\n")
        atomic.publish(part, bundle / REBUILT, bundle / OLD)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return bundle / REBUILT / str(model["file"])


def find(bundle: Path, manifest: dict[str, Any]) -> Path | None:
    """Give the file that was compiled here, None where none was; raise InputError when it is not as it was made."""
    folder = bundle / REBUILT
    if not folder.exists():
        return None
    try:
        note = json.loads((folder / "manifest.json").read_bytes())
        made_from, files = note["from"]["sha256"], dict(note["files"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{folder}/manifest.json cannot be used ({error!r}); {_REMEDY}") from error
    present = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir()}
    strange = present ^ {*files, "manifest.json"}
    strange |= {name for name in present & set(files) if sha256(folder / name) != files[name]}
    if strange or manifest["model"]["file"] not in files:
        raise InputError(
            f"{folder} is not as it was built (see {', '.join(sorted(strange)) or 'its model'}); {_REMEDY}"
        )
    if made_from != manifest["files"].get(SOURCE, {}).get("sha256"):
        raise InputError(f"{folder} was built from another {SOURCE} than this bundle's; {_REMEDY}")
    return folder / str(manifest["model"]["file"])


_REMEDY = "run `python run.pyz rebuild` again, or remove the folder to use the model as it was shipped"


def _compile(source: Path, out: Path, compiler: Compiler, precision: str, options: Any) -> None:
    onnx_file.check(source)  # compilers follow what it points at
    try:
        compiler.compile(source, out, precision=precision, options=options)
    except BitferryError:
        raise
    except ModuleNotFoundError as error:
        raise TargetUnavailable(f"building needs the Python package '{error.name}', which is not installed") from error
    except Exception as error:  # the vendor's compiler may raise anything
        raise StageFailed(f"the compiler refused {source}: {first_line(error)}") from error
