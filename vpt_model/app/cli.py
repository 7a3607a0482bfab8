"""The command line `vpt`: one function for each of its commands."""

from __future__ import annotations

import codecs
import functools
import io
import json
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from types import ModuleType
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
from vpt_model.app.demo_report import print_report
from vpt_model.app.seen import Watched, answer_as_json, sights
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
    resident_memory,
)
from vpt_model.checkpoint import Checkpoint
from vpt_model.checkpoint.convert import convert as write_converted
from vpt_model.checkpoint.hub import model_folder
from vpt_model.engine import Engine
from vpt_model.mini.evaluation import Line, plan
from vpt_model.mini.evaluation import report as evaluation
from vpt_model.mini.scenes import fingerprint, make_scene
from vpt_model.network.state import PRECISIONS
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
Weights = Annotated[
    str,
    typer.Option(
        help=f"precision in which the weights of products are kept: {', '.join(PRECISIONS)} (as stored)",
    ),
]
Json = Annotated[bool, typer.Option("--json", help="print one JSON object and nothing else")]


_SIGNS = str.maketrans("×“”…→·Δ–−", 'x"".>-d--')


def main() -> None:
    """Run the command `vpt`. What a terminal of another encoding cannot show is replaced, so that no work is lost."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            write_plainly(stream)
    app()


def write_plainly(stream: io.TextIOWrapper) -> None:
    """Let a stream that is not Unicode's have signs of ours as ASCII, which whoever reads a pipe reads alike."""
    encoding = codecs.lookup(stream.encoding).name
    if encoding.startswith("utf"):
        stream.reconfigure(errors="replace")
        return

    def encode(error: UnicodeError) -> tuple[bytes, int]:
        if not isinstance(error, UnicodeEncodeError):
            raise error
        return error.object[error.start : error.end].translate(_SIGNS).encode(encoding, "replace"), error.end

    codecs.register_error(f"vpt-{encoding}", encode)
    stream.reconfigure(encoding="ascii", errors=f"vpt-{encoding}")


def friendly(command: Callable[..., None]) -> Callable[..., None]:
    """Exit with one line on stderr and code 2 on bad input, instead of a traceback."""

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
        typer.Option(help="mini, which is trained; or random weights of shapes tiny, 2b-slice, 2b (10 GB), 7b (35 GB)"),
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
    weights: Weights = "auto",
) -> None:
    """Look twice at a picture: vpt-mini answers; this engine and the published procedure are compared.

    Exit code 1 if they disagree.
    """
    figure = _figure("--out", out)
    looks, place = look or demonstration.default_looks(preset, seed), choose_device(device)
    with progress(demonstration.activities(preset, looks), quiet=as_json) as begin:
        report = demonstration.run(
            preset,
            looks,
            image,
            max_new_tokens=tokens,
            inject=inject,
            seed=seed,
            progress=begin,
            device=place,
            weights=weights,
        )
        figure.draw(report, out)
    if as_json:
        typer.echo(json.dumps(demonstration.as_json(report) | {"picture": str(out)}))
    else:
        print_report(Console(), report, out)
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
    weights: Weights = "auto",
    draw: Annotated[
        Path | None,
        typer.Option(help="also write a picture (PNG): the boxes, what was seen, the time line", dir_okay=False),
    ] = None,
) -> None:
    """Answer a question about an image, with the second looks that the model asks for."""
    # In a locale that is not UTF-8, Python hands on the bytes that it could not decode.
    with suppress(UnicodeEncodeError):
        question = question.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
    if image is None and model != MINI:
        raise ValueError("there is no image: give --image FILE")
    figure = None if draw is None else _figure("--draw", draw)
    picture = torch.from_numpy(make_scene(seed, "test").pixels) if image is None else decode_image(image)
    begun = time.perf_counter()
    loaded, tokenizer, _ = load_model(model, choose_device(device), as_json, weights)
    seconds = time.perf_counter() - begun
    engine = Engine(loaded, tokenizer, max_looks=max(1, len(look or ())))
    console = Console(quiet=as_json)
    warm = engine.warm_up()
    if warm:
        console.print(Text(f"warmed up on {loaded.device} in {sum(warm.values()):.1f} s", style="dim"))
    engine.executor = watched = Watched(loaded, engine.executor)
    answer = follow(console, engine.stream(picture, question, looks=look, max_new_tokens=max_new_tokens))
    if figure is not None:
        shown = sights(loaded, engine.policy, picture.to(loaded.device), answer, watched.take())
        figure.draw_answer(picture.numpy(), question, answer, shown, draw)
    if as_json:
        load = {"load_seconds": seconds, "memory_bytes": resident_memory()}
        typer.echo(json.dumps(answer_as_json(answer) | {"device": str(loaded.device), "warm_up_seconds": warm} | load))
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
    kept = ", ".join(f"{name} {count / 2**30:.2f} GiB" for name, count in resident_memory().items())
    console.print(Text(f"loaded in {seconds:.1f} s; memory: {kept}", style="dim"))
    console.print(Text(answer.text, style="bold"))


@app.command()
@friendly
def chat(
    model: Annotated[str, typer.Option(help=f"{MODEL}; by default vpt-mini, which knows its own task only")] = MINI,
    image: Annotated[Path | None, typer.Option(help="an image file, shown with the first question")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="tokens per round", min=1)] = 256,
    capacity: Annotated[int, typer.Option(help="tokens that the conversation may hold", min=1)] = 8192,
    device: Device = "auto",
    weights: Weights = "auto",
) -> None:
    """Hold a conversation about pictures: further questions, pictures, looks, forks, undo. /help lists the commands."""
    if image is not None:
        decode_image(image)  # before the weights are loaded
    with suppress(ImportError):
        import readline  # noqa: F401  history and editing by the arrow keys
    loaded, tokenizer, _ = load_model(model, choose_device(device), weights=weights)
    engine = Engine(loaded, tokenizer, capacity=min(capacity, loaded.config.max_position_embeddings))
    Session(engine, Console(), None if image is None else str(image), max_new_tokens).run(input)


@app.command("app")
@friendly
def page(
    folder: Annotated[str, typer.Argument(help=f"{MODEL}; by default vpt-mini, which knows its own task only")] = MINI,
    device: Device = "auto",
    weights: Weights = "auto",
    port: Annotated[int, typer.Option(help="0 takes a free one", min=0, max=65535)] = 8765,
    host: Annotated[
        str, typer.Option(help="an address of this machine; other than by default, everybody who reaches it may ask")
    ] = "127.0.0.1",
    browser: Annotated[bool, typer.Option(help="open it, where there is a screen")] = True,
) -> None:
    """Open a page on which one sees a model look twice: pictures, questions, boxes, conversations, for several people.

    It listens on this machine alone, keeps pictures in memory only, and uses no network.
    """
    try:
        from vpt_model.app.page import command
    except ImportError as error:
        raise ValueError("the page needs Starlette and uvicorn: pip install 'vpt-kernels[app]'") from error
    command.run(folder, choose_device(device), weights, host, port, browser)


@app.command()
@friendly
def verify(
    recordings: Annotated[
        Path | None,
        typer.Option("--recordings", "--golden", help="a folder of recorded runs of the authors' model"),
    ] = None,
    model: Annotated[str | None, typer.Option(help=MODEL)] = None,
    dump: Annotated[
        Path | None,
        typer.Option(help="a .safetensors file for every tensor that --recordings computes", dir_okay=False),
    ] = None,
) -> None:
    """Repeat recorded runs and compare every number, or check a checkpoint and try it. Exit code 1 on any miss."""
    if recordings is None and model is None:
        raise ValueError("there is nothing to verify: give --recordings, --model, or both")
    if dump is not None and recordings is None:
        raise ValueError("--dump writes what --recordings computes: give --recordings too")
    if dump is not None and not dump.absolute().parent.is_dir():
        raise ValueError(f"--dump {dump}: there is no folder {dump.absolute().parent}; make it first")
    if dump is not None and dump.exists() and not dump.is_file():  # which the finished file would replace
        raise ValueError(f"--dump {dump} is a device: name a file in a folder")
    rows: list[Any] = []
    if recordings is not None:
        with progress(len(FILES), quiet=False) as begin:
            rows, computed = verify_recordings(recordings, begin)
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
    weights: Annotated[
        list[str] | None,
        typer.Option(help=f"the float32 weights kept in {', '.join(PRECISIONS[1:])}; may be repeated"),
    ] = None,
    folder: Annotated[Path | None, typer.Option(help="other weights than the shipped ones", file_okay=False)] = None,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Count how often vpt-mini is right on pictures that its training never saw, by kind of question and path.

    The first backend and dtype take every path; the others repeat the free choice and are compared token by token.
    """
    names = dtype or ([] if weights else ["float32"])
    if unknown := [name for name in names if name not in DTYPES]:
        raise ValueError(f"--dtype {unknown[0]}: it must be one of {', '.join(DTYPES)}")
    backends, place = backend or ["cpp", "reference"], choose_device(device)
    dtypes = [*(DTYPES[name] for name in names), *(weights or ())]
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
    weights: Annotated[
        str | None,
        typer.Option(
            help=f"{', '.join(PRECISIONS[1:])}: store the weights of products packed, for CPUs", show_default=False
        ),
    ] = None,
) -> None:
    """Write a checkpoint as sharded safetensors with fused weights: nothing to unpickle, and quick to load.

    TARGET appears when it is complete; an interrupted run leaves nothing that loads.
    """
    if dtype not in (None, *DTYPES):
        raise ValueError(f"--dtype {dtype}: it must be one of {', '.join(DTYPES)}")
    if weights not in (None, *PRECISIONS[1:]):
        raise ValueError(f"--weights {weights}: it must be one of {', '.join(PRECISIONS[1:])}")
    if dtype and weights:
        raise ValueError(f"--dtype {dtype} and --weights {weights}: give one of them; what is not packed stays")
    checkpoint = Checkpoint.open(model_folder(source))
    checkpoint.tokenizer()
    print_notices(checkpoint.notices)
    with byte_progress("converting") as advance:
        write_converted(checkpoint, target, DTYPES[dtype] if dtype else None, progress=advance, weights=weights)
    typer.echo(f"{target}: {parameter_counts(checkpoint.config)['total']:,} parameters")


@app.command()
def env() -> None:
    """Show what this machine has, what is missing and how to get it."""
    typer.echo(environment.report())


def _figure(option: str, path: Path) -> ModuleType:
    """Return what draws the picture that an option names. Raises ValueError where it cannot be drawn or written."""
    try:
        from vpt_model.app import figure
    except ImportError as error:
        raise ValueError("the picture needs matplotlib: pip install 'vpt-kernels[demo]'") from error
    if not path.absolute().parent.is_dir():
        raise ValueError(f"{option} {path}: there is no folder {path.absolute().parent}; make it first")
    return figure


if __name__ == "__main__":
    main()
