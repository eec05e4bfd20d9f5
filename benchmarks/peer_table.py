"""What `peers.py` keeps → the tables and sentences that it prints, and that the README and docs/peers.md show."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bitferry.pipeline.statistics import ratio_interval

Row = Mapping[str, Any]
"""One way as it is kept: peer, name, runtime, and either what was found of it or `why` there is nothing."""
TITLES = {"openvino": "OpenVINO", "onnxruntime": "ONNX Runtime"}
JOBS = {"bitferry": "bitferry", "nncf": "NNCF by hand", "olive": "Olive by hand"}
KNOWN = "NNCF, mixed, full bias correction"
COLUMNS = ("runtime", "p50 ms", "time, bitferry int8 = 1", "SQNR dB", "{metric} %, float → it", "MB")


SHORT = ("model", "runtime", "peer", "time, its fastest = 1", "SQNR dB", "its best")
PEERS = {"nncf": "NNCF", "onnxruntime": "quantize_static", "pt2e": "plain PT2E", "olive": "Olive"}


def markdown(kept: Mapping[str, Any]) -> str:
    """Write everything that was kept of a recipe: its table, its sentences, and what it was measured with."""
    recipe = kept["recipe"]
    return "\n\n".join([table(recipe), "\n".join(sentences(recipe)), setting(kept)]) + "\n"


def summary(every: Sequence[Mapping[str, Any]]) -> str:
    """Write a row for each recipe, runtime and peer: int8 against the fastest and against the nearest to float."""
    lines = [list(SHORT), ["---"] * len(SHORT)]
    for recipe in [kept["recipe"] for kept in every]:
        for runtime, title in TITLES.items():
            if ours := _ours(recipe, runtime):
                for peer, own in _by_peer(recipe, runtime).items():
                    noise = (_decibels(ours), _decibels(min(own, key=_noise)))
                    lines.append([recipe["name"], title, PEERS[peer], _interval(ours, _fastest(ours, own)), *noise])
    more = [line for kept in every for line in _whole(kept["recipe"])]
    return "\n".join([*(f"| {' | '.join(cells)} |" for cells in lines), "", *more]) + "\n"


def _whole(recipe: Mapping[str, Any]) -> Iterator[str]:
    """Say what a search came to and how long whole jobs take, by the recipe's name."""
    for line in (*_auto(recipe), *_jobs(recipe["jobs"])):
        yield f"- {recipe['name']}: {line[2:]}"


def table(recipe: Mapping[str, Any]) -> str:
    """Write one recipe's table, a row for each way."""
    columns = [column.format(metric=recipe["metric"]) for column in COLUMNS]
    rows = [[row["name"], TITLES[row["runtime"]], *_cells(row, recipe)] for row in recipe["ways"]]
    lines = [[recipe["name"], *columns], ["---"] * (len(columns) + 1), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _cells(row: Row, recipe: Mapping[str, Any]) -> list[str]:
    if row["why"]:
        return ["", row["why"].replace("|", "/"), "", "", ""]
    before, after = recipe["float_percent"], row["percent"]
    ours = _ours(recipe, row["runtime"])
    return [
        f"{p50(row):.2f}",
        "1" if row is ours else _interval(row, ours) if ours else "",
        _decibels(row),
        f"{before:.2f} → {after:.2f}",
        f"{row['bytes'] / 1e6:.1f}",
    ]


def sentences(recipe: Mapping[str, Any]) -> Iterator[str]:
    """Say how bitferry compares with the best of each peer; nothing about what was not measured."""
    for runtime, title in TITLES.items():
        if ours := _ours(recipe, runtime):
            for theirs in _rivals(recipe, runtime):
                noise = f"SQNR {_decibels(ours)} against {_decibels(theirs)} dB"
                yield f"- int8 on {title} takes {_interval(ours, theirs)} of the time of {theirs['name']}; {noise}."
    yield from (*_auto(recipe), *_jobs(recipe["jobs"]))


def _auto(recipe: Mapping[str, Any]) -> Iterator[str]:
    """Say what a search came to, beside the fastest that the runtime could have run without it."""
    auto = _best(recipe, lambda row: row["peer"] == "auto", p50)
    fastest = _best(recipe, lambda row: row["runtime"] == "openvino" and row["peer"] in ("nncf", "float"), p50)
    if auto and fastest:
        among = "NNCF's int8 and OpenVINO's float" if _best(recipe, _is_nncf, p50) else "OpenVINO's float"
        taken = _interval(auto, fastest)
        yield f"- {auto['name']} takes {taken} of the time of {fastest['name']}, the fastest of {among}."


def _rivals(recipe: Mapping[str, Any], runtime: str) -> Iterator[Row]:
    """Choose of each peer's results the fastest, the nearest to float, and the one best known."""
    for own in _by_peer(recipe, runtime).values():
        chosen = [
            _fastest(_ours(recipe, runtime) or own[0], own),
            min(own, key=_noise),
            *(row for row in own if row["name"] == KNOWN),
        ]
        yield from (row for row in own if any(row is one for one in chosen))


def _fastest(ours: Row, own: Sequence[Row]) -> Row:
    """Choose the row that we look worst beside, by the very ratio that is told."""
    return max(own, key=lambda row: ratio_interval(_blocks(ours), _blocks(row))[0])


def _by_peer(recipe: Mapping[str, Any], runtime: str) -> dict[str, list[Row]]:
    there = [row for row in recipe["ways"] if row["runtime"] == runtime and not row["why"]]
    return {peer: own for peer in PEERS if (own := [row for row in there if row["peer"] == peer])}


def _jobs(jobs: Mapping[str, Any]) -> Iterator[str]:
    """Say how long the whole work takes: medians, and the ratio of each round's."""
    seconds: Mapping[str, list[float]] = jobs["seconds"]
    for peer, theirs in seconds.items():
        if peer == "bitferry":
            continue
        ours = seconds["bitferry"]
        ratios = np.array(ours) / np.array(theirs)
        spread = f" ({ratios.min():.2f} to {ratios.max():.2f} in {len(ratios)} rounds)" if len(ratios) > 1 else ""
        yield (
            f"- The whole job takes bitferry {np.median(ours):.1f} s and {JOBS[peer]} {np.median(theirs):.1f} s: "
            f"{np.median(ratios):.2f} times as long{spread}."
        )
    for peer, why in jobs["left_out"].items():
        yield f"- The whole job was not measured with {JOBS[peer]}: {why}."


def setting(kept: Mapping[str, Any]) -> str:
    """Say what it was measured with."""
    versions = ", ".join(f"{name} {number}" for name, number in sorted(kept["versions"].items()))
    isa = ", ".join(kept["isa"]) or "unknown instruction sets"
    threads = f"{kept['threads']} thread{'s'[: kept['threads'] != 1]}"
    one = kept["recipe"]
    counts = f"{one['calibration_images']:,} images for calibration, {one['images']:,} for evaluation"
    return f"Measured {kept['date']}, {threads}, batch 1 ({isa}), {counts}; {versions}."


def p50(row: Row) -> float:
    """Give the median of a call in milliseconds."""
    return float(np.median(np.array(row["microseconds"]))) / 1e3


def _noise(row: Row) -> float:
    return -np.inf if row["sqnr_db"] is None else -float(row["sqnr_db"])


def _is_nncf(row: Row) -> bool:
    return str(row["peer"]) == "nncf"


def _best(recipe: Mapping[str, Any], wanted: Callable[[Row], bool], key: Callable[[Row], float]) -> Row | None:
    found = [row for row in recipe["ways"] if not row["why"] and wanted(row)]
    return min(found, key=key, default=None)


def _ours(recipe: Mapping[str, Any], runtime: str) -> Row | None:
    return _best(recipe, lambda row: row["peer"] == "bitferry" and row["runtime"] == runtime, p50)


def _decibels(row: Row) -> str:
    return "exact" if row["sqnr_db"] is None else f"{row['sqnr_db']:.1f}"


def _interval(row: Row, other: Row) -> str:
    value, low, high = ratio_interval(_blocks(row), _blocks(other))
    return f"{value:.2f} ({low:.2f} to {high:.2f})"


def _blocks(row: Row) -> NDArray[np.float64]:
    medians: NDArray[np.float64] = np.median(np.array(row["microseconds"], dtype=np.float64), axis=1)
    return medians
