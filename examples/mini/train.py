"""Train vpt-mini from nothing: `python -m examples.mini.train --out DIR`.

One process draws scenes while this one learns from them. Every five minutes, and at the end, DIR holds a checkpoint
from which the same command goes on, the record `log.jsonl`, its plot `curves.png`, and `model/`: what `vpt_model`
loads. The budget is computing time per thread, so that a busy or paused machine does not shorten the training.
"""

from __future__ import annotations

import json
import multiprocessing as mp
import os
import queue
import time
from collections import defaultdict, deque
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from examples.mini.conversations import CONFIG, EXPERIMENTS, batch
from examples.mini.export import export
from examples.mini.learner import Learner
from examples.mini.plots import draw_curves

SAVE_SECONDS, LOG_STEPS = 300, 50
WARMUP_STEPS, DECAY, LAST_RATE = 100, 0.5, 0.01


def schedule(step: int, progress: float) -> float:
    """Share of the learning rate: a short warm-up, constant, and over the last half of the budget down in a line."""
    decay = min(1.0, (1 - progress) / DECAY)
    return min(1.0, (step + 1) / WARMUP_STEPS) * max(decay, LAST_RATE)


def draw_batches(out: Any, stage: Any, first: int, scenes: int, control: str | None) -> None:
    """Fill the queue with the batches of steps `first`, `first` + 1, …; runs in a process of its own."""
    torch.set_num_threads(1)
    parent, step = os.getppid(), first
    while os.getppid() == parent:
        name = stage.value.decode()
        made = batch(range(step * scenes, (step + 1) * scenes), name, control)
        while os.getppid() == parent:
            try:
                out.put((step, name, made), timeout=5)
                break
            except queue.Full:
                continue
        step += 1


def train(
    out: Annotated[Path, typer.Option(help="folder of the checkpoint, the record and the weights")],
    minutes: Annotated[float, typer.Option(help="computing time, per thread")] = 21,
    threads: Annotated[int, typer.Option(help="threads of the learning process")] = max(1, (os.cpu_count() or 2) - 1),
    scenes: Annotated[int, typer.Option(help="scenes per step, about five conversations each")] = 16,
    rate: Annotated[float, typer.Option(help="learning rate")] = 2e-3,
    parts: Annotated[float, typer.Option(help="share of the budget for reading and pointing apart")] = 0.3,
    seed: int = 0,
    device: Annotated[str, typer.Option(help="cpu or cuda")] = "cpu",
    control: Annotated[
        str | None, typer.Option(help="a control experiment instead: first-look (nothing else is seen) or crop (read)")
    ] = None,
) -> None:
    """Train, or go on where the checkpoint in OUT stopped."""
    if control not in (None, *EXPERIMENTS):
        raise typer.BadParameter(f"--control {control}: it must be one of {', '.join(EXPERIMENTS)}")
    out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(threads)
    learner = Learner(CONFIG, seed, rate, device, low=True)
    step, spent, checkpoint = 0, 0.0, out / "checkpoint.pt"
    if checkpoint.exists():
        step, spent = learner.load(checkpoint)
    budget, begun = minutes * 60, time.process_time()
    context = mp.get_context("spawn")
    batches, stage = context.Queue(6), context.Array("c", b"parts")
    recent: dict[str, deque] = defaultdict(lambda: deque(maxlen=400))
    losses, saved, wall = deque(maxlen=LOG_STEPS), time.monotonic(), time.time()
    stage.value = b"whole" if spent / budget >= parts else b"parts"
    options = (batches, stage, step, scenes, control)
    worker = context.Process(target=draw_batches, args=options, daemon=True)
    worker.start()
    console = Console()
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with (out / "log.jsonl").open("a") as log, Progress(*columns, console=console) as bar:
        task = bar.add_task("", total=budget)
        while True:
            elapsed = spent + (time.process_time() - begun) / threads
            progress = min(elapsed / budget, 1.0)
            if progress >= parts:
                stage.value = b"whole"
            done = progress >= 1
            if done or time.monotonic() - saved > SAVE_SECONDS:
                learner.save(checkpoint, step, elapsed)
                export(learner.state, out / "model")
                draw_curves(out)
                saved = time.monotonic()
            if done:
                break
            step, name, made = batches.get()
            loss, right = learner.step(made, schedule(step, progress))
            step += 1
            losses.append(loss)
            for kind, answers in right.items():
                recent[kind] += answers
            if step % LOG_STEPS == 0:
                accuracy = {kind: round(float(np.mean(values)), 4) for kind, values in sorted(recent.items())}
                line = {
                    "step": step,
                    "minutes": elapsed / 60,
                    "wall": time.time() - wall,
                    "stage": name,
                    "loss": float(np.mean(losses)),
                    "accuracy": accuracy,
                }
                log.write(json.dumps(line) + "\n")
                log.flush()
                recent.clear()
                shown = " ".join(f"{kind} {value:.2f}" for kind, value in accuracy.items())
                if not console.is_terminal:
                    when = f"{step} {elapsed / 60:.1f} min"
                    console.print(f"{when} {name} loss {line['loss']:.3f} {shown}", soft_wrap=True)
                bar.update(task, completed=elapsed, description=f"{name} loss {line['loss']:.3f} {shown}")
    worker.terminate()


if __name__ == "__main__":
    typer.run(train)
