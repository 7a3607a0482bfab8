"""What the code leans on of other libraries that none of them promises: one list, each entry with who leans on it.

An entry is a sentence that is false as soon as the library changes, the file to look at then, and a check that raises
or returns False.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import NamedTuple

import torch


class Contract(NamedTuple):
    """`broken` is the whole message when `holds` fails; `needs` names the package whose absence skips it."""

    broken: str
    holds: Callable[[], object]
    needs: str = "torch"


def takes(function: Callable, *names: str) -> bool:
    """Whether `function` has these parameters."""
    return set(names) <= set(inspect.signature(function).parameters)


def has(thing: object, *names: str) -> bool:
    return all(hasattr(thing, name) for name in names)


def dinov2() -> torch.nn.Module:
    from transformers import Dinov2Config, Dinov2Model

    config = Dinov2Config(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, mlp_ratio=2, image_size=28)
    return Dinov2Model(config).eval()


def dinov2_names(gated: bool = False) -> bool:
    from transformers import Dinov2Config, Dinov2Model

    from vpt_model.checkpoint.encoder_names import state_for

    config = Dinov2Config(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, mlp_ratio=2, use_swiglu_ffn=gated)
    with torch.device("meta"):
        module = Dinov2Model(config)
    layer = "encoder.layer.0."
    names = ["attention.attention.query", "attention.attention.key", "attention.attention.value"]
    names += ["attention.output.dense"]
    names += ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"] if gated else ["mlp.fc1", "mlp.fc2"]
    ours = {f"{layer}{name}.{part}": torch.zeros(2) for name in names for part in ("weight", "bias")}
    theirs = {name for name in module.state_dict() if name.startswith((f"{layer}attention", f"{layer}mlp"))}
    return state_for(module, ours).keys() == theirs


def dinov2_layer() -> bool:
    x = torch.zeros(1, 5, 16)
    found = dinov2().encoder.layer[0](x)
    return isinstance(found, torch.Tensor) and found.shape == x.shape


def dinov2_sums() -> bool:
    layer, x = dinov2().encoder.layer[0], torch.linspace(-1, 1, 80).view(1, 5, 16)
    attended = layer.attention(layer.norm1(x))
    middle = x + layer.layer_scale1(attended[0] if isinstance(attended, tuple) else attended)
    return torch.equal(layer(x), middle + layer.layer_scale2(layer.mlp(layer.norm2(middle))))


def dinov2_positions() -> bool:
    embeddings = dinov2().embeddings
    parts = has(embeddings, "cls_token", "position_embeddings") and has(embeddings.patch_embeddings, "projection")
    return parts and embeddings.interpolate_pos_encoding(torch.zeros(1, 5, 16), 28, 28).shape == (1, 5, 16)


def sam() -> torch.nn.Module:
    from transformers import SamVisionConfig
    from transformers.models.sam.modeling_sam import SamVisionEncoder

    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "mlp_dim": 16, "output_channels": 8}
    return SamVisionEncoder(
        SamVisionConfig(image_size=32, patch_size=8, window_size=2, global_attn_indexes=[], **sizes)
    ).eval()


def sam_parts() -> bool:
    module = sam()
    attention = module.layers[0].attn
    return (
        has(module, "pos_embed", "neck")
        and has(module.patch_embed, "projection")
        and has(attention, "num_attention_heads", "qkv", "proj", "rel_pos_h", "rel_pos_w")
        and takes(type(attention).forward, "hidden_states")
    )


def sam_layer() -> bool:
    found = sam().layers[0](torch.zeros(1, 4, 4, 16))
    return isinstance(found, torch.Tensor) and found.shape == (1, 4, 4, 16)


def sam_sums() -> bool:
    layer, x = sam().layers[0], torch.linspace(-1, 1, 400).view(1, 5, 5, 16)
    windows, padded = layer.window_partition(layer.layer_norm1(x), layer.window_size)
    middle = x + layer.window_unpartition(layer.attn(windows)[0], layer.window_size, padded, (5, 5))
    return torch.equal(layer(x), middle + layer.mlp(layer.layer_norm2(middle)))


def cache_layers() -> bool:
    from transformers.cache_utils import DynamicLayer

    layer = DynamicLayer()
    rows = torch.zeros(1, 2, 3, 4)
    layer.update(rows, rows)
    return has(layer, "is_initialized", "keys", "values", "lazy_initialization") and layer.get_seq_length() == 3


def static_layer() -> bool:
    from transformers.cache_utils import StaticLayer

    layer = StaticLayer(max_cache_len=8)
    rows = torch.zeros(1, 2, 3, 4)
    layer.update(rows, rows)
    length = layer.cumulative_length
    return isinstance(length, torch.Tensor) and int(length) == 3 and layer.keys.shape == (1, 2, 8, 4)


def qwen_attentions() -> bool:
    from importlib import import_module

    from vpt_kernels.patch.rotary import ROTATIONS

    for family in ("qwen2_vl", "qwen2_5_vl", "qwen3_vl"):
        module = import_module(f"transformers.models.{family}.modeling_{family}")
        if not any(hasattr(module, name) for name in ROTATIONS):
            raise AssertionError(f"{module.__name__} has none of {', '.join(ROTATIONS)}")
    return True


def processors() -> bool:
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil, smart_resize

    processor = Qwen2VLImageProcessorPil()
    limits = processor._standardize_kwargs(size=processor.size, min_pixels=1 << 12, max_pixels=1 << 16)["size"]
    if (limits["shortest_edge"], limits["longest_edge"]) != (1 << 12, 1 << 16):
        return False
    return has(processor, "image_mean", "image_std", "merge_size", "patch_size", "rescale_factor") and takes(
        smart_resize, "height", "width", "factor", "min_pixels", "max_pixels"
    )


def triton_compiler() -> bool:
    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia.compiler import get_ptxas
    from triton.compiler import ASTSource

    parameters = list(inspect.signature(ASTSource).parameters)
    return parameters[:4] == ["fn", "signature", "constexprs", "attrs"] and bool(get_ptxas(90).path and GPUTarget)


def triton_options() -> bool:
    from triton.backends.nvidia.compiler import CUDAOptions

    return {"enable_fp_fusion", "num_warps", "num_stages", "launch_pdl"} <= set(CUDAOptions.__dataclass_fields__)


def triton_pdl() -> bool:
    import triton.language as tl

    return has(tl.extra.cuda, "gdc_wait", "gdc_launch_dependents")


def triton_interpreter() -> bool:
    from triton.runtime import interpreter

    methods = ("cast_impl", "create_dot", "create_fp_to_fp")
    return has(interpreter.InterpreterBuilder, *methods) and has(
        interpreter, "GridExecutor", "_get_np_dtype", "_patch_lang", "TensorHandle"
    )


def torch_errors() -> bool:
    from vpt_kernels.append_visual_kv.api import prepare

    q, k, v = (torch.zeros(1, 1, 4) for _ in range(3))
    rest = (torch.zeros(2, 4), torch.full((3, 1), 9), torch.zeros(1, dtype=torch.long), *torch.zeros(2, 1, 1, 4))
    op, arguments = prepare("append_visual_kv", q, k, v, *rest, (1, 1, 0), backend="cpp")
    try:
        op(*arguments)
    except IndexError as error:
        return "build a longer table" in str(error)
    return False


def torch_build() -> bool:
    import torch.utils.cpp_extension as extension

    return hasattr(extension, "CUDA_HOME") and hasattr(extension.BuildExtension, "with_options")


def torch_poison() -> bool:
    return isinstance(torch.utils.deterministic.fill_uninitialized_memory, bool)


def torch_linear() -> bool:
    if not torch.backends.mkldnn.is_available():
        return True
    x = torch.ones(2, 4)
    found = torch.ops.mkldnn._linear_pointwise(x, torch.eye(4), None, "none", [], "")
    return torch.equal(found, x)


def torch_fakes() -> bool:
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.utils._python_dispatch import TorchDispatchMode

    with FakeTensorMode():
        return torch.empty(2).shape == (2,) and bool(TorchDispatchMode)


def tokenizers_whole_words() -> bool:
    import tokenizers
    from tokenizers import models

    backend = tokenizers.Tokenizer(models.BPE(vocab={"a": 0, "b": 1, "ab": 2}, merges=[], ignore_merges=True))
    return backend.encode("ab").ids == [2]


def tokenizers_ids() -> bool:
    import tokenizers
    from tokenizers import AddedToken, models

    backend = tokenizers.Tokenizer(models.BPE(vocab={"a": 0, "<x>": 1}, merges=[], ignore_merges=True))
    backend.add_tokens([AddedToken("<x>", normalized=False)])
    return backend.token_to_id("<x>") == 1 and backend.encode("a<x>").ids == [0, 1]


def pillow_two_passes() -> bool:
    import numpy as np
    from PIL import Image

    pixels = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    image, cubic = Image.fromarray(pixels), Image.Resampling.BICUBIC
    whole = np.asarray(image.resize((31, 23), cubic))
    horizontal = np.asarray(image.resize((31, 40), cubic).resize((31, 23), cubic))
    vertical = np.asarray(image.resize((60, 23), cubic).resize((31, 23), cubic))
    return np.array_equal(whole, horizontal) or np.array_equal(whole, vertical)


def pillow_bomb() -> bool:
    from PIL import Image

    return isinstance(Image.MAX_IMAGE_PIXELS, int) and issubclass(Image.DecompressionBombError, Exception)


_NAMES, _ENCODERS = "see vpt_model/checkpoint/encoder_names.py", "see vpt_model/network/encoders.py"
_CACHES, _AOT = "see vpt_kernels/caches.py", "see tests/aot/compile.py"

CONTRACTS = (
    Contract(f"Dinov2's attention or MLP has names that nobody maps: {_NAMES}", dinov2_names, "transformers"),
    Contract(f"Dinov2's SwiGLU has names that nobody maps: {_NAMES}", lambda: dinov2_names(True), "transformers"),
    Contract(f"A layer of Dinov2 no longer returns its tensor alone: {_ENCODERS}", dinov2_layer, "transformers"),
    Contract(f"A layer of Dinov2 adds other parts or in another order: {_ENCODERS}", dinov2_sums, "transformers"),
    Contract(f"Dinov2's embeddings have other parts: {_ENCODERS}", dinov2_positions, "transformers"),
    Contract(f"SamVisionEncoder has other parts: {_ENCODERS}, sam_attention.py", sam_parts, "transformers"),
    Contract(f"A layer of SAM no longer returns its tensor alone: {_ENCODERS}", sam_layer, "transformers"),
    Contract(f"A layer of SAM adds other parts or in another order: {_ENCODERS}", sam_sums, "transformers"),
    Contract(f"A DynamicLayer holds its keys and values otherwise: {_CACHES}", cache_layers, "transformers"),
    Contract(f"A StaticLayer counts its tokens otherwise: {_CACHES}", static_layer, "transformers"),
    Contract(
        "The rotary functions of the Qwen models have new names: see vpt_kernels/patch/rotary.py",
        qwen_attentions,
        "transformers",
    ),
    Contract("Qwen2-VL's image processor has other settings: see vpt_kernels/processor.py", processors, "transformers"),
    Contract(f"Triton compiles ahead of time by other names: {_AOT}", triton_compiler, "triton"),
    Contract(
        "Triton's launches take other options: see the launches in vpt_kernels/*/triton.py", triton_options, "triton"
    ),
    Contract(
        "Triton's dependent launches have other names: see control_cross_attention/triton.py", triton_pdl, "triton"
    ),
    Contract(
        "Triton's interpreter has other parts: see tests/triton/bf16_interpreter.py", triton_interpreter, "triton"
    ),
    Contract("A C++ library's std::out_of_range is no IndexError: see vpt_kernels/backends.py", torch_errors),
    Contract("torch finds the CUDA toolkit by another name: see setup.py", torch_build),
    Contract("torch.empty cannot be made to fill memory: see tests/conftest.py", torch_poison),
    Contract("torch's oneDNN product has another signature: see vpt_model/network/linear.py", torch_linear),
    Contract("torch's fake tensors are elsewhere: see vpt_model/checkpoint/weights.py", torch_fakes),
    Contract(
        "tokenizers no longer looks whole words up first: see vpt_model/text/tokens.py",
        tokenizers_whole_words,
        "tokenizers",
    ),
    Contract(
        "tokenizers numbers an added token anew that the vocabulary has: see vpt_model/text/tokens.py",
        tokenizers_ids,
        "tokenizers",
    ),
    Contract(
        "Pillow no longer resizes in two passes that round to uint8: see roi_patch_embed/geometry.py",
        pillow_two_passes,
        "PIL",
    ),
    Contract("Pillow limits the size of pictures otherwise: see vpt_kernels/images.py", pillow_bomb, "PIL"),
)
