"""What commands print: progress, events, notices, tables; and the device and model that a command line names."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from vpt_model import mini
from vpt_model.checkpoint import Checkpoint, random_state, random_weights
from vpt_model.checkpoint.draw import Drawn
from vpt_model.checkpoint.hub import model_folder
from vpt_model.checkpoint.load import moved
from vpt_model.config import PRESETS, ModelConfig
from vpt_model.engine.events import Answer, Done, Event, Look, Reencode, Region, Token
from vpt_model.network.model import Model
from vpt_model.published.verify import TOLERANCE, Row, parameter_counts
from vpt_model.text.tokens import Tokenizer

CPU = torch.device("cpu")
RANDOM, MINI = "random:", "mini"
_TABLE_WIDTH = 160


def choose_device(name: str) -> torch.device:
    """Return the device that --device names, and make it the current one. auto: a GPU where torch sees one, else the
    CPU.

    Raises ValueError for another name, and for a GPU that torch does not see.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if not re.fullmatch(r"cpu|cuda(:[0-9]{1,3})?", name):
        raise ValueError(f"--device {name}: it must be auto, cpu, cuda or cuda:N, where N is the number of a GPU")
    if name == "cpu":
        return torch.device("cpu")
    count, index = torch.cuda.device_count() if torch.cuda.is_available() else 0, int(name[5:] or 0)
    if index >= count:
        seen = f"GPUs 0 to {count - 1} only" if count else "no GPU"
        raise ValueError(f"--device {name}: torch {torch.__version__} sees {seen}; give --device cpu, or see `vpt env`")
    torch.cuda.set_device(index)
    return torch.device("cuda", index)


def load_model(
    model: str, device: torch.device = CPU, quiet: bool = False, weights: str = "auto"
) -> tuple[Model, Tokenizer, Checkpoint | None]:
    """Return the model that a folder, a hub name, `mini` or `random:PRESET` names; progress and notices go to stderr.

    The tokenizer is checked before any weight is read. Random weights are bfloat16 and have no checkpoint; vpt-mini is
    float32. weights: as of `Model.from_state`.
    """
    if model.startswith(RANDOM):
        preset = model.removeprefix(RANDOM)
        if preset not in PRESETS:
            raise ValueError(f"model {model}: random weights have the shapes of one of {', '.join(PRESETS)}")
        config = PRESETS[preset]
        tokenizer = Tokenizer.byte_level(config.vocab_size, config.kind)
        if device == CPU:
            drawn = random_weights(config, dtype=torch.bfloat16)
            return _build(config, drawn, weights, quiet, f"drawing random weights for {preset}"), tokenizer, None
        with byte_progress(f"drawing random weights for {preset}", quiet) as advance:
            state = random_state(config, dtype=torch.bfloat16, progress=advance)
        return _build(config, moved(state, device), weights, quiet), tokenizer, None
    checkpoint = Checkpoint.open(mini.FOLDER if model == MINI else model_folder(model))
    tokenizer = checkpoint.tokenizer()
    if not quiet:
        print_notices(checkpoint.notices)
    with byte_progress("loading", quiet) as advance:
        state = checkpoint.load(torch.float32 if model == MINI else None, progress=advance)
    return _build(checkpoint.config, moved(state, device), weights, quiet), tokenizer, checkpoint


def _build(
    config: ModelConfig,
    state: dict[str, torch.Tensor] | dict[str, Drawn],
    weights: str,
    quiet: bool,
    activity: str = "building",
) -> Model:
    """Return the model of a state dict that nobody else has."""
    total = sum(tensor.nbytes for tensor in state.values())
    with byte_progress(activity, quiet) as advance:
        return Model.from_state(config, state, weights, consume=True, progress=lambda done: advance(done, total))


def resident_memory() -> dict[str, int]:
    """Return the bytes of this process that are in memory "now" and were "at most"; nothing where Linux is not there to
    say it.
    """
    with suppress(OSError):
        said = Path("/proc/self/status").read_text()
        found = {name: re.search(rf"{key}:\s*(\d+) kB", said) for name, key in (("now", "VmRSS"), ("at most", "VmHWM"))}
        return {name: int(match[1]) * 1024 for name, match in found.items() if match}
    return {}


@contextmanager
def _bar(console: Console, *columns: ProgressColumn) -> Iterator[Progress]:
    """Show a bar where the console is a terminal; nothing at all is printed elsewhere."""
    bar = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
    # Older versions of rich end a disabled bar with an empty line.
    with bar if console.is_terminal else nullcontext():
        yield bar


@contextmanager
def progress(steps: int, quiet: bool) -> Iterator[Callable[[str], None]]:
    """Show a bar on stderr, or a line for each activity where stderr is no terminal."""
    console, begun = Console(stderr=True, quiet=quiet), 0
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with _bar(console, *columns) as bar:
        task = bar.add_task("", total=steps)

        def begin(activity: str) -> None:
            nonlocal begun
            bar.update(task, description=activity, completed=begun)
            begun += 1
            if not console.is_terminal:
                console.print(f"{activity} …", style="dim")

        yield begin


@contextmanager
def question_progress(total: int, quiet: bool) -> Iterator[Callable[[int], None]]:
    """Show a bar of questions on stderr where it is a terminal."""
    console = Console(stderr=True, quiet=quiet)
    columns = (TextColumn("questions"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with _bar(console, *columns) as bar:
        task = bar.add_task("", total=total)
        yield lambda done: bar.advance(task, done)


@contextmanager
def byte_progress(activity: str, quiet: bool = False) -> Iterator[Callable[[int, int], None]]:
    """Show a bar of bytes on stderr or, where stderr is no terminal, a line for every tenth of a large amount."""
    console, printed = Console(stderr=True, quiet=quiet), 0
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeElapsedColumn())
    with _bar(console, *columns) as bar:
        task = bar.add_task(activity, total=None)

        def advance(done: int, total: int) -> None:
            nonlocal printed
            bar.update(task, completed=done, total=total)
            if not console.is_terminal and total >= 1e9 and done * 10 // total > printed:
                printed = done * 10 // total
                console.print(f"{activity}: {done / 1e9:.1f} of {total / 1e9:.1f} GB", style="dim")

        yield advance


def follow(console: Console, events: Iterator[Event]) -> Answer:
    """Print what happens and when, one line for each event and each run of tokens; the final answer."""
    start, said = time.perf_counter(), ""

    def line(kind: str, text: str) -> None:
        console.print(Text.assemble((f"{time.perf_counter() - start:8.2f} s  ", "dim"), (f"{kind:<10}", "cyan"), text))

    for event in events:
        if isinstance(event, Token):
            said += event.text
            continue
        if said:
            line("said", said)
            said = ""
        if isinstance(event, Region):
            line("region", ", ".join(map(str, event.boxes)))
        elif isinstance(event, Reencode):
            line("re-encode", event.kind)
        elif isinstance(event, Look):
            line("looked", f"{event.tokens} visual tokens, {event.appended} tokens appended")
        elif isinstance(event, Done):
            line("done", event.answer.finish_reason)
            return event.answer
    raise RuntimeError("the stream ended without an answer")


def print_notices(notices: Sequence[str]) -> None:
    console = Console(stderr=True, soft_wrap=True)
    for notice in notices:
        console.print(Text(f"note: {notice}", style="yellow"))


def print_rows(rows: Sequence[Row]) -> None:
    """Print the table of `verify_recordings`, and how many cases agree."""
    table = Table("file", "case", "max |Δlogit|", "ids equal", "control Δ", "other Δ", "", header_style="dim")
    for row in rows:
        logits, control, other = (
            "" if value is None else f"{value:.1e}" for value in (row.logits, row.control, row.other)
        )
        verdict = Text("ok", "green") if row.passed else Text(f"MISS {row.reason}".strip(), "bold red")
        if not row.in_scope:
            verdict = Text(f"out of scope: {row.reason}", "dim")
        ids = {None: "", True: "yes", False: "NO"}[row.ids]
        table.add_row(row.file, row.case or f"({len(row.names)} tensors)", logits, ids, control, other, verdict)
    print_table(table)
    checked = [row for row in rows if row.in_scope]
    agreed = sum(row.passed for row in checked)
    Console().print(f"{agreed} of {len(checked)} cases agree within {TOLERANCE:.0e}")


def print_table(table: Table) -> None:
    """Print a table; where nobody sees the terminal's edge, nothing is cut, because a cell would be lost."""
    console = Console()
    (console if console.is_terminal else Console(width=_TABLE_WIDTH)).print(table)


def print_model(model: Model, tokenizer: Tokenizer, checkpoint: Checkpoint | None) -> None:
    """Print what was loaded: parameters of each part, how the head is tied, token ids."""
    config, ids, console = model.config, tokenizer.ids, Console(soft_wrap=True)
    source = "random weights" if checkpoint is None else f"every expected tensor and no other: {checkpoint.folder}"
    console.print(Text(f"{source}, kind {config.kind}, {str(model.dtype).removeprefix('torch.')}"))
    for part, count in parameter_counts(config).items():
        console.print(f"  {part:<16}{count:>16,}")
    if checkpoint is not None:
        console.print(f"embedding and head: {checkpoint.head}")
    names = ("im_start", "im_end", "vision_start", "vision_end", "image_pad", "endoftext", "newline")
    perception = ("kind_pad", "region_start", "region_end", "x", "y", "action_start", "action", "action_end")
    for name in (*names, *perception):
        value = getattr(ids, name)
        shown = "none" if value in (None, ()) else f"{value[0]} … {value[-1]}" if isinstance(value, tuple) else value
        console.print(f"  {name:<16}{shown:>16}")
    console.print(f"  {'stop':<16}{', '.join(map(str, sorted(ids.stop)))}")
    if tokenizer.is_aligned_only:
        console.print("aligned only: this intermediate stage has no region and action tokens and never looks again")
