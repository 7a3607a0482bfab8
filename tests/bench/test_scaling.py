"""Series of rows: where a call stops being fixed cost, where alternatives cross, and the pictures drawn from them."""

from __future__ import annotations

import pytest

from bench import charts, scaling
from bench.cases import Sweep, sweep
from bench.workloads import APPEND, CHAT_TURNS, CONTROL, ENGINE, LIVE_TURNS, PATCHES, ROI, Append

ENVIRONMENT = {"cpu": "a processor", "threads": 2, "torch": "2.13", "date": "2026-01-01"}


def _row(size: int, ours: float, theirs: float, **more) -> dict:
    shape = f"{size} tokens"
    return {
        "name": f"op | {shape} | float32",
        "op": "op",
        "shape": shape,
        "ours_ms": ours,
        "alternatives": {
            "eager": {"ms": theirs, "ratio": theirs / ours, "low": 1, "high": 9, "noisy": False},
            "copy of the same bytes": {"ms": 0.1},
            "a peer": {"absent": "not installed"},
        },
        "sweep": {"axis": "tokens", "at": size, "series": "op, float32"},
    } | more


def _result(*rows: dict) -> dict:
    return {"rows": list(rows), "environment": ENVIRONMENT}


def test_a_series_is_sorted_and_read():
    # Ours: 1 ms, then a millisecond per token; theirs: 16 µs + 2 ms per token / 8.
    result = _result(_row(64, 8, 16), _row(1, 1, 0.25), _row(4, 1.5, 0.75), _row(16, 2, 4))
    (one,) = scaling.series(result)
    assert one.sizes == [1, 4, 16, 64] and list(one.alternatives) == ["eager"]
    assert one.doubles_at == 16
    assert one.grows_by == pytest.approx(1)
    assert one.break_even("eager") == "faster from 8"  # the ratio goes from 1/2 at 4 to 2 at 16
    assert "n^1.00" in scaling.markdown(result) and "eager: faster from 8" in scaling.markdown(result)


def test_series_without_a_crossing_or_from_zero():
    result = _result(_row(0, 1, 2), _row(16, 1.5, 3), _row(64, 1.9, 4))
    (one,) = scaling.series(result)
    assert one.break_even("eager") == "faster at every size" and one.doubles_at is None


def test_wrong_rows_and_short_series_are_left_out():
    rows = [_row(1, 1, 2), _row(2, 1, 2), _row(4, 1, 2) | {"wrong": "by 3"}]
    assert scaling.series(_result(*rows)) == []


def test_every_sweep_has_a_series():
    """At least three sizes, all different, and nothing else in it."""
    groups: dict[tuple[str, str], list[int]] = {}
    rows = [("roi", w) for w in (*ROI, *PATCHES)] + [("control", w) for w in CONTROL]
    rows += [("append", w) for w in APPEND] + [("engine", w) for w in ENGINE["cpu"] if hasattr(w, "sweep")]
    rows += [(w.op, w) for w in (*CHAT_TURNS, *LIVE_TURNS)]
    for op, workload in rows:
        found = sweep(op, workload)
        if found:
            groups.setdefault((found.series, found.axis), []).append(found.at)
    assert {axis for _, axis in groups} == {"regions", "pixels", "images", "tokens", "history", "batch", "behind"}
    for key, sizes in groups.items():
        assert len(sizes) >= 3 and len(set(sizes)) == len(sizes), key
    one = sweep("append", Append(54, "2b", "float32", sweep="tokens"))
    assert one == Sweep("tokens", 54, "append, lm 2b, dtype float32, page_size 0, in_place False")


def test_names_of_rows_are_unique():
    for group in (ROI, PATCHES, CONTROL, APPEND):
        names = [(w.shape, w.dtype, getattr(w, "new_geometry", True)) for w in group]
        assert len(names) == len(set(names))
    assert len({w.shape for w in ENGINE["cpu"]}) == len(ENGINE["cpu"])


def test_pictures(tmp_path):
    timeline = {
        "ours": {"crop+embed": 3.0, "ViT": 20.0, "append": 10.0, "rest": 1.0},
        "published procedure": {"crop+embed": 9.0, "ViT": 40.0, "append": 99.0, "rest": 3.0},
    }
    published = {"published procedure": {"ms": 2, "ratio": 2.5, "low": 2, "high": 3, "noisy": False}}
    rows = [
        _row(
            size,
            size + 1,
            2 * size + 2,
            timeline=timeline,
            sweep={"axis": "history", "at": size, "series": "op"},
            alternatives=published,
            op="second look",
        )
        for size in (0, 4, 16)
    ]
    rows.append(_row(0, 1, 2, op="live turn", timeline={"ours": {"attention": 1.0}}))  # not from a perception token on
    assert charts.timeline(_result(*rows), tmp_path / "t.svg") and charts.scaling(_result(*rows), tmp_path / "s.svg")
    assert (tmp_path / "t.svg").read_text().count("34 ms") == 1  # once: the row without history
    assert not charts.timeline(_result(), tmp_path / "n.svg") and not charts.scaling(_result(), tmp_path / "n.svg")
    rows[0]["timeline"]["ours"]["mystery"] = 1.0
    with pytest.raises(ValueError, match="mystery"):
        charts.timeline(_result(*rows), tmp_path / "t.svg")
