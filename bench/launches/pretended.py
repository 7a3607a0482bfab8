"""A pretended GPU: tensors without values on "cuda:0", and a record of what the host asks of that device.

Everything that computes is seen by dispatch and done by torch's fake tensors, so that shapes are true and nothing has a
value or takes memory. A Triton kernel counts where it is launched, an operator of this project by running its Triton
implementation, an operator of torch by `bench.launches.kernels`. Streams, events and graphs of `torch.cuda` are stood
in for; a graph's replay counts what its capture recorded. What the host reads is a plain number made up here.
"""

from __future__ import annotations

import importlib
import inspect
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch._subclasses import fake_tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from bench.launches import kernels
from vpt_kernels.backends import _TRITON_MODULES
from vpt_model.network import capture

DEVICE = torch.device("cuda:0")
REPLAY = "replay"
READ = 7
"""The integer that every read from the device gives: as a token, an ordinary letter."""
aten = torch.ops.aten


@dataclass
class Tally:
    """What the host asked of the device, in all so far.

    launches: kernels by name, each once per launch. read: bytes that they read, of the caches what they hold. replays:
    of graphs, whose kernels are among the launches. waits: calls at which the host may wait for the device. uploads,
    downloads: copies from and to pinned memory that are not waited for. pageable: copies from memory that is not
    pinned, for which the driver may wait. blocking copies to the host are waits. order: what the host launched, one
    after the other: kernels that are in no graph, copies, and replays.
    """

    launches: Counter[str] = field(default_factory=Counter)
    read: float = 0.0
    replays: int = 0
    waits: Counter[str] = field(default_factory=Counter)
    uploads: int = 0
    downloads: int = 0
    pageable: int = 0
    order: list[str] = field(default_factory=list)

    @property
    def kernels(self) -> int:
        return self.launches.total()

    @property
    def between(self) -> int:
        """Launches between the first and the last replay that are none themselves."""
        places = [place for place, launched in enumerate(self.order) if launched == REPLAY]
        return places[-1] - places[0] + 1 - len(places) if places else 0

    def copy(self) -> Tally:
        own = {"launches": Counter(self.launches), "waits": Counter(self.waits), "order": [*self.order]}
        return Tally(**{**vars(self), **own})

    def __sub__(self, earlier: Tally) -> Tally:
        numbers = {name: value - getattr(earlier, name) for name, value in vars(self).items() if name != "order"}
        return Tally(**numbers, order=self.order[len(earlier.order) :])


@dataclass
class _Launch:
    name: str
    read: float
    cached: float  # bytes of the buffers of caches among its inputs, of which only what they hold is read


class _Stream:
    gpu: Pretended
    device, cuda_stream = DEVICE, 0

    def __init__(self, *others: object, **more: object) -> None: ...

    def synchronize(self) -> None:
        self.gpu.tally.waits["stream.synchronize"] += 1

    def wait_stream(self, other: object) -> None: ...

    def wait_event(self, event: object) -> None: ...

    def record_event(self, event: Any = None) -> Any:
        return event or torch.cuda.Event()


class _Event:
    gpu: Pretended

    def __init__(self, *others: object, **more: object) -> None: ...

    def record(self, stream: object = None) -> None: ...

    def wait(self, stream: object = None) -> None: ...

    def query(self) -> bool:
        return True

    def elapsed_time(self, other: object) -> float:
        return 1.0

    def synchronize(self) -> None:
        self.gpu.tally.waits["event.synchronize"] += 1


class _Graph:
    """A graph; with `run`, one that is recorded when it is first replayed, and that fills `outputs` then."""

    gpu: Pretended

    def __init__(self, run: Callable[[], Sequence[Tensor]] | None = None, **more: object) -> None:
        self.run, self.launches, self.outputs = run, [], []

    def replay(self) -> None:
        if self.run is not None and not self.outputs:
            with self.gpu.captured(self):
                self.outputs += self.run()
        self.gpu.tally.replays += 1
        self.gpu.tally.order.append(REPLAY)
        for launch in self.launches:
            self.gpu.add(launch)


class Pretended:
    """A context in which "cuda:0" is there; `tally` says what happened. `share`: of the caches' slots that are used."""

    def __init__(self, capability: tuple[int, int] = (9, 0)) -> None:
        self.capability, self.tally = capability, Tally()
        self.share: Callable[[], float] = lambda: 1.0
        self._fake = FakeTensorMode(allow_non_fake_inputs=True)
        self._pinned: dict[int, Tensor] = {}  # by address, which must not be given out again
        self._caches: set[int] = set()
        self._capturing: list[_Launch] | None = None
        self._stack = ExitStack()

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        return torch.empty(tuple(shape), dtype=dtype, device=DEVICE)

    def owns(self, tensor: Tensor) -> bool:
        return isinstance(tensor, FakeTensor) and tensor.fake_mode is self._fake

    def watch_cache(self, *buffers: Tensor) -> None:
        """Note that of these buffers a kernel reads only the share that is used."""
        self._caches |= {buffer.untyped_storage()._cdata for buffer in buffers}

    def __enter__(self) -> Pretended:
        torch._C._ensureCUDADeviceGuardSet()
        self._stack.callback(torch._C._set_only_lift_cpu_tensors, torch._C._only_lift_cpu_tensors())
        torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(…, device=…) makes a tensor on the host, then copies
        self._stack.enter_context(torch.inference_mode())
        for patch in self._patches():
            self._stack.enter_context(patch)
        self._stack.enter_context(_Dispatch(self))
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.close()

    def launch(self, name: str, read: float, cached: float = 0.0) -> None:
        one = _Launch(name, read, cached)
        if self._capturing is not None:
            self._capturing.append(one)
        else:
            self.tally.order.append(name)
            self.add(one)

    def add(self, one: _Launch) -> None:
        self.tally.launches[one.name] += 1
        self.tally.read += one.read + one.cached * self.share()

    def weigh(self, tensors: Sequence[Tensor]) -> tuple[float, float]:
        """Return the bytes of tensors that a kernel reads, and apart those of the caches' buffers."""
        read = cached = 0.0
        for tensor in tensors:
            if tensor.untyped_storage()._cdata in self._caches:
                cached += kernels.nbytes(tensor)
            else:
                read += kernels.nbytes(tensor)
        return read, cached

    def pin(self, tensor: Tensor) -> Tensor:
        self._pinned[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    def is_pinned(self, tensor: Tensor) -> bool:
        return tensor.untyped_storage().data_ptr() in self._pinned

    def copied(self, source: Tensor, target: torch.device, non_blocking: bool, host: Tensor | None = None) -> None:
        """Count a copy between the host and the device; `host`: the host's memory at a copy to it, if there before."""
        self.tally.order.append("copy")
        if source.device.type == "cpu":
            self.tally.uploads += 1
            if not self.is_pinned(source):
                self.tally.pageable += 1
            elif not non_blocking:
                self.tally.waits["blocking copy"] += 1
        else:
            self.tally.downloads += 1
            if not (non_blocking and host is not None and self.is_pinned(host)):
                self.tally.waits["read"] += 1

    @contextmanager
    def captured(self, graph: _Graph, *others: object, **more: object) -> Iterator[None]:
        before, self._capturing = self.tally.copy(), graph.launches
        try:
            yield
        finally:
            self._capturing = None
        if self.tally.waits != before.waits or self.tally.pageable != before.pageable:
            raise RuntimeError(f"the host waited while a graph was captured: {self.tally.waits - before.waits}")

    def _patches(self) -> list[Any]:
        from triton.runtime.interpreter import GridExecutor
        from triton.runtime.jit import JITFunction

        gpu = self
        classes = {
            name: type(name, (stand_in,), {"gpu": self})
            for name, stand_in in (("Stream", _Stream), ("Event", _Event), ("CUDAGraph", _Graph))
        }
        stream = classes["Stream"]()

        @contextmanager
        def inside(*_: object) -> Iterator[None]:
            yield

        def compiled(function: Any, *arguments: Any, grid: Any, warmup: bool, **named: Any) -> None:
            launched(function.fn, *arguments, **named)

        def interpreted(executor: Any, *arguments: Any, **named: Any) -> None:
            launched(executor.fn, *arguments, **named)

        def launched(function: Any, *arguments: Any, **named: Any) -> None:
            given = dict(zip(inspect.signature(function).parameters, arguments)) | named
            gpu.launch(function.__name__, *gpu.weigh(kernels.triton_inputs(function.__name__, given)))

        def recorded(run: Callable[[], Sequence[Tensor]], *others: object) -> tuple[_Graph, list[Tensor]]:
            """Do what `vpt_model.network.capture.record` does, but what is never replayed costs no time."""
            graph = classes["CUDAGraph"](run)
            return graph, graph.outputs

        replaced = {
            "_lazy_init": lambda: None,
            "is_available": lambda: True,
            "device_count": lambda: 1,
            "current_device": lambda: 0,
            "set_device": lambda device: None,
            "init": lambda: None,
            "get_device_capability": lambda device=None: self.capability,
            "current_stream": lambda device=None: stream,
            "default_stream": lambda device=None: stream,
            **classes,
            "stream": inside,
            "device": inside,
            "set_stream": lambda stream: None,
            "synchronize": lambda device=None: self.tally.waits.update(["synchronize"]),
            "graph": self.captured,
            "graph_pool_handle": lambda: (0, 0),
            "is_current_stream_capturing": lambda: self._capturing is not None,
        }
        return [
            mock.patch.multiple(torch.cuda, **replaced),
            # A CUDA build of torch 2.11 would ask the device that is said to be there for memory.
            mock.patch.object(fake_tensor, "init_gpu_context", lambda device: None),
            mock.patch.object(JITFunction, "run", compiled),
            mock.patch.object(GridExecutor, "__call__", interpreted),
            *(
                mock.patch.object(module, "record", recorded)
                for name, module in list(sys.modules.items())
                if name.startswith("vpt_model.") and getattr(module, "record", None) is capture.record
            ),
            *(mock.patch.object(FakeTensor, name, method) for name, method in _METHODS.items()),
            mock.patch.object(torch, "tensor", _tensor),
        ]


def _tensor(*given: Any, make: Callable[..., Tensor] = torch.tensor, pin_memory: bool = False, **more: Any) -> Tensor:
    return make(*given, **more).pin_memory() if pin_memory else make(*given, **more)


def _address(x: Tensor) -> int:
    """Return an address for a tensor without memory, far from that of every other storage."""
    return x.untyped_storage()._cdata << 16 | x.storage_offset() * x.itemsize


def _contiguous(x: Tensor, memory_format: torch.memory_format = torch.contiguous_format) -> Tensor:
    return x if x.is_contiguous(memory_format=memory_format) else aten.clone(x, memory_format=memory_format)


def _assign(x: Tensor, index: Any, value: Any) -> None:
    if any(isinstance(one, (Tensor, list)) for one in (index if isinstance(index, tuple) else (index,))):
        aten.index_put_(x, list(index) if isinstance(index, tuple) else [index], value)
        return
    view = _indexed(x, index)
    aten.copy_(view, value) if isinstance(value, Tensor) else aten.fill_(view, value)


def _indexed(x: Tensor, index: Any) -> Tensor:
    index = index if isinstance(index, tuple) else (index,)
    given = sum(one is not None and one is not Ellipsis for one in index)
    axis = 0
    gathered: dict[int, Tensor] = {}
    for one in index:
        if one is Ellipsis:
            axis += x.dim() - axis - given
        elif one is None:
            x, axis = x.unsqueeze(axis), axis + 1
        elif isinstance(one, slice):
            x, axis, given = (
                torch.ops.aten.slice.Tensor(x, axis, one.start, one.stop, one.step or 1),
                axis + 1,
                given - 1,
            )
        elif isinstance(one, int):
            x, given = x.select(axis, one), given - 1
        else:
            gathered[axis] = one if isinstance(one, Tensor) else torch.tensor(one)
            axis, given = axis + 1, given - 1
    if not gathered:
        return x
    return aten.index(x, [gathered.get(a) for a in range(max(gathered) + 1)])


_METHODS: dict[str, Callable[..., Any]] = {
    "__getitem__": _indexed,
    "__setitem__": _assign,
    "__int__": lambda x: int(aten._local_scalar_dense(x)),
    "__index__": lambda x: int(aten._local_scalar_dense(x)),
    "__float__": lambda x: float(aten._local_scalar_dense(x)),
    "__bool__": lambda x: bool(aten._local_scalar_dense(x)),
    "item": lambda x: aten._local_scalar_dense(x),
    "tolist": lambda x: x.cpu().tolist(),
    "numpy": lambda x: x.cpu().numpy(),
    "copy_": lambda x, source, non_blocking=False: aten.copy_(x, source, non_blocking),
    "contiguous": _contiguous,
    "data_ptr": _address,
}
"""torch's own ways ask for a device that is not there before they ask who takes the call."""


class _Dispatch(TorchDispatchMode):
    """Counts, and gives to fake tensors, every operator that touches the pretended device."""

    def __init__(self, gpu: Pretended) -> None:
        super().__init__()
        self.gpu = gpu

    def __torch_dispatch__(self, function: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if function is torch.ops.prim.device.default:
            return args[0].fake_device
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        target = kwargs.get("device")
        goes = target is not None and torch.device(target).type == "cuda"
        if not goes and not any(isinstance(tensor, FakeTensor) for tensor in tensors):
            return self._on_host(function, args, kwargs)
        if function.namespace == "vpt_kernels":
            return self._operator(function, args, kwargs)
        if function is aten._local_scalar_dense.default:
            self.gpu.tally.waits["read"] += 1
            return 0.0 if args[0].dtype.is_floating_point else READ
        if function is aten.is_pinned.default:
            return False
        if function in (aten._to_copy.default, aten.copy_.default):
            return self._copy(function, args, kwargs)
        composite = torch._C._dispatch_has_kernel_for_dispatch_key(function.name(), "CompositeImplicitAutograd")
        if composite and function.overloadpacket not in kernels.WHOLE:
            with self:
                result = function.decompose(*args, **kwargs)
            if result is not NotImplemented:
                return result
        for name, read in kernels.of(function, args, kwargs):
            self.gpu.launch(name, *self.gpu.weigh(read))
        return self._faked(function, args, kwargs)

    def _faked(self, function: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        def fake(x: Any) -> Any:
            return self.gpu._fake.from_tensor(x) if isinstance(x, Tensor) and not isinstance(x, FakeTensor) else x

        args, kwargs = tree_map(fake, (args, kwargs))
        with self.gpu._fake:
            return kernels.shaped(function, args, kwargs)

    def _on_host(self, function: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        if function in (aten._pin_memory.default, aten.pin_memory.default):
            return self.gpu.pin(args[0].clone())
        if function is aten.is_pinned.default:
            return self.gpu.is_pinned(args[0])
        pinned = kwargs.pop("pin_memory", None)
        result = function(*args, **kwargs)
        return self.gpu.pin(result) if pinned else result

    def _operator(self, function: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        """Return the result of an operator of this project, and count the launches of its Triton implementation."""
        name = function.overloadpacket.__name__
        module = importlib.import_module(_TRITON_MODULES[name.removesuffix("_into").rstrip("_")])
        with self:
            return getattr(module, name)(*args, **kwargs)

    def _copy(self, function: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        to_copy = function is aten._to_copy.default
        source = args[0] if to_copy else args[1]
        if to_copy:
            target, non_blocking = (
                torch.device(kwargs.get("device") or source.device),
                kwargs.get("non_blocking", False),
            )
        else:
            target, non_blocking = args[0].device, args[2] if len(args) > 2 else kwargs.get("non_blocking", False)
        if source.device.type == target.type:
            self.gpu.launch("copy", *self.gpu.weigh([source]))
            return self._faked(function, args, kwargs)
        self.gpu.copied(source, target, non_blocking, None if to_copy else args[0])
        if target.type == "cuda":
            result = self._faked(function, args, kwargs)
            return args[0] if not to_copy else result
        if to_copy:
            dtype = kwargs.get("dtype") or source.dtype
            return torch.full(source.shape, 0 if dtype.is_floating_point else READ, dtype=dtype)
        return args[0].fill_(0 if args[0].is_floating_point() else READ)
