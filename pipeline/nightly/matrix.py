"""Every recipe × target × precision in one night: planned, built, measured, kept, judged and told."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path

from bitferry import targets
from bitferry.device.errors import BitferryError, InputError, TargetUnavailable
from bitferry.pipeline import interrupt, progress
from bitferry.pipeline.cache import locked
from bitferry.pipeline.measure.latency import Effort
from bitferry.pipeline.nightly import engine, inputs, live, mlflow_log, perform, regressions, reports
from bitferry.pipeline.nightly.graph import Done
from bitferry.pipeline.nightly.history import History
from bitferry.pipeline.nightly.night import Cell, Finding, Inputs, Night, Result
from bitferry.pipeline.nightly.parcel import pack
from bitferry.pipeline.nightly.plan import Planned, cells, graph, kind_for
from bitferry.pipeline.nightly.store import Store
from bitferry.pipeline.nightly.work import Made, Order
from bitferry.pipeline.recipe import Recipe

HISTORY = "history.sqlite"
STAMP = "%Y-%m-%dT%H:%M:%SZ"
RESUMED = timedelta(hours=20)
"""How old an unfinished night may be that is gone on with."""
AFTER_STOP = "what runs is stopped, what is done is kept; the next run goes on from there"


@dataclass(frozen=True)
class Asked:
    """What a command line asks of a night."""

    recipes: tuple[Path, ...]
    targets: str | None
    precisions: tuple[str, ...]
    out: Path
    build: Path
    ray: str | None = None
    store: str | None = None
    effort: Effort = "default"
    minutes: float | None = None
    max_age_days: float = 7.0
    """After which an unchanged cell is measured again; 0 measures every cell."""
    anew: bool = False
    """Begin a night even where one is unfinished."""
    trust: bool = False
    mlflow: str | None = None
    keep_days: float = 90.0
    """How long answers and timed calls stay in the history, and what nothing uses in the store; 0 keeps all."""


def matrix(asked: Asked) -> Night:
    """Run a night; give it whole, or unfinished where Ctrl-C stopped it: the next run goes on with it.

    What ends is kept at once, so a kill loses only what was running.
    """
    asked = _checked(asked)
    asked.out.mkdir(parents=True, exist_ok=True)
    with locked(asked.out / ".lock", "matrix"), History(asked.out / HISTORY) as history:
        start = datetime.now(UTC)
        with ExitStack() as stack, interrupt.until_stopped(partial(progress.stage, "matrix"), AFTER_STOP) as stopped:
            cluster = stack.enter_context(engine.started(asked.ray)) if asked.ray else None
            planned, failed = plan(asked, history, cluster.kinds if cluster else [perform.probe().kind])
            night = _begin(history, start, anew=asked.anew)
            history.write(night, *failed)
            todo = _reuse(planned, history, night, asked.max_age_days)
            if todo:
                cluster = cluster or stack.enter_context(engine.started())
                _run(todo, cluster, history, night, asked.out, stopped)
        if stopped():
            return history.night(night)
        history.finish(night, judge(history, night), (datetime.now(UTC) - start).total_seconds())
        done = history.night(night)
        reports.publish(history, done, asked.out)
        _forget(asked, history, start)
    if asked.mlflow:
        _log(asked.mlflow, done)
    return done


def _forget(asked: Asked, history: History, now: datetime) -> None:
    """Drop what is older than is to be kept; what the history is asked about later, figures and verdicts, stays."""
    if not asked.keep_days:
        return
    before = (now - timedelta(days=asked.keep_days)).strftime(STAMP)
    if count := history.forget(before):
        progress.stage("matrix", f"the answers and timed calls of {count} results before {before} are forgotten")
    if asked.store and (freed := Store(asked.store).prune(asked.keep_days)):
        progress.stage("matrix", f"{freed / 1e6:,.0f} MB that nothing used for {asked.keep_days:g} days left the store")


def _checked(asked: Asked) -> Asked:
    """Refuse what cannot be meant; a store that is a folder is meant from here."""
    if asked.store and not asked.ray:
        raise InputError("--store is for nodes that share no disk; without --ray everything is on this machine")
    if asked.store and "://" not in asked.store and "::" not in asked.store:
        return replace(asked, store=str(Path(asked.store).expanduser().resolve()))
    return asked


def _log(url: str, night: Night) -> None:
    """Log the night; a server that is not there is told, and changes nothing else."""
    try:
        mlflow_log.log(url, night)
    except BitferryError as error:
        progress.stage("mlflow", f"the night was not logged: {error}")


def plan(asked: Asked, history: History, kinds: Sequence[str]) -> tuple[list[Planned], list[Result]]:
    """Find every cell with all that its result depends on; and those that cannot be tried, as failed.

    A cell of the last night whose target is no longer ready is one of these. Raises InputError when no cell is left.
    """
    found: list[Planned] = []
    failed: list[Result] = []
    parcels: dict[Path, tuple[str | None, str]] = {}
    for path, recipe, cell in cells(asked.recipes, asked.targets, asked.precisions):
        try:
            if path not in parcels:
                parcels[path] = pack(recipe, path, Store(asked.store)) if asked.store else (None, str(path))
            found.append(_planned(asked, history, kinds, (path, recipe, cell), parcels[path]))
        except InputError as error:
            progress.stage("failed", f"{cell.name}: {error}")
            failed.append(_untried(cell, str(error)))
    if not found:
        raise (
            InputError(failed[0].error or "")
            if failed
            else InputError("no cell: none of the targets runs any of the precisions asked for")
        )
    return found, [*failed, *_vanished(asked, history, {one.cell for one in found} | {one.cell for one in failed})]


def _planned(
    asked: Asked, history: History, kinds: Sequence[str], of: tuple[Path, Recipe, Cell], parcel: tuple[str | None, str]
) -> Planned:
    path, recipe, cell = of
    order = Order(
        recipe=parcel[1], target=cell.target, precision=cell.precision, build=str(asked.build.resolve()),
        effort=asked.effort, minutes=asked.minutes, trust=asked.trust, store=asked.store, parcel=parcel[0],
    )  # fmt: skip
    last = _latest(history, cell)
    kind = kind_for(recipe, cell.target, kinds, last.kind if last else None)
    made_of = inputs.inputs(recipe, path, cell, inputs.here())
    key = inputs.key(cell, made_of, kind, effort=asked.effort, minutes=asked.minutes)
    return Planned(cell, recipe, order, made_of, kind, key)


def _vanished(asked: Asked, history: History, known: set[Cell]) -> Iterator[Result]:
    """Give the last night's cells of these recipes whose target cannot be loaded tonight: an upgrade broke it."""
    nights = history.nights(1, finished=True)
    recipes = {cell.recipe for cell in known}
    points = [point for point in history.points() if nights and point.night == nights[0]]
    for cell in sorted({point.cell for point in points} - known):
        if asked.targets == "all" and cell.recipe in recipes and cell.precision in asked.precisions:
            try:
                target = targets.get(cell.target)
                target.environment(options=target.Options())
            except (TargetUnavailable, InputError) as error:
                yield _untried(cell, str(error))


def _untried(cell: Cell, error: str) -> Result:
    facts = inputs.here()
    made_of = Inputs({}, {}, None, inputs.code(), inputs.commit(), inputs.installed(), facts)
    return Result(cell, "failed", "", made_of, "", 0.0, 0, error=error, error_kind="ours")


def judge(history: History, night: str) -> tuple[Finding, ...]:
    """Compare each of the night's results with its reference and its past."""
    found: list[Finding] = []
    for result in history.results(night):
        cell = result.cell
        past = [point for point in history.points(cell) if point.night < night]
        accepted = history.reference(cell)
        reference = _reference(history, cell, accepted) if accepted and accepted < night else None
        found += regressions.findings(night, result, reference, past, partial(_inputs, history, cell))
    return tuple(found)


def _reference(history: History, cell: Cell, night: str) -> tuple[str, Result] | None:
    try:
        result = history.result(night, cell)
    except InputError as error:
        progress.stage("matrix", f"{cell.name} is compared with nothing: {error}; `bitferry accept` a newer night")
        return None
    return (night, result) if result else None


def _inputs(history: History, cell: Cell, night: str) -> Inputs | None:
    return history.inputs(night, cell)


def _begin(history: History, now: datetime, *, anew: bool) -> str:
    """Go on with the last night where it is unfinished and not old, or begin one."""
    last = history.unfinished()
    if last and not anew and now - datetime.strptime(last, STAMP).replace(tzinfo=UTC) < RESUMED:
        progress.stage("matrix", f"goes on with the night {last}, which was stopped")
        return last
    night = now.strftime(STAMP)
    history.begin(night)
    return night


def _reuse(planned: Sequence[Planned], history: History, night: str, max_age_days: float) -> list[Planned]:
    """Write those results for tonight that stand; give what is to be measured."""
    tonight = [point for point in history.points() if point.night == night and point.outcome != "failed"]
    keys = {point.cell: point.key for point in tonight}
    done = [one for one in planned if keys.get(one.cell) == one.key]
    rest = [one for one in planned if one not in done]
    standing = {one.cell: found for one in rest if (found := _standing(history, one, max_age_days, night))}
    history.write(night, *standing.values())
    told = f"{len(planned)} cells: {len(done)} done before, " if done else f"{len(planned)} cells: "
    progress.stage("matrix", f"{told}{len(standing)} reused, {len(rest) - len(standing)} to measure")
    return [one for one in rest if one.cell not in standing]


def _standing(history: History, planned: Planned, max_age_days: float, night: str) -> Result | None:
    """Give the cell's last result as tonight's, where nothing that it depends on changed and it is not too old."""
    last = _latest(history, planned.cell, night)
    before = [point for point in history.points(planned.cell, last=2) if point.night < night]
    if before and before[-1].outcome == "failed":
        return None
    if last is None or last.key != planned.key or last.measured_at is None:
        return None
    age = datetime.now(UTC) - datetime.fromisoformat(last.measured_at)
    old = age > timedelta(days=max_age_days)
    return None if old else replace(last, status="reused", seconds=0.0, attempts=0)


def _latest(history: History, cell: Cell, before: str | None = None) -> Result | None:
    """Give the cell's last result; None where there is none that this bitferry still reads."""
    try:
        found = history.latest(cell, before=before)
    except InputError as error:
        progress.stage("matrix", f"{cell.name} is measured anew: {error}")
        return None
    return found[1] if found else None


def _run(
    todo: Sequence[Planned],
    cluster: engine.Cluster,
    history: History,
    night: str,
    out: Path,
    stopped: Callable[[], bool],
) -> None:
    """Make and measure, and keep each result as it comes."""
    whole = graph(todo)
    with live.shown(whole) as show:
        for one, end, seconds in _ends(todo, cluster.execute(whole, stopped=stopped, begun=show.begun), show):
            if not (stopped() and end.error):  # what was stopped did not fail
                history.write(night, _result(one, end, seconds, reports.folder(out), night))


def _ends(
    todo: Sequence[Planned], ends: Iterator[Done], show: Callable[[Done], None]
) -> Iterator[tuple[Planned, Done, float]]:
    """Give each cell as its measurement ends or cannot be, with the seconds spent on it alone."""
    by_key, seconds = {one.key: one for one in todo}, dict.fromkeys((one.cell.name for one in todo), 0.0)
    for end in ends:
        show(end)
        if len(end.task.cells) == 1:
            seconds[end.task.cells[0]] += end.seconds
        if end.task.key in by_key:
            one = by_key[end.task.key]
            yield one, end, seconds[one.cell.name]


def _result(planned: Planned, end: Done, seconds: float, folder: Path, night: str) -> Result:
    """Turn what came of a cell's last task into its result, the report kept in a folder."""
    plain = Result(planned.cell, "failed", planned.key, planned.inputs, planned.kind, seconds, end.attempts)
    if not isinstance(end.value, Made):
        reports.keep_trace(folder, planned.cell, night, end.trace)
        error = end.error or f"no verdict but {type(end.value).__name__}"
        return replace(plain, error=error, error_kind=end.cause)
    made = end.value
    reports.keep(folder, planned.cell, night, made.report)
    return replace(
        plain,
        status="measured",
        inputs=replace(planned.inputs, machine=made.machine, packages=made.packages),
        verdict=made.verdict,
        samples=made.samples,
        answers=made.answers,
        measured_at=made.verdict.measured_at,
    )
