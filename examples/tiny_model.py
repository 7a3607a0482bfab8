"""A tiny random Qwen2-VL and its processor, for the examples: the words mean nothing, the differences do."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast, Qwen2VLConfig, Qwen2VLForConditionalGeneration
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

PHOTO = Image.fromarray(np.random.default_rng(0).integers(0, 256, (112, 168, 3), dtype=np.uint8))


def model() -> Any:
    """Two layers of everything, random weights that let every input be seen in the logits."""
    torch.manual_seed(0)
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 3, 3]}
    text = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": 128, "pad_token_id": 0}
    text |= {
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "rope_parameters": rope,
        "max_position_embeddings": 512,
    }
    text |= {"bos_token_id": None, "eos_token_id": None}
    vision = {"depth": 2, "num_heads": 2, "embed_dim": 32, "hidden_size": 64, "mlp_ratio": 2}
    special = {"image_token_id": 90, "video_token_id": 91, "vision_start_token_id": 92, "vision_end_token_id": 93}
    made = Qwen2VLForConditionalGeneration(Qwen2VLConfig(text_config=text, vision_config=vision, **special))
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=parameter[0].numel() ** -0.5)
    return made.eval()


def processor() -> SimpleNamespace:
    """Numbers as words, so that a text is a list of ids, and transformers' image processor."""
    words = Tokenizer(WordLevel({str(number): number for number in range(128)}, unk_token="0"))
    words.pre_tokenizer = Whitespace()
    images = Qwen2VLImageProcessorPil(max_pixels=12_845_056)
    return SimpleNamespace(tokenizer=PreTrainedTokenizerFast(tokenizer_object=words), image_processor=images)
