"""OpenVINO, driven line by line; runs in an environment that has openvino, and nothing of ours but this package.

The decoder is written in OpenVINO's operators in the form that its plugin for CPUs fuses: root mean square norms,
rotations, attention with the keys and values as the request's own state, weights of 8 bits that are read as they are.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import openvino as ov
from openvino import Node
from openvino import opset13 as op

from bench.peers.process import serve
from bench.peers.timed import Timed

TYPES = {"float32": "f32", "bfloat16": "bf16", "float16": "f16", "int8": "i8", "w8a8": "i8"}
"""Our precisions and OpenVINO's element types; i8 has a scale a row, as our int8."""
ARITHMETIC = {"float32": "f32", "bfloat16": "bf16", "float16": "f16", "int8": "f32", "w8a8": "f32"}
"""Precision of activations that is asked for; beside int8 weights products round them to 8 bits, its default."""
CACHES = {"float32": "f32", "bfloat16": "bf16", "float16": "f16", "int8": "f16", "w8a8": "f16"}


def constant(value: object, kind: str = "f32") -> Node:
    return op.constant(np.asarray(value), dtype=getattr(ov.Type, kind))


class Decoder:
    """The graph of a Qwen2 decoder over the tensors of a folder; `nbytes` are those that a token needs."""

    def __init__(self, folder: Path, weights: str) -> None:
        self.folder, self.kind, self.nbytes = folder, TYPES[weights], 0
        self.config = json.loads((folder / "config.json").read_text())

    def build(self) -> ov.Model:
        """Return a model of (ids [1, T], positions [T], row [1] = 0) → logits [vocab] of the last token.

        row: which row of the caches goes on; without it, and of a known length, the plugin takes them for no caches.
        """
        config, sinks = self.config, []
        ids = op.parameter([1, -1], ov.Type.i64, name="ids")
        positions = op.parameter([-1], ov.Type.i64, name="positions")
        row = op.parameter([-1], ov.Type.i32, name="row")
        table, scale = self._stored("token_embd.weight")
        x = op.convert(op.gather(table, ids, constant(0, "i64")), "f32")
        if scale is not None:
            x = op.multiply(x, op.gather(constant(scale), ids, constant(0, "i64")))
        size = config["hidden_size"] // config["num_attention_heads"]
        frequencies = config["rope_theta"] ** (-np.arange(0, size, 2) / size)
        angles = op.multiply(op.unsqueeze(op.convert(positions, "f32"), constant(1, "i64")), constant(frequencies))
        angles = op.unsqueeze(op.concat([angles, angles], -1), constant([0, 1], "i64"))
        turn = op.cos(angles), op.sin(angles)
        last = op.gather(positions, constant(-1, "i64"), constant(0, "i64"))
        seen = op.range(constant(0, "i64"), op.add(last, constant(1, "i64")), constant(1, "i64"), "i64")
        mask = op.less_equal(seen, op.unsqueeze(positions, constant(1, "i64")))
        bias = op.select(op.unsqueeze(mask, constant([0, 1], "i64")), constant(0.0), constant(np.finfo("f4").min))
        for index in range(config["num_hidden_layers"]):
            layer = f"blk.{index}."
            normal = self._norm(x, f"{layer}attn_norm")
            q, k, v = (self._heads(self._linear(normal, f"{layer}attn_{name}"), size) for name in "qkv")
            keys, values = self._turned(k, turn, size), v
            cached = []
            for name, new in (("keys", keys), ("values", values)):
                whole, sink = self._cached(f"{layer}{name}", new, row, size)
                cached.append(whole)
                sinks.append(sink)
            repeated = [self._repeated(one, size) for one in cached]
            seen_by = op.scaled_dot_product_attention(self._turned(q, turn, size), *repeated, bias)
            flat = op.reshape(op.transpose(seen_by, constant([0, 2, 1, 3], "i64")), constant([0, 0, -1], "i64"), True)
            x = op.add(x, self._linear(flat, f"{layer}attn_output"))
            normal = self._norm(x, f"{layer}ffn_norm")
            gated = op.multiply(
                op.swish(self._linear(normal, f"{layer}ffn_gate")), self._linear(normal, f"{layer}ffn_up")
            )
            x = op.add(x, self._linear(gated, f"{layer}ffn_down"))
        one = op.gather(x, constant([-1], "i64"), constant(1, "i64"))
        tied = not (self.folder / "output.weight.npy").exists()
        logits = self._linear(self._norm(one, "output_norm"), "token_embd" if tied else "output")
        return ov.Model([op.result(op.reshape(logits, constant([-1], "i64"), False))], sinks, [ids, positions, row])

    def _array(self, name: str) -> np.ndarray:
        return np.load(self.folder / f"{name}.npy")

    def _stored(self, name: str) -> tuple[Node, np.ndarray | None]:
        """Return a matrix as it is kept and, of 8 bits, its rows' scales [N, 1]."""
        matrix, scale = self._array(name), None
        if self.kind == "i8":
            scale = np.abs(matrix).max(1, keepdims=True) / 127
            matrix = np.rint(matrix / scale).astype(np.int8)
        return constant(matrix, self.kind), scale

    def _linear(self, x: Node, name: str) -> Node:
        matrix, scale = self._stored(f"{name}.weight")
        self.nbytes += matrix.data.nbytes + (0 if scale is None else scale.nbytes)
        weight = op.convert(matrix, "f32") if self.kind != "f32" else matrix
        if scale is not None:
            weight = op.multiply(weight, constant(scale))
        y = op.matmul(x, weight, False, True)
        biased = (self.folder / f"{name}.bias.npy").exists()
        return op.add(y, constant(self._array(f"{name}.bias"))) if biased else y

    def _norm(self, x: Node, name: str) -> Node:
        mean = op.reduce_mean(op.power(x, constant(2.0)), constant([-1], "i64"), True)
        root = op.sqrt(op.add(mean, constant(self.config["rms_norm_eps"])))
        normal = op.multiply(x, op.divide(constant(1.0), root))
        return op.multiply(normal, constant(self._array(f"{name}.weight")))

    def _heads(self, x: Node, size: int) -> Node:
        return op.transpose(op.reshape(x, constant([0, 0, -1, size], "i64"), True), constant([0, 2, 1, 3], "i64"))

    def _turned(self, x: Node, turn: tuple[Node, Node], size: int) -> Node:
        low, high = (
            op.slice(x, constant([begin], "i64"), constant([end], "i64"), constant([1], "i64"), constant([3], "i64"))
            for begin, end in ((0, size // 2), (size // 2, np.iinfo(np.int64).max))
        )
        turned = op.concat([op.multiply(high, constant(-1.0)), low], -1)
        return op.add(op.multiply(x, turn[0]), op.multiply(turned, turn[1]))

    def _cached(self, name: str, new: Node, row: Node, size: int) -> tuple[Node, Node]:
        """Return the keys or values [1, heads, tokens, size] with the new ones behind, and what keeps them."""
        heads = self.config["num_key_value_heads"]
        none = op.broadcast(constant(0.0), constant([1, heads, 0, size], "i64"))
        before = op.read_value(none, name, ov.Type.f32, ov.PartialShape([-1, heads, -1, size]))
        whole = op.concat([op.gather(before, row, constant(0, "i64")), new], 2)
        return whole, op.assign(whole, name)

    def _repeated(self, whole: Node, size: int) -> Node:
        heads, groups = self.config["num_attention_heads"], self.config["num_key_value_heads"]
        # A product with ones, which the plugin sees through, as it does not through a broadcast of a known shape.
        ones = constant(np.ones((1, 1, heads // groups, 1, 1)))
        apart = op.multiply(op.unsqueeze(whole, constant(2, "i64")), ones)
        return op.reshape(apart, constant([0, heads, -1, size], "i64"), True)


class OpenVino(Timed):
    """One model and one conversation at a time."""

    def __init__(self) -> None:
        self.free()

    def versions(self) -> dict[str, str]:
        return {"openvino": ov.__version__}

    def load(self, folder: str, weights: str, tokens: int, threads: int) -> tuple[str, int]:
        """Load the tensors of `folder`; returns the format of the weights and the bytes that a token needs."""
        self.free()
        if weights not in TYPES:
            raise ValueError(f"no graph over {weights} weights is built here")
        decoder = Decoder(Path(folder), weights)
        properties = {
            "INFERENCE_PRECISION_HINT": ARITHMETIC[weights],
            "KV_CACHE_PRECISION": CACHES[weights],
            "INFERENCE_NUM_THREADS": threads,
            "PERFORMANCE_HINT": "LATENCY",
        }
        self.request = ov.Core().compile_model(decoder.build(), "CPU", properties).create_infer_request()
        return TYPES[weights], decoder.nbytes

    def free(self) -> None:
        self.request, self.states, self.length, self.last = None, {}, 0, np.empty(0)

    def logits(self, path: str) -> None:
        """Save those of the last token, float32 [vocab]."""
        np.save(path, self.last)

    def _forget(self, behind: int) -> None:
        for state in self.request.query_state():
            state.reset() if behind == 0 else setattr(state, "state", self._first(state, behind))
        self.length = behind

    @staticmethod
    def _first(state: ov.VariableState, tokens: int) -> ov.Tensor:
        return ov.Tensor(np.ascontiguousarray(state.state.data[:, :, :tokens]))

    def _step(self, ids: Sequence[int]) -> np.ndarray:
        positions = np.arange(self.length, self.length + len(ids))
        found = self.request.infer({"ids": np.array([ids]), "positions": positions, "row": np.zeros(1, np.int32)})
        self.length += len(ids)
        self.last = found[0]
        return self.last


if __name__ == "__main__":
    serve(OpenVino())
