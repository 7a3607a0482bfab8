"""What `vpt demo` prints of its report."""

from __future__ import annotations

from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from vpt_model.app.demo import Comparison, Report, Step
from vpt_model.app.seen import STAGES
from vpt_model.config import PRESETS


def print_report(console: Console, report: Report, out: Path) -> None:
    """Print the whole comparison. out: where its picture was written."""
    console.print(
        f"\npreset [bold]{report.preset}[/], photo {report.image.width}×{report.image.height}, "
        f"question “{report.question}”, on {report.device}"
    )
    if report.warm_up:
        console.print(f"This engine was warmed up in {sum(report.warm_up.values()):.1f} s.", style="dim")
    if report.story:
        _print_story(console, report)
    else:
        console.print(
            "The weights are random, so the words of the answers mean nothing yet. "
            "What counts: both procedures choose the same tokens, and what each of them does for it."
        )
    if report.inject:
        console.print(f"[yellow]The engine's {report.inject} is corrupted on purpose: the answers must differ.[/]")
    for look in report.comparisons:
        ours, published = look.ours.second_look, look.published.second_look
        exact = look.difference <= report.limit
        console.print("\n", _table(look), sep="")
        console.print(
            f"  perception token → first answer token: {ours:,.0f} ms, published {published:,.0f} ms", end=" "
        )
        console.print(f"([bold]{look.speedup:.1f}×[/])")
        console.print(
            f"  {len(look.ours.ids)} answer tokens:",
            "[green]identical ids[/]," if look.identical else "[bold red]DIFFERENT IDS[/],",
            f"largest logit difference [{'green' if exact else 'bold red'}]{look.difference:.1e}[/]",
            f"(limit {report.limit:.0e})",
        )
    if report.overhead:
        console.print("\nThe model is so small that these times are mostly Python's: --preset 2b-slice shows the work.")
    console.print(f"\npicture: {out}")
    agreed = "[bold green]The two procedures agree.[/]"
    console.print(agreed if report.passed else "[bold red]The two procedures DISAGREE.[/]")


def _print_story(console: Console, report: Report) -> None:
    width, height = report.image.size
    edge = PRESETS[report.preset].image_resolution
    console.print(f"The model first saw {min(width, edge)}×{min(height, edge)} of {width}×{height} pixels.")
    for chapter in report.story:
        console.print(Text.assemble("\n", (chapter.question.text, "bold")))
        for moment in chapter.moments:
            line = Text.assemble((f"{moment.milliseconds:8.1f} ms  ", "dim"), moment.what)
            console.print(line, soft_wrap=True)
        for box_ in chapter.boxes:
            size = f"{box_[2] - box_[0]}×{box_[3] - box_[1]}"
            console.print(Text(f"{'':13}the box {box_}: {size} pixels of the original"))
        verdict = Text("  right", "green") if chapter.right else Text("  WRONG", "bold red")
        answer = (f"{chapter.answer.text!r}", "bold")
        console.print(Text.assemble("  answer ", answer, f", truth {chapter.question.answer!r}", verdict))
    console.print("\nThe same by the published procedure, with the second look given:")


def _table(look: Comparison) -> Table:
    table = Table(title=look.look, title_justify="left", title_style="bold", header_style="dim", box=box.SIMPLE_HEAD)
    table.add_column("stage")
    for name in ("this engine", "published procedure"):
        table.add_column("ms", justify="right")
        table.add_column(name)
    table.add_column("ratio", justify="right")
    runs = (look.ours, look.published)
    for number, title in ((1, "first look"), (2, "second look")):
        table.add_row(title, style="cyan")
        for stage in STAGES:
            steps = [next((s for s in run.steps if (s.look, s.name) == (number, stage)), None) for run in runs]
            if any(steps):
                mine, theirs = steps
                ratio = f"{theirs.milliseconds / mine.milliseconds:.1f}×" if mine and theirs else ""
                table.add_row(f"  {stage}", *(cell for step in steps for cell in _cells(step)), ratio)
        table.add_section()
    ours, published = (run.total for run in runs)
    table.add_row("total", f"{ours:,.1f}", "", f"{published:,.1f}", "", f"{published / ours:.1f}×", style="bold")
    return table


_WORDS = {
    "images": ("image", "images"),
    "ViT calls": ("ViT call", "ViT calls"),
    "patches": ("patch", "patches"),
    "LM calls": ("LM call", "LM calls"),
    "tokens": ("token", "tokens"),
    "cache copies": ("copy", "copies"),
}


def _cells(step: Step | None) -> tuple[str, str]:
    if step is None:
        return "", "–"
    counts = [
        f"{step.work[name]:,} {words[step.work[name] != 1]}" for name, words in _WORDS.items() if name in step.work
    ]
    return f"{step.milliseconds:,.1f}", ", ".join(counts)
