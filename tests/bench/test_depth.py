"""The stages of a look at true depth, on a model without any."""

from __future__ import annotations

import re

import pytest
import typer
from typer.testing import CliRunner

from bench import depth

LOOKS = ("clip", "region:x2,y1,x5,y4")


def table(*arguments: str) -> dict[str, dict[str, str]]:
    app = typer.Typer()
    app.command()(depth.main)
    result = CliRunner().invoke(app, [*arguments, "--preset", "tiny", "--rounds", "1"], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    rows = [line.strip("| ").split(" | ") for line in result.stdout.splitlines() if line.startswith("| ")]
    assert tuple(rows[0]) == depth.COLUMNS
    return {row[2]: dict(zip(rows[0], row, strict=True)) for row in rows[1:]}


@pytest.mark.parametrize("engine", depth.ENGINES)
def test_every_stage_of_an_engine_is_timed(engine: str) -> None:
    found = table(engine, "--weights", "float32", *(part for look in LOOKS for part in ("--look", look)))
    for look in LOOKS:
        row = found[look]
        timed = {stage for stage in depth.STAGES if row[stage].strip()}
        assert timed == set(depth.STAGES) - {"second tower" if look == "clip" else "perceive"}
        parts = sum(float(row[stage] or 0) for stage in ("second tower", "perceive", "append"))
        assert float(row["look, token to token"]) == pytest.approx(parts, abs=2e-3)
        assert re.fullmatch(r"\d+\.\d\d / \d+\.\d\d", row["GiB now / at most"])
    # The same weights, picture and look: the same token.
    assert [found[look]["first token"] for look in LOOKS] == ["12", "12"]


def test_re_encoders_are_ours_alone() -> None:
    assert table("ours", "--look", "dino", "--look", "sam").keys() == {"dino", "sam"}
    with pytest.raises(typer.BadParameter, match="has no such re-encoder"):
        depth.transformers(depth.PRESETS["tiny"], "float32")("sam")
