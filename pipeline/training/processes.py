"""One training on several processes of this machine, each with its share of every batch: gloo on CPUs, NCCL on GPUs."""

import io
import json
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np

from bitferry.device import errors
from bitferry.device.errors import BitferryError, StageFailed, first_line
from bitferry.pipeline import interrupt, progress
from bitferry.pipeline.training import machine
from bitferry.pipeline.training.course import Course, Job, Told
from bitferry.targets import usable_cpus

SOURCES = Path(__file__).parents[3]
POLL_SECONDS = 0.1
JOB, FAULT, MEETING, NOISE = "job", "fault.json", "meeting", "noise"


def teach(job: Job, processes: int = 1, told: Told | None = None, *, threads: int | None = None) -> None:
    """Train, here with so many threads or on several processes; `told` hears of each validation here."""
    if processes > 1:
        _spread(job, processes)
        return
    with machine.accelerator(job.precision, threads=threads) as accelerator:
        Course(job, accelerator, told).run()


class _Pickler(pickle.Pickler):
    """Sends memory-mapped arrays by their files' names, not their content."""

    def reducer_override(self, value: object) -> Any:
        if isinstance(value, np.memmap) and value.filename and not isinstance(value.base, np.ndarray):
            return np.memmap, (str(value.filename), value.dtype, "r", value.offset, value.shape)
        return NotImplemented


def pack(job: Job) -> bytes:
    """Write a job for another process of this machine."""
    stream = io.BytesIO()
    _Pickler(stream).dump(job)
    return stream.getvalue()


def unpack(content: bytes) -> Job:
    """Read what `pack` wrote, in this very run."""
    job = pickle.loads(content)  # noqa: S301 - written by the run that reads it, in a folder of its own
    assert isinstance(job, Job)  # noqa: S101 - for the type checker
    return job


def _spread(job: Job, processes: int) -> None:
    with tempfile.TemporaryDirectory(prefix="bitferry-") as name:
        room = Path(name)
        (room / JOB).write_bytes(pack(job))
        running = [_start(room, number, processes) for number in range(processes)]
        try:
            while any(one.poll() is None for one in running):
                interrupt.check()
                if any(one.poll() for one in running):
                    break
                time.sleep(POLL_SECONDS)
        finally:
            for one in running:
                one.kill() if one.poll() is None else None
                one.wait()
        if any(one.returncode for one in running):
            _raise(room, running)


def _start(room: Path, number: int, processes: int) -> "subprocess.Popen[bytes]":
    path = os.pathsep.join([str(SOURCES), *filter(None, [os.environ.get("PYTHONPATH")])])
    place = {"RANK": str(number), "LOCAL_RANK": str(number), "WORLD_SIZE": str(processes)}
    place |= {"LOCAL_WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    threads = {"OMP_NUM_THREADS": str(max(1, usable_cpus() // processes)), "PYTHONPATH": path}
    command = [
        sys.executable,
        "-m",
        "bitferry.pipeline.training.processes",
        str(room),
        "quiet" * progress.console.quiet,
    ]
    with (room / f"{NOISE}-{number}").open("wb") as noise:
        talk = None if number == 0 else noise  # the first one's bar and lines are the training's
        return subprocess.Popen(command, stdout=noise, stderr=talk, env=os.environ | place | threads)


def _raise(room: Path, running: "list[subprocess.Popen[bytes]]") -> None:
    """Raise what the process that failed first raised, or say how it ended."""
    told = [room / FAULT, *sorted(room.glob(f"{NOISE}-*"))]
    if told[0].exists():
        fault = json.loads(told[0].read_text())
        raise getattr(errors, fault["kind"])(fault["text"])
    number, code = next((n, one.returncode) for n, one in enumerate(running) if one.returncode)
    how = f"was ended by signal {-code}" if code < 0 else f"ended with exit code {code}"
    lines = (room / f"{NOISE}-{number}").read_text(errors="replace").strip().splitlines()
    last = f": {lines[-1]}" if lines else ""
    raise StageFailed(f"process {number} of {len(running)} of the training {how}{last}")


def _leave_with(parent: int) -> None:
    """End with the process that started this one, also where that was killed."""
    while os.getppid() == parent:
        time.sleep(POLL_SECONDS)
    os._exit(1)


def main(room: Path, quiet: bool) -> None:
    """Be one of the processes."""
    threading.Thread(target=_leave_with, args=(os.getppid(),), daemon=True).start()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all of them; the first process ends the others
    first, processes = os.environ["RANK"] == "0", int(os.environ["WORLD_SIZE"])
    progress.console.quiet = quiet or not first
    job = unpack((room / JOB).read_bytes())
    try:
        with machine.accelerator(job.precision, processes, room / MEETING) as accelerator:
            Course(job, accelerator).run()
    except Exception as error:  # noqa: BLE001 - whatever it is, the process that started this one raises it
        kind = type(error).__name__ if isinstance(error, BitferryError) else StageFailed.__name__
        text = str(error) if isinstance(error, BitferryError) else f"{type(error).__name__}: {first_line(error)}"
        beside = room / f"{FAULT}.{os.getpid()}"
        beside.write_text(json.dumps({"kind": kind, "text": text}))
        if not (room / FAULT).exists():  # what the others then say of the one that left them is no news
            beside.replace(room / FAULT)
        os._exit(1)


if __name__ == "__main__":
    main(Path(sys.argv[1]), bool(sys.argv[2]))
