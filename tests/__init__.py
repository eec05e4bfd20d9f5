"""Tests; where several processes run them (`make test`), each keeps to one CPU, so that none slows the others' threads."""

import os

_worker = os.environ.get("PYTEST_XDIST_WORKER", "").removeprefix("gw")
if _worker and hasattr(os, "sched_setaffinity"):
    _cpus = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {_cpus[int(_worker) % len(_cpus)]})
