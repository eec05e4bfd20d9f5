"""A bundle proved on another machine: copied there over ssh, run by its own runner, judged here."""

import json
import math
import shlex
import tempfile
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from pydantic import TypeAdapter, ValidationError

from bitferry import targets
from bitferry.device import kept, runner, whole
from bitferry.device.errors import InputError, StageFailed, TargetUnavailable, first_line
from bitferry.device.kept import Kept
from bitferry.device.measure import Measurement
from bitferry.pipeline import progress, recheck
from bitferry.pipeline.bundle_data import Shown, show_again
from bitferry.pipeline.measure.latency import Effort
from bitferry.pipeline.recheck import Found, Recheck
from bitferry.pipeline.report import record
from bitferry.pipeline.shipping.ssh import Device, Done, Login, command

__all__ = ["command", "verify"]
OLDEST = (3, 11)
VERSION = "import sys; print('.'.join(str(part) for part in sys.version_info[:3]))"
RUN_SECONDS = 3600
"""For one command of the runner on a slow machine; a dead connection is noticed within half a minute."""
IMAGE_SECONDS = 2
"""More for each image to answer for."""
MEASUREMENTS = TypeAdapter(Measurement)
PACKAGES = {"PIL": "pillow"}
"""Python packages by the name they are imported by, where that is another."""


def verify(
    bundle: Path,
    host: str,
    data: Path | None = None,
    *,
    python: str = "python3",
    effort: Effort = "default",
    ssh: Sequence[str] = ("ssh",),
) -> Recheck:
    """Copy the bundle to `host`; check, try and time it there, and measure its accuracy on `data` if given.

    The other machine needs sshd, Python and the target's runtime; nothing is left on it. A bundle that was built
    unmeasured gets its verdict by this, in its manifest. Raises InputError for a bundle that is not as it was built,
    here or there, TargetUnavailable where the machine cannot be reached or lacks something.
    """
    device = Device(Login(host, ssh), python)
    manifest = runner.read_manifest(bundle)
    runner.check(bundle, manifest)  # what was changed is not run there either
    _refuse_old(bundle)
    verified = record.read_built(bundle / record.VERDICT)
    shown = show_again(bundle, manifest, data) if data else None
    with progress.timed("verify", f"{bundle} on {host}"):
        _check_python(device)
        with device.folder() as folder:
            found = _Visit(device, folder, bundle, manifest).found(shown, recheck.seconds(effort))
    return recheck.conclude(bundle, manifest, verified, found, shown, host=host)


def _refuse_old(bundle: Path) -> None:
    """Raise InputError for a runner that does not measure yet."""
    try:
        with zipfile.ZipFile(bundle / "run.pyz") as program:
            able = any(name.endswith("device/measure.py") for name in program.namelist())
    except (OSError, zipfile.BadZipFile) as error:
        raise InputError(f"{bundle}/run.pyz cannot be read: {first_line(error)}") from error
    if not able:
        raise InputError(f"{bundle} was built by an older bitferry, whose runner cannot measure; deploy it again")


def _check_python(device: Device) -> None:
    done = device.login.run(f"exec {device.interpreter} -c {shlex.quote(VERSION)}")
    host, asked = device.login.host, "name another by --python"
    if done.code in (126, 127):
        raise TargetUnavailable(f"{host} has no '{device.python}' that can be run; install Python there, or {asked}")
    try:
        version = tuple(int(part) for part in done.last_line.split("."))
    except ValueError:
        raise StageFailed(f"'{device.python}' on {host} is no Python: it says {done.last_line or done.why}") from None
    if version < OLDEST:
        wanted = ".".join(map(str, OLDEST))
        raise TargetUnavailable(f"{host} has Python {done.last_line}; {wanted} or newer is needed: {asked}")


@dataclass(frozen=True)
class _Visit:
    """A folder on another machine, and the bundle that is tried in it."""

    device: Device
    folder: PurePosixPath
    bundle: Path
    manifest: dict[str, Any]

    def found(self, shown: Shown | None, seconds: float) -> Found:
        """Copy, check, answer for the golden files, time, and answer for the images."""
        files = {f"bundle/{name}": path for name, path in _files(self.bundle).items()}
        progress.stage("verify", f"copies {sum(path.stat().st_size for path in files.values()) / 1e6:.1f} MB")
        self.device.send(files, self.folder)
        self._run("check")
        tried = _json(self._run("selftest", "--json"), self.device)
        measured = _measurement(self._measure(seconds, shown), self.device)
        try:
            differences = {str(n): math.inf if v is None else float(v) for n, v in tried["differences"].items()}
            limit = float(tried["score_limit"])
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise StageFailed(f"the self-test on {self.device.login.host} cannot be read: {tried}") from error
        return Found(limit, differences, measured, self._answers(shown) if shown else None)

    def _measure(self, seconds: float, shown: Shown | None) -> Done:
        arguments, longest = ["--json", "--seconds", str(seconds)], RUN_SECONDS + seconds
        if shown:
            with tempfile.TemporaryDirectory() as here:
                np.save(Path(here) / "images.npy", shown.images)
                self.device.send({"images.npy": Path(here) / "images.npy"}, self.folder)
            arguments += ["--images", "images.npy"]
            longest += IMAGE_SECONDS * len(shown.images)
            progress.stage("verify", f"answers for {len(shown.images)} images there …")
        return self._run("measure", *arguments, seconds=longest)

    def _answers(self, shown: Shown) -> Kept:
        """Bring the answers back; raise StageFailed where they are not those of so many images."""
        classes, size = len(self.manifest["classes"]), shown.images.nbytes
        maps = runner.task_of(self.manifest) == "segmentation"
        names = ["scores.npy", *(["maps.npz"] if maps else [])]
        with tempfile.TemporaryDirectory() as here:
            for name in names:
                self.device.fetch(self.folder / name, Path(here) / name, size=size + 4 * classes * len(shown.images))
            try:
                found = kept.read(Path(here))
            except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile) as error:
                raise StageFailed(
                    f"the answers of {self.device.login.host} cannot be read ({first_line(error)}); does its login "
                    "shell print something where nobody is at the terminal?"
                ) from error
        whole = found.scores.shape[:2] == (len(shown.images), classes) and np.isfinite(found.scores).all()
        if not whole or (found.maps is not None and found.maps.shape != shown.labels.shape):
            raise StageFailed(f"{self.device.login.host} does not give {classes} finite scores for each image")
        return found

    def _run(self, *arguments: str, seconds: float = RUN_SECONDS) -> Done:
        """Run the bundle's own program there; raise what it says is wrong, or what its machine lacks."""
        done = self.device.call(self.folder, ["bundle/run.pyz", *arguments], seconds=seconds)
        if done.code == 0 or (done.code == 1 and done.last_line.startswith("{")):  # a self-test that failed
            return done
        host, why = self.device.login.host, done.why
        self.device.refuse_full(done, str(self.folder))
        if why.startswith("ModuleNotFoundError: No module named "):
            raise TargetUnavailable(self._lacks(why.split("'")[1].partition(".")[0]))
        if done.error:
            raise InputError(f"on {host}, {done.error.replace(f'{self.folder}/bundle', str(self.bundle))}")
        if done.code > 128:
            why = f"it was ended by signal {done.code - 128}" + (", maybe for lack of memory" * (done.code == 137))
        raise StageFailed(f"`run.pyz {arguments[0]}` failed on {host}: {why}")

    def _lacks(self, module: str) -> str:
        """Name a missing package, and the command that installs everything a bundle runs on, as tried with bitferry."""
        python, name = self.device.python, self.manifest["target"]
        runtime = (self.manifest.get("environment") or {}).get("runtime", name)
        pins = [*targets.pins("", "numpy"), *targets.pins("", "pillow"), *targets.pins(name, runtime)]
        return (
            f"'{python}' on {self.device.login.host} lacks the package '{PACKAGES.get(module, module)}'; install what "
            f"this bundle needs there: `{python} -m pip install {shlex.join(pins)}`, or name a Python that has it by "
            "--python"
        )


def _files(bundle: Path) -> dict[str, Path]:
    """List a bundle's files by name; what was rebuilt here fits here, and stays."""
    paths = {path.relative_to(bundle): path for path in sorted(bundle.rglob("*")) if path.is_file()}
    return {name.as_posix(): path for name, path in paths.items() if name.parts[0] not in whole.PARTS}


def _json(done: Done, device: Device) -> dict[str, Any]:
    try:
        found = json.loads(done.last_line)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise StageFailed(f"what {device.login.host} printed cannot be read: {done.last_line[:200]!r}")
    return found


def _measurement(done: Done, device: Device) -> Measurement:
    try:
        found = MEASUREMENTS.validate_python(_json(done, device))
        seconds = np.array(found.seconds)
    except (ValidationError, ValueError) as error:
        raise StageFailed(f"the measurement of {device.login.host} cannot be read: {first_line(error)}") from error
    if seconds.ndim != 2 or not seconds.size or not (np.isfinite(seconds).all() and (seconds > 0).all()):
        raise StageFailed(f"{device.login.host} did not time any call")
    return found
