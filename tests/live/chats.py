"""Tiny random models with processors and chat templates, for conversations that go on and on."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast, ProcessorMixin
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from tests.helpers import numbers
from tests.patch.foreign import filled
from vpt_kernels.live import LiveConversation

SPECIAL = ("<|im_start|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% for c in m.content %}{% if c.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% else %}{{ c.text }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


class Processor(ProcessorMixin):
    """Tokenizer, image processor and template; no video processor, which would need torchvision."""

    def __init__(self, image_processor=None, tokenizer=None, chat_template=None):
        super().__init__(image_processor, tokenizer, chat_template=chat_template)


@cache
def tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, and Qwen's special tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={symbol: number for number, symbol in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=list(SPECIAL),
    )


def token(name: str) -> int:
    return tokenizer().convert_tokens_to_ids(name)


def processor(patch_size: int = 14, template: str = TEMPLATE) -> Processor:
    images = Qwen2VLImageProcessorPil(
        patch_size=patch_size, size={"shortest_edge": (4 * patch_size) ** 2, "longest_edge": (10 * patch_size) ** 2}
    )
    return Processor(images, tokenizer(), template)


def picture(height: int, width: int, *key: object) -> Image.Image:
    return Image.fromarray(numbers("picture", *key).integers(0, 256, (height, width, 3), dtype="uint8"))


FAMILIES = {"qwen2_vl": 14, "qwen2_5_vl": 14, "qwen3_vl": 16, "qwen3_vl_moe": 16, "glm4v": 14, "glm4v_moe": 14}
FAMILIES |= {"glm46v": 14, "glm_ocr": 14}
"""Families that can be continued, with their patch sizes."""

ROPE = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 3, 3]}
MOE = {"num_experts_per_tok": 2, "moe_intermediate_size": 32}


def model(kind: str, **text: Any) -> nn.Module:
    """A model of 2 + 2 layers that ends an answer with <|im_end|>; `text` changes its language model."""
    import transformers

    config = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    config |= {"num_key_value_heads": 2, "vocab_size": 272, "max_position_embeddings": 4096, "rope_parameters": ROPE}
    config |= {"pad_token_id": token("<|endoftext|>"), "bos_token_id": None, "eos_token_id": token("<|im_end|>")}
    vision: dict[str, Any] = {"depth": 2, "num_heads": 2}
    ids = {"image_token_id": token("<|image_pad|>"), "video_token_id": token("<|video_pad|>")}
    ends = (token("<|vision_start|>"), token("<|vision_end|>"))
    if kind.startswith("glm"):
        ids |= dict(zip(("image_start_token_id", "image_end_token_id"), ends))
        config |= {"head_dim": 16, "rope_parameters": ROPE | {"partial_rotary_factor": 1.0}}
        vision |= {"hidden_size": 32, "out_hidden_size": 64, "intermediate_size": 64, "patch_size": 14}
        vision |= {"image_size": 140}
    else:
        ids |= dict(zip(("vision_start_token_id", "vision_end_token_id"), ends))
    if kind == "qwen2_vl":
        vision |= {"embed_dim": 32, "hidden_size": 64, "mlp_ratio": 2}
    elif kind == "qwen2_5_vl":
        vision |= {"hidden_size": 32, "out_hidden_size": 64, "intermediate_size": 64, "fullatt_block_indexes": [1]}
    elif kind.startswith("qwen3"):
        vision |= {"hidden_size": 32, "out_hidden_size": 64, "intermediate_size": 64, "num_position_embeddings": 64}
        vision |= {"deepstack_visual_indexes": [0, 1], "patch_size": 16}
        config |= {"head_dim": 16}
    if kind == "qwen3_vl_moe":
        config |= {"num_experts": 4, **MOE}
    elif kind == "glm4v_moe":
        config |= {"n_routed_experts": 4, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1, **MOE}
    names = {"qwen2_vl": "Qwen2VL", "qwen2_5_vl": "Qwen2_5_VL", "qwen3_vl": "Qwen3VL", "qwen3_vl_moe": "Qwen3VLMoe"}
    names |= {"qwen3_5": "Qwen3_5", "glm4v": "Glm4v", "glm4v_moe": "Glm4vMoe", "glm46v": "Glm46V", "glm_ocr": "GlmOcr"}
    if kind == "glm46v":
        config, vision = {"model_type": "glm4v_text", **config}, {"model_type": "glm4v_vision", **vision}
    made = getattr(transformers, f"{names[kind]}Config")(text_config=config | text, vision_config=vision, **ids)
    built = filled(getattr(transformers, f"{names[kind]}ForConditionalGeneration")(made))
    built.generation_config.eos_token_id = token("<|im_end|>")
    return built


@cache
def unwritable() -> list[int]:
    """Ids whose text is not one printable character: a random model must not say them, for templates re-tokenise."""
    kept = {tokenizer().convert_tokens_to_ids(chr(code)) for code in range(33, 127)} | {token("<|im_end|>")}
    return [number for number in range(272) if number not in kept]


def anew(model: nn.Module, chat: Processor, ids: list[int], pictures: list[Image.Image], **options: Any) -> Any:
    """What the model's own `generate` makes of the whole conversation, without a cache of it."""
    tokens = torch.tensor([ids])
    given = dict(chat.image_processor(images=pictures, return_tensors="pt")) if pictures else {}
    kinds = {"mm_token_type_ids": (tokens == token("<|image_pad|>")).int()} if pictures else {}
    return model.generate(input_ids=tokens, attention_mask=torch.ones_like(tokens), **kinds, **given, **options)


def steps(out: Any) -> Tensor:
    """Logits [new tokens, vocabulary] of a dictionary that `generate` returned."""
    return torch.stack(out.logits)[:, 0]


SAY = {"return_dict_in_generate": True, "output_logits": True, "suppress_tokens": unwritable()}
GREEDY = SAY | {"do_sample": False, "max_new_tokens": 12, "min_new_tokens": 12}


def user(text: str, *pictures: Any) -> list[dict[str, Any]]:
    shown = [{"type": "image", "image": one} for one in pictures]
    return [{"role": "user", "content": [*shown, {"type": "text", "text": text}]}]


def opened(
    kind: str = "qwen2_vl", template: str = TEMPLATE, cache: str = "dynamic", capacity: int = 0, **options: Any
) -> LiveConversation:
    """A conversation; capacity is that of a static cache."""
    room = {"capacity": capacity} if cache == "static" and capacity else {}
    return LiveConversation(model(kind), processor(FAMILIES[kind], template), cache=cache, **room, **options)


def pictures(count: int = 3) -> list[Any]:
    return [picture(80 + 30 * number, 150 - 20 * number, number) for number in range(count)]
