"""The command line: `vpt demo`, `vpt ask`, `vpt eval-mini`, `vpt verify`, `vpt convert`, `vpt env`."""

from __future__ import annotations

import functools
import io
import json
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from vpt_kernels import BackendUnavailable, decode_image
from vpt_kernels import env as environment
from vpt_model import mini
from vpt_model.app import demo as demonstration
from vpt_model.app.chat import Session
from vpt_model.app.demo import STAGES, Comparison, Report, Step
from vpt_model.app.terminal import (
    MINI,
    byte_progress,
    choose_device,
    follow,
    load_model,
    print_model,
    print_notices,
    print_rows,
    print_table,
    progress,
    question_progress,
)
from vpt_model.checkpoint import Checkpoint
from vpt_model.checkpoint.convert import convert as write_converted
from vpt_model.checkpoint.hub import model_folder
from vpt_model.config import PRESETS
from vpt_model.engine import Engine
from vpt_model.engine.events import Answer
from vpt_model.mini.evaluation import Line, plan
from vpt_model.mini.evaluation import report as evaluation
from vpt_model.mini.scenes import fingerprint, make_scene
from vpt_model.published.verify import (
    FILES,
    SAMPLE_QUESTION,
    parameter_counts,
    sample_picture,
    save_tensors,
    verify_recordings,
)

app = typer.Typer(
    help="A vision-language model that looks twice.", no_args_is_help=True, add_completion=False, rich_markup_mode=None
)

LOOK = 'a forced second look: "region:x2,y1,x5,y4", "clip", "dino" or "sam"; may be repeated'
SEED = 3
"""The picture of `vpt demo` and `vpt ask` where no other is chosen."""
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
MODEL = (
    "a checkpoint folder (config.json, weights, tokenizer.json), a model on the hub (owner/name@revision), or "
    "random:PRESET for random bfloat16 weights"
)
Looks = Annotated[list[str] | None, typer.Option("--look", help=LOOK, show_default=False)]
Device = Annotated[str, typer.Option(help="auto (a GPU where torch sees one), cpu, cuda or cuda:N")]
Json = Annotated[bool, typer.Option("--json", help="print one JSON object and nothing else")]


def main() -> None:
    """The command `vpt`: what a terminal of another encoding cannot show is replaced, so that no work is lost."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    app()


def friendly(command: Callable[..., None]) -> Callable[..., None]:
    """Bad input ends with one line on stderr and exit code 2 instead of a traceback."""

    @functools.wraps(command)
    def run(*arguments: Any, **options: Any) -> None:
        try:
            command(*arguments, **options)
        except (ValueError, TypeError, BackendUnavailable) as error:
            message = Text(f"error: {' '.join(str(error).split())}", style="bold red")
            Console(stderr=True, soft_wrap=True).print(message)
            raise typer.Exit(2) from error

    return run


@app.command()
@friendly
def demo(
    preset: Annotated[
        str,
        typer.Option(help="mini, which is trained; or random weights of shapes tiny, 2b-slice, 2b (13 GB), 7b (51 GB)"),
    ] = demonstration.TRAINED,
    look: Looks = None,
    out: Annotated[Path, typer.Option(help="the picture to write", dir_okay=False)] = Path("vpt-demo.png"),
    as_json: Json = False,
    inject: Annotated[
        str | None, typer.Option(help="corrupt one step on purpose (control, position or slot): the command must fail")
    ] = None,
    tokens: Annotated[int, typer.Option(help="tokens of each answer", min=1)] = 12,
    image: Annotated[
        Path | None, typer.Option(help="a photo for random weights; by default the Hubble deep field")
    ] = None,
    seed: Annotated[int, typer.Option(help="which picture of its test split vpt-mini is shown", min=0)] = SEED,
    device: Device = "auto",
) -> None:
    """Look twice at a picture: vpt-mini answers; this engine and the published procedure are compared.

    Exit code 1 if they disagree.
    """
    try:
        from vpt_model.app import figure
    except ImportError as error:
        raise ValueError("the picture needs matplotlib: pip install 'vpt-kernels[demo]'") from error
    if not out.absolute().parent.is_dir():
        raise ValueError(f"--out {out}: there is no folder {out.absolute().parent}; make it first")
    looks, place = look or demonstration.default_looks(preset, seed), choose_device(device)
    with progress(demonstration.activities(preset, looks), quiet=as_json) as begin:
        report = demonstration.run(
            preset, looks, image, max_new_tokens=tokens, inject=inject, seed=seed, progress=begin, device=place
        )
        figure.draw(report, out)
    if as_json:
        typer.echo(json.dumps(demonstration.as_json(report) | {"picture": str(out)}))
    else:
        _print_report(Console(), report, out)
    if not report.passed:
        raise typer.Exit(1)


@app.command()
@friendly
def ask(
    question: Annotated[str, typer.Option(help="what to ask about the image")],
    model: Annotated[str, typer.Option(help=f"{MODEL}; by default vpt-mini, which knows its own task only")] = MINI,
    image: Annotated[
        Path | None, typer.Option(help="an image file; vpt-mini can do without: the demo's picture")
    ] = None,
    look: Looks = None,
    as_json: Json = False,
    max_new_tokens: Annotated[int, typer.Option(help="tokens per round", min=1)] = 64,
    seed: Annotated[int, typer.Option(help="without --image: which picture of vpt-mini's test split", min=0)] = SEED,
    device: Device = "auto",
) -> None:
    """Answer a question about an image, with the second looks that the model asks for."""
    # In a locale that is not UTF-8, Python hands on the bytes that it could not decode.
    with suppress(UnicodeEncodeError):
        question = question.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
    if image is None and model != MINI:
        raise ValueError("there is no image: give --image FILE")
    picture = make_scene(seed, "test").pixels if image is None else decode_image(image)
    loaded, tokenizer, _ = load_model(model, choose_device(device), quiet=as_json)
    engine = Engine(loaded, tokenizer, max_looks=max(1, len(look or ())))
    console = Console(quiet=as_json)
    warm = engine.warm_up()
    if warm:
        console.print(Text(f"warmed up on {loaded.device} in {sum(warm.values()):.1f} s", style="dim"))
    answer = follow(console, engine.stream(picture, question, looks=look, max_new_tokens=max_new_tokens))
    if as_json:
        typer.echo(json.dumps(_answer_as_json(answer) | {"device": str(loaded.device), "warm_up_seconds": warm}))
        return
    for notice in answer.notices:
        console.print(Text(f"note: {notice}", style="yellow"))
    table = Table("stage", "ms", "work", box=None, header_style="dim")
    for stage in answer.timings:
        table.add_row(
            stage.name,
            f"{stage.milliseconds:,.1f}",
            ", ".join(f"{count:,} {name.replace('_', ' ')}" for name, count in stage.work.items()),
        )
    table.columns[1].justify = "right"
    console.print(table)
    console.print(Text(answer.text, style="bold"))


@app.command()
@friendly
def chat(
    model: Annotated[str, typer.Option(help=f"{MODEL}; by default vpt-mini, which knows its own task only")] = MINI,
    image: Annotated[Path | None, typer.Option(help="an image file, shown with the first question")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="tokens per round", min=1)] = 256,
    capacity: Annotated[int, typer.Option(help="tokens that the conversation may hold", min=1)] = 8192,
    device: Device = "auto",
) -> None:
    """Talk with a model about pictures: further questions, pictures, looks, forks, undo. /help lists the commands."""
    if image is not None:
        decode_image(image)  # before the weights are loaded
    with suppress(ImportError):
        import readline  # noqa: F401  history and editing by the arrow keys
    loaded, tokenizer, _ = load_model(model, choose_device(device))
    engine = Engine(loaded, tokenizer, capacity=min(capacity, loaded.config.max_position_embeddings))
    Session(engine, Console(), None if image is None else str(image), max_new_tokens).run(input)


@app.command()
@friendly
def verify(
    golden: Annotated[Path | None, typer.Option(help="a folder of recorded runs of the authors' model")] = None,
    model: Annotated[str | None, typer.Option(help=MODEL)] = None,
    dump: Annotated[
        Path | None, typer.Option(help="with --golden: a .safetensors file for every computed tensor", dir_okay=False)
    ] = None,
) -> None:
    """Repeat recorded runs and compare every number, or check a checkpoint and try it. Exit code 1 on any miss."""
    if golden is None and model is None:
        raise ValueError("there is nothing to verify: give --golden, --model, or both")
    if dump is not None and golden is None:
        raise ValueError("--dump writes what --golden computes: give --golden too")
    if dump is not None and not dump.absolute().parent.is_dir():
        raise ValueError(f"--dump {dump}: there is no folder {dump.absolute().parent}; make it first")
    rows: list[Any] = []
    if golden is not None:
        with progress(len(FILES), quiet=False) as begin:
            rows, computed = verify_recordings(golden, begin)
        print_rows(rows)
        if dump is not None:
            save_tensors(dump, computed)
    if model is not None:
        loaded, tokenizer, checkpoint = load_model(model)
        print_model(loaded, tokenizer, checkpoint)
        engine = Engine(loaded, tokenizer, max_looks=0)
        answer = engine.ask(sample_picture(), SAMPLE_QUESTION, max_new_tokens=16)
        console = Console(soft_wrap=True)
        console.print(Text(f"a red disc on white, “{SAMPLE_QUESTION}”: {answer.text!r}"))
        console.print(f"  ids {answer.ids}")
    if not all(row.passed for row in rows if row.in_scope):
        raise typer.Exit(1)


@app.command("eval-mini")
@friendly
def eval_mini(
    count: Annotated[int, typer.Option(help="questions of each kind", min=1)] = 1000,
    backend: Annotated[
        list[str] | None, typer.Option(help="operators' implementation; may be repeated; by default cpp and reference")
    ] = None,
    dtype: Annotated[
        list[str] | None, typer.Option(help="bfloat16, float16 or float32; may be repeated; by default float32")
    ] = None,
    folder: Annotated[Path | None, typer.Option(help="other weights than the shipped ones", file_okay=False)] = None,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """How often vpt-mini is right on pictures that its training never saw, by kind of question and path.

    The first backend and dtype take every path; the others repeat the free choice and are compared token by token.
    """
    names = dtype or ["float32"]
    if unknown := [name for name in names if name not in DTYPES]:
        raise ValueError(f"--dtype {unknown[0]}: it must be one of {', '.join(DTYPES)}")
    backends, dtypes, place = backend or ["cpp", "reference"], [DTYPES[name] for name in names], choose_device(device)
    columns = ("backend", "dtype", "question", "path", "control state")
    table = Table(*columns, box=box.SIMPLE_HEAD, header_style="dim")
    for column in ("right", "right path", "same tokens"):
        table.add_column(column, justify="right")
    lines, total = [], len(plan(backends, dtypes)) * count
    with question_progress(total, quiet=as_json) as advance:
        for line in evaluation(backends, dtypes, count, folder or mini.FOLDER, advance, place):
            lines.append(line)
            table.add_row(*_percentages(line))
    if as_json:
        typer.echo(json.dumps([asdict(line) for line in lines]))
        return
    print_table(table)
    typer.echo(f"{count} questions each; pictures of generator {fingerprint()[:16]}")


def _percentages(line: Line) -> list[str]:
    shares = (line.score.right, line.score.right_path, line.agreement)
    shown = ["" if share is None else f"{share:.2%}" for share in shares]
    return [line.backend, line.dtype, line.kind, line.path, line.control, *shown]


@app.command()
@friendly
def convert(
    source: Annotated[str, typer.Argument(help="a checkpoint folder, or a model on the hub (owner/name@revision)")],
    target: Annotated[Path, typer.Argument(help="the new folder")],
    dtype: Annotated[
        str | None, typer.Option(help="bfloat16, float16 or float32; by default as stored", show_default=False)
    ] = None,
) -> None:
    """Write a checkpoint as sharded safetensors with fused weights: nothing to unpickle, and quick to load.

    TARGET appears when it is complete; an interrupted run leaves nothing that loads.
    """
    if dtype not in (None, *DTYPES):
        raise ValueError(f"--dtype {dtype}: it must be one of {', '.join(DTYPES)}")
    checkpoint = Checkpoint.open(model_folder(source))
    checkpoint.tokenizer()
    print_notices(checkpoint.notices)
    with byte_progress("converting") as advance:
        write_converted(checkpoint, target, DTYPES[dtype] if dtype else None, progress=advance)
    typer.echo(f"{target}: {parameter_counts(checkpoint.config)['total']:,} parameters")


@app.command()
def env() -> None:
    """What this machine has, what is missing and how to get it."""
    typer.echo(environment.report())


def _print_report(console: Console, report: Report, out: Path) -> None:
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


def _answer_as_json(answer: Answer) -> dict[str, Any]:
    return {
        "text": answer.text,
        "ids": answer.ids,
        "first_text": answer.first_text,
        "finish_reason": answer.finish_reason,
        "notices": answer.notices,
        "looks": [
            {"kind": look.kind, "boxes": look.boxes, "tokens": look.tokens, "appended": look.appended}
            for look in answer.looks
        ],
        "stages": [
            {"stage": stage.name, "milliseconds": stage.milliseconds, "work": stage.work} for stage in answer.timings
        ],
    }


if __name__ == "__main__":
    main()
