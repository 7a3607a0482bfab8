"""llama.cpp, driven line by line; runs in an environment that has llama-cpp-python and gguf, and nothing of ours but
this package.
"""

from __future__ import annotations

import ctypes
import json
from collections.abc import Sequence
from pathlib import Path

import gguf
import llama_cpp
import numpy as np

from bench.peers.process import serve
from bench.peers.timed import Timed

FORMATS = {"float32": "F32", "bfloat16": "BF16", "float16": "F16", "int8": "Q8_0", "w8a8": "Q8_0", "int4": "Q4_1"}
"""Our precisions and the GGUF format of as many bits; int8 has a scale a row, Q8_0 one for every 32 weights. Q4_1 has
int4's scale and minimum, and integers that are chosen before the scale is rounded."""
CACHES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16", "int8": "F16", "w8a8": "F16", "int4": "F16"}


def write(folder: str, target: str, form: str) -> int:
    """Write the tensors of `folder` (float32 .npy files under GGUF's names, and config.json) as one file.

    form: name of a `gguf.GGMLQuantizationType`, for matrices; vectors stay float32. Returns the bytes that a
    token needs: all matrices, but of an untied embedding a row.
    """
    config = json.loads((Path(folder) / "config.json").read_text())
    kind, total = gguf.GGMLQuantizationType[form], 0
    tied = not (Path(folder) / "output.weight.npy").exists()
    writer = gguf.GGUFWriter(target, "qwen2")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("none")
    for path in sorted(Path(folder).glob("*.npy")):
        tensor = np.load(path, mmap_mode="r")
        if tensor.ndim > 1:
            quantized = gguf.quants.quantize(np.asarray(tensor), kind)
            total += quantized.nbytes if tied or path.stem != "token_embd.weight" else 0
            writer.add_tensor(path.stem, quantized, raw_dtype=kind)
        else:
            writer.add_tensor(path.stem, np.asarray(tensor))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return total


class Llama(Timed):
    """One model and one conversation at a time."""

    def __init__(self) -> None:
        self.model = self.context = None

    def versions(self) -> dict[str, str]:
        return {"llama-cpp-python": llama_cpp.__version__, "system": llama_cpp.llama_print_system_info().decode()}

    def load(self, folder: str, weights: str, tokens: int, threads: int) -> tuple[str, int]:
        """Load the tensors of `folder`, which a GGUF file is written to, for a conversation of `tokens`.

        Returns the format of the weights and the bytes that a token needs. Beside a float32 cache without flash
        attention, whose kernel for the CPU rounds to half precision all the same.
        """
        self.free()
        form, cache = FORMATS[weights], CACHES[weights]
        path = str(Path(folder) / f"{form}.gguf")
        nbytes = write(folder, path, form)
        self.model = llama_cpp.llama_model_load_from_file(path.encode(), llama_cpp.llama_model_default_params())
        if not self.model:
            raise ValueError(f"llama.cpp does not load {path}: its own message stands above")
        params = llama_cpp.llama_context_default_params()
        # More than is asked for, in the steps in which it keeps a cache.
        params.n_ctx = params.n_batch = params.n_ubatch = -(-tokens // 256) * 256
        params.n_threads = params.n_threads_batch = threads
        params.type_k = params.type_v = gguf.GGMLQuantizationType[cache].value
        if cache == "F32":
            params.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
        self.context = llama_cpp.llama_init_from_model(self.model, params)
        if not self.context:
            raise ValueError(f"llama.cpp makes no context of {tokens} tokens with a cache of {cache}")
        self.vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))
        return form, nbytes

    def free(self) -> None:
        if self.context:
            llama_cpp.llama_free(self.context)
        if self.model:
            llama_cpp.llama_model_free(self.model)
        self.model = self.context = None

    def logits(self, path: str) -> None:
        """Save those of the last token, float32 [vocab]."""
        np.save(path, self._logits())

    def _forget(self, behind: int) -> None:
        llama_cpp.llama_memory_seq_rm(llama_cpp.llama_get_memory(self.context), 0, behind, -1)

    def _step(self, ids: Sequence[int]) -> np.ndarray:
        tokens = (llama_cpp.llama_token * len(ids))(*ids)
        if status := llama_cpp.llama_decode(self.context, llama_cpp.llama_batch_get_one(tokens, len(ids))):
            raise ValueError(f"llama_decode of {len(ids)} tokens returned {status}")
        return self._logits()

    def _logits(self) -> np.ndarray:
        found = llama_cpp.llama_get_logits_ith(self.context, -1)
        return np.ctypeslib.as_array(ctypes.cast(found, ctypes.POINTER(ctypes.c_float)), (self.vocabulary,))


if __name__ == "__main__":
    serve(Llama())
