"""What surrounds a call changes nothing: every public callable in every state that a process can be in.

The arguments are made outside the state, the call is made inside, and its result and everything that it wrote must
have the bits of a call in no such state.
"""

from __future__ import annotations

import ast
import io
import multiprocessing
import os
import pickle
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests import calls
from tests.calls import CALLS, EXEMPT, made, public_callables, values
from tests.helpers import assert_same_bits
from vpt_kernels import dinov2_policy, sam_policy
from vpt_kernels.layers import RoiPatchEmbed
from vpt_model import Engine
from vpt_model.app.cli import write_plainly

ROOT = Path(__file__).resolve().parents[1]


@contextmanager
def setting(read: Callable[[], Any], write: Callable[[Any], None], value: Any) -> Iterator[None]:
    before = read()
    write(value)
    try:
        yield
    finally:
        write(before)


@contextmanager
def warnings_are_errors() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def default_dtype(dtype: torch.dtype) -> AbstractContextManager[None]:
    return setting(torch.get_default_dtype, torch.set_default_dtype, dtype)


STATES: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "device context": lambda: torch.device("meta"),
    "default device": lambda: setting(lambda: None, torch.set_default_device, "meta"),
    "float64 by default": lambda: default_dtype(torch.float64),
    "bfloat16 by default": lambda: default_dtype(torch.bfloat16),
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "inference mode": lambda: torch.inference_mode(),
    "no gradients": lambda: torch.no_grad(),
    "warnings are errors": warnings_are_errors,
    "numpy's warnings are errors": lambda: np.errstate(all="raise"),
    "deterministic": lambda: setting(
        torch.are_deterministic_algorithms_enabled, torch.use_deterministic_algorithms, True
    ),
    "seed": lambda: torch.random.fork_rng([]),
}
PREPARED: dict[str, list[Any]] = {}


def outcome(name: str, state: AbstractContextManager[Any] | None = None, **choice: Any) -> list[Any]:
    """The result and, after the call, the arguments, which in-place operators write to."""
    function, given = made(name)
    given |= choice
    if state is None:
        result = function(**given)
    else:
        with state:
            result = function(**given)
    written = [given[argument] for argument in given if isinstance(given[argument], Tensor)]
    return [*values(result), *values(written)]


def expected(name: str) -> list[Any]:
    if name not in PREPARED:
        PREPARED[name] = outcome(name)
    return PREPARED[name]


def assert_equal(found: list[Any], wanted: list[Any]) -> None:
    assert len(found) == len(wanted)
    for left, right in zip(found, wanted):
        if isinstance(right, Tensor):
            assert left.device == right.device
            assert_same_bits(left, right)
        else:
            assert left == right


def test_the_table_is_complete() -> None:
    missing = [name for name in public_callables() if name not in CALLS.keys() | EXEMPT.keys()]
    assert not missing and CALLS.keys() <= {*public_callables(), "QwenVLImageProcessor.__call__"}


FOREIGN = [("LiveConversation.generate", "autocast"), ("zoom", "autocast")]
"""The layers of somebody's model are what autocast is for: `test_autocast_is_the_models_own` compares with the model's
own answer in it. With autocast transformers' own static cache, which `zoom` is called with, does not work."""


@pytest.mark.parametrize("name, state", [pair for pair in product(CALLS, STATES) if pair not in FOREIGN])
def test_a_state_changes_nothing(name: str, state: str) -> None:
    wanted = expected(name)
    if state == "seed":
        torch.manual_seed(12345)
    assert_equal(outcome(name, STATES[state]()), wanted)


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("name", [name for name in CALLS if "backend" in made(name)[1] and name != "Tokenizer"])
def test_a_state_changes_nothing_of_the_reference(name: str, state: str) -> None:
    """Its plain PyTorch is what autocast and the defaults are for."""
    wanted = outcome(name, backend="reference")
    assert_equal(outcome(name, STATES[state](), backend="reference"), wanted)


FACTORIES = (
    "arange",
    "as_tensor",
    "empty",
    "empty_strided",
    "eye",
    "full",
    "linspace",
    "logspace",
    "ones",
    "rand",
    "randint",
    "randn",
    "randperm",
    "scalar_tensor",
    "tensor",
    "zeros",
)
INTEGERS = ("arange", "randint", "randperm", "full", "tensor", "as_tensor")
"""Factories whose dtype follows from their arguments; of the others it is the process's default."""


def factories() -> Iterator[tuple[str, str, set[str | None]]]:
    """Place, name and keywords of every call that makes a tensor; vLLM sets the defaults for what it loads."""
    for path in sorted(path for package in ("vpt_kernels", "vpt_model") for path in (ROOT / package).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if "vllm" not in path.parts else ():
            if isinstance(node, ast.Call) and ast.unparse(node.func) in [f"torch.{name}" for name in FACTORIES]:
                name = ast.unparse(node.func).removeprefix("torch.")
                yield f"{path.relative_to(ROOT)}:{node.lineno}", name, {keyword.arg for keyword in node.keywords}


def test_every_factory_names_its_device_and_its_float_dtype() -> None:
    made = list(factories())
    assert len(made) > 50
    assert not [f"{place} {name}" for place, name, given in made if "device" not in given]
    assert not [f"{place} {name}" for place, name, given in made if name not in INTEGERS and "dtype" not in given]


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("name", CALLS)
def test_the_number_of_threads_changes_rounding_at_most(name: str, threads: int) -> None:
    state = setting(torch.get_num_threads, torch.set_num_threads, threads)
    for left, right in zip(outcome(name, state), expected(name), strict=True):
        if isinstance(right, Tensor) and right.is_floating_point():
            torch.testing.assert_close(left, right, atol=1e-5, rtol=1e-5)
        elif isinstance(right, Tensor):
            assert torch.equal(left, right)
        else:
            assert left == right


@pytest.mark.parametrize("state", [name for name in STATES if name not in ("seed", "warnings are errors")])
def test_an_engine_made_in_a_state_answers_outside_of_it(state: str) -> None:
    wanted = expected("Engine.ask")
    with STATES[state]():
        engine = calls.engine()
    assert_equal([*values(engine.ask(**calls.question())), calls.image()], wanted)


@pytest.mark.parametrize("name", ["decode_image", "roi_patches", "Engine.ask", "Tokenizer.encode"])
def test_threads_see_each_others_state_as_little(name: str) -> None:
    """Eight at once; the process's warning filters are what they were."""
    wanted, filters, found = expected(name), list(warnings.filters), []
    runners = [threading.Thread(target=lambda: found.append(outcome(name))) for _ in range(8)]
    for runner in runners:
        runner.start()
    for runner in runners:
        runner.join()
    assert len(found) == 8 and list(warnings.filters) == filters
    for one in found:
        assert_equal(one, wanted)


def pickled() -> dict[str, Callable[[], Any]]:
    return {
        "qwen2_vl_policy": calls.policy,
        "dinov2_policy": dinov2_policy,
        "sam_policy": sam_policy,
        "plan": calls.plan,
        "embed": calls.embed,
        "projector": calls.projector,
        "processor": calls.processor,
        "tokenizer": calls.tokenizer,
        "model": calls.tiny_model,
        "layer": lambda: RoiPatchEmbed(torch.randn(4, 3, 14, 14), (0.5,) * 3, (0.5,) * 3, calls.policy()),
    }


def use(name: str, thing: Any) -> list[Any]:
    """What an object is for, in values."""
    sizes, boxes = [(40, 56)], [(0, 3, 2, 51, 38)]
    if name.endswith("policy"):
        return [*values(calls.kernels.plan_regions(sizes, boxes, thing))]
    if name == "processor":
        return [*values(thing(calls.image()))]
    if name == "tokenizer":
        return thing.encode("what? <|x_2|>")
    if name == "model":
        return [*values(Engine(thing, calls.tokenizer()).ask(**calls.question()))]
    if name == "layer":
        return [*values(thing([calls.image()], boxes))]
    return [*values(thing)]


def in_another_process(name: str, data: bytes) -> list[Any]:
    return use(name, pickle.loads(data))


@pytest.mark.parametrize("name", pickled())
def test_objects_pickle_and_give_the_same(name: str) -> None:
    thing = pickled()[name]()
    assert_equal(use(name, pickle.loads(pickle.dumps(thing))), use(name, thing))


@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_objects_reach_processes_that_share_nothing(method: str) -> None:
    things = {name: make() for name, make in pickled().items()}
    wanted = {name: use(name, thing) for name, thing in things.items()}
    with multiprocessing.get_context(method).Pool(1) as pool:
        jobs = {name: pool.apply_async(in_another_process, (name, pickle.dumps(t))) for name, t in things.items()}
        for name, job in jobs.items():
            assert_equal(job.get(timeout=300), wanted[name])


def test_an_engine_says_what_to_pickle_instead() -> None:
    with pytest.raises(TypeError, match="an Engine holds caches.* make one in each process"):
        pickle.dumps(calls.engine())


@pytest.mark.parametrize(
    ("encoding", "arguments"),
    [
        ("ascii", ["verify", "--model", "random:tiny"]),
        ("latin-1", ["demo", "--tokens", "2", "--out", "{folder}/demo.png"]),
        ("ascii", ["ask", "--question", "What is in the middle? größer ☃"]),
        ("ascii", ["env"]),
    ],
    ids=lambda value: value if isinstance(value, str) else value[0],
)
def test_a_terminal_of_another_encoding_loses_no_work(encoding: str, arguments: list[str], tmp_path: Path) -> None:
    arguments = [argument.format(folder=tmp_path) for argument in arguments]
    command = [sys.executable, "-c", "from vpt_model.app.cli import main; main()", *arguments]
    locale = {"PYTHONIOENCODING": encoding, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    environment = {**os.environ, "PYTHONPATH": str(ROOT)} | locale
    done = subprocess.run(command, capture_output=True, text=True, encoding=encoding, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.isascii() or "ö" in done.stdout


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252", "gbk", "shift_jis", "utf-8", "utf-16"])
def test_answers_keep_their_letters_and_signs_become_ascii(encoding: str) -> None:
    """Whoever reads a pipe may take it for UTF-8; what the encoding has of an answer arrives."""
    text, signs = "größer 中文", "298×298 “?” …"
    stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    write_plainly(stream)
    print(text, signs, file=stream, flush=True)
    unicode = encoding.startswith("utf")
    shown = f"{text} {signs}" if unicode else f'{text} 298x298 "?" .'.encode(encoding, "replace").decode(encoding)
    assert stream.buffer.getvalue().decode(encoding) == f"{shown}\n"
