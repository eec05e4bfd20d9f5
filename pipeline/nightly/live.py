"""temporary."""

from contextlib import contextmanager

from pipeline import progress


@contextmanager
def shown(tasks):
    def show(done):
        progress.stage("done", f"{done.task.name} {done.error or ''} {done.seconds:.1f}s")

    yield show
