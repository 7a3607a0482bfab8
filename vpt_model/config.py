"""Shapes of the language model, the vision tower and the re-encoders; `config.json` into these shapes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from operator import index
from typing import Any

ENCODERS = {"clip": "clip", "dino": "detection", "sam": "seg"}
"""Names of the re-encoders, and the `kind` by which checkpoints, configurations and tokens call them."""
KINDS = tuple(ENCODERS.values())

# The authors' two names of their class, and the plain model it extends.
PERCEPTION_MODEL_TYPES = ("qwen2_vl_vpt", "vrt_qwen2_vl")
PLAIN_MODEL_TYPE = "qwen2_vl"

_SIZES = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "intermediate_size",
    "vocab_size",
    "max_position_embeddings",
)
_CONSTANTS = ("rope_theta", "rms_norm_eps")
# A hostile file must not make us list a billion tensors.
_LARGEST_SIZE, _MOST_LAYERS = 100_000_000, 1000


def require_kind(kind: Any) -> None:
    """Raise TypeError or ValueError for anything but the kind of a re-encoder or None."""
    require_type("kind", kind, (str, type(None)), f"one of {KINDS} or None")
    if kind is not None and kind not in KINDS:
        raise ValueError(f"kind is {kind!r}; it must be one of {KINDS} or None")


# Three of `vpt_kernels.checks`, word for word: that file is not public, and this one imports neither package.
def require_integer(name: str, value: Any, low: float, high: int | None = None) -> int:
    """Return the integer; raise TypeError for another type (floats and bools too), ValueError outside [low, high]."""
    try:
        if isinstance(value, bool):
            raise TypeError
        number = index(value)
    except TypeError:
        raise TypeError(f"{name} is {shown(value)}; it must be an integer") from None
    if number < low or (high is not None and number > high):
        most = "" if high is None else f", at most {high}"
        raise ValueError(f"{name} is {shown(number)}; it must be at least {low}{most}")
    return number


def require_type(name: str, value: Any, kind: type | tuple[type, ...], what: str) -> None:
    """Raise TypeError unless `value` is of `kind`, which messages call `what`."""
    if not isinstance(value, kind):
        raise TypeError(f"{name} is {shown(value)}; it must be {what}")


def shown(value: Any) -> str:
    """Return a value as messages name it: its type where it is no plain value, because a tensor's would have to be
    read.
    """
    if isinstance(value, int) and value.bit_length() > 256:  # Python refuses to spell very long ones
        return f"an integer of {value.bit_length()} bits"
    return f"{value!r:.80}" if isinstance(value, (str, int, float, bytes, type(None))) else f"a {type(value).__name__}"


@dataclass(frozen=True)
class VisionConfig:
    """The Qwen2-VL vision tower. `hidden_size` is the language model's width (the merger's output)."""

    depth: int = 32
    embed_dim: int = 1280
    num_heads: int = 16
    mlp_ratio: float = 4
    patch_size: int = 14
    spatial_merge_size: int = 2
    temporal_patch_size: int = 2
    in_channels: int = 3
    hidden_size: int = 1536

    @property
    def head_dim(self) -> int:
        return self.embed_dim // self.num_heads


@dataclass(frozen=True)
class DinoConfig:
    """The DINOv2 re-encoder; the defaults are dinov2-large, which the published variant uses."""

    hidden_size: int = 1024
    num_hidden_layers: int = 24
    num_attention_heads: int = 16
    mlp_ratio: int = 4
    image_size: int = 518
    patch_size: int = 14
    use_swiglu_ffn: bool = False


@dataclass(frozen=True)
class SamConfig:
    """The SAM image encoder as a re-encoder; the defaults are sam-vit-large, which the published variant uses."""

    hidden_size: int = 1024
    output_channels: int = 256
    num_hidden_layers: int = 24
    num_attention_heads: int = 16
    mlp_dim: int = 4096
    image_size: int = 1024
    patch_size: int = 16
    window_size: int = 14
    global_attn_indexes: tuple[int, ...] = (5, 11, 17, 23)


@dataclass(frozen=True)
class ModelConfig:
    """One VPT model: a Qwen2-VL language model, its vision tower and the re-encoder `kind`.

    `kind` is the released variant's re-encoder: "clip" (the model's own tower), "detection" (DINOv2, shaped by `dino`),
    "seg" (SAM, shaped by `sam`), or None for a plain Qwen2-VL without perception tokens. `image_resolution`: pixels to
    which the longest edge of an image or a crop is reduced before the vision tower sees it.
    """

    hidden_size: int = 1536
    num_hidden_layers: int = 28
    num_attention_heads: int = 12
    num_key_value_heads: int = 2
    intermediate_size: int = 8960
    vocab_size: int = 151936
    rope_theta: float = 1e6
    rms_norm_eps: float = 1e-6
    max_position_embeddings: int = 32768
    tie_word_embeddings: bool = True
    mrope_section: tuple[int, int, int] = (16, 24, 24)
    image_resolution: int = 512
    kind: str | None = "clip"
    vision: VisionConfig = field(default_factory=VisionConfig)
    dino: DinoConfig = field(default_factory=DinoConfig)
    sam: SamConfig = field(default_factory=SamConfig)

    def __post_init__(self) -> None:
        require_kind(self.kind)
        for name in (*_SIZES, "image_resolution"):
            limit = _MOST_LAYERS if name == "num_hidden_layers" else _LARGEST_SIZE
            object.__setattr__(self, name, require_integer(name, getattr(self, name), 1, limit))
        for name in _CONSTANTS:
            require_type(name, getattr(self, name), (int, float), "a number")
            if not 0 < getattr(self, name) <= _LARGEST_SIZE:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be positive, at most {_LARGEST_SIZE}")
        require_type("tie_word_embeddings", self.tie_word_embeddings, bool, "True or False")
        for name, kind in (("vision", VisionConfig), ("dino", DinoConfig), ("sam", SamConfig)):
            require_type(name, getattr(self, name), kind, f"a {kind.__name__}")
        require_type("mrope_section", self.mrope_section, (tuple, list), "three integers")
        if [type(part) for part in self.mrope_section] != [int] * 3:
            raise TypeError(f"mrope_section is {self.mrope_section!r:.80}; it must be three integers")
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size {self.hidden_size} is not divisible by num_attention_heads {self.num_attention_heads}"
            )
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads {self.num_attention_heads} is not a multiple of "
                f"num_key_value_heads {self.num_key_value_heads}"
            )
        if sum(self.mrope_section) * 2 != self.head_dim:
            raise ValueError(f"mrope_section {self.mrope_section} must sum to head_dim/2 = {self.head_dim // 2}")
        if self.vision.hidden_size != self.hidden_size:
            raise ValueError(f"vision.hidden_size {self.vision.hidden_size} must equal hidden_size {self.hidden_size}")

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads


_2B = ModelConfig()
_7B = ModelConfig(
    hidden_size=3584,
    num_attention_heads=28,
    num_key_value_heads=4,
    intermediate_size=18944,
    vocab_size=152064,
    tie_word_embeddings=False,
    vision=VisionConfig(hidden_size=3584),
)

PRESETS: dict[str, ModelConfig] = {
    # Seconds on any machine; the vocabulary is bytes plus the special and perception tokens.
    "tiny": ModelConfig(
        hidden_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=256,
        vocab_size=320,
        max_position_embeddings=4096,
        tie_word_embeddings=False,
        mrope_section=(4, 6, 6),
        vision=VisionConfig(depth=2, embed_dim=64, num_heads=4, mlp_ratio=2, hidden_size=128),
        dino=DinoConfig(hidden_size=64, num_hidden_layers=2, num_attention_heads=4),
        sam=SamConfig(
            hidden_size=32,
            output_channels=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            mlp_dim=128,
            image_size=256,
            global_attn_indexes=(1,),
        ),
    ),
    # The trained model that the package ships (`vpt_model.mini`): 8×8 patches see an image, 8×8 see a crop of it.
    "mini": ModelConfig(
        hidden_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=384,
        vocab_size=384,
        # The sequences are short: with Qwen2-VL's 1e6 the row and column angles of 4×4 tokens would hardly differ.
        rope_theta=20.0,
        max_position_embeddings=2048,
        mrope_section=(4, 6, 6),
        image_resolution=112,
        vision=VisionConfig(depth=4, embed_dim=128, num_heads=4, mlp_ratio=3, hidden_size=128),
    ),
    # True widths and vocabulary of the 2B, two layers each: work is measured, not Python overhead.
    "2b-slice": replace(
        _2B,
        num_hidden_layers=2,
        vision=replace(_2B.vision, depth=2),
        dino=DinoConfig(num_hidden_layers=2),
        sam=SamConfig(num_hidden_layers=2, global_attn_indexes=(1,)),
    ),
    "2b": _2B,
    "7b": _7B,
}
"""Named configurations; `2b` and `7b` are the true shapes of Qwen2-VL."""


def parse_config(content: Mapping[str, Any], names: Iterable[str] = ()) -> ModelConfig:
    """Return the ModelConfig of a `config.json`; `names` are the tensors' names, which tell the kind where the file
    does not.

    Fields that only matter in training, and token ids (they come from the tokenizer), are ignored. The published files
    do not shape their re-encoders, which are the large ones; sections `dinov2` and `sam_vision` change that. Raises
    ValueError for missing fields and for settings this implementation does not reproduce.
    """
    content = _flattened(content)
    model_type = content.get("model_type")
    if model_type not in (*PERCEPTION_MODEL_TYPES, PLAIN_MODEL_TYPE):
        known = ", ".join((*PERCEPTION_MODEL_TYPES, PLAIN_MODEL_TYPE))
        raise ValueError(f"config.json has model_type {model_type!r}; supported are {known}: give such a checkpoint")
    missing = [name for name in (*_SIZES, *_CONSTANTS) if name not in content]
    if missing:
        raise ValueError(
            f"config.json lacks {', '.join(missing)}, at its top and in text_config: complete it from the model's page"
        )
    sections = {name: content.get(name) or {} for name in ("rope_scaling", "vision_config", "dinov2", "sam_vision")}
    if wrong := [name for name, section in sections.items() if not isinstance(section, Mapping)]:
        raise ValueError(f"config.json has {', '.join(wrong)} that are not JSON objects: download it again")
    rope, vision, dino, sam = sections.values()
    unsupported = {
        "hidden_act": content.get("hidden_act", "silu") != "silu",
        "use_sliding_window": bool(content.get("use_sliding_window", False)),
        "projector_scale": content.get("projector_scale", 1) != 1,
        "rope_scaling": (rope.get("rope_type") or rope.get("type") or "default") not in ("default", "mrope"),
        "vision_config": vision.get("hidden_act", "quick_gelu") != "quick_gelu",
        "layer_types": not _is_full(content.get("layer_types")),
        "quantization_config": bool(content.get("quantization_config")),
    }
    asked = {name: content[name] for name, is_wrong in unsupported.items() if is_wrong}
    if asked:
        raise ValueError(
            f"config.json asks for {asked}, which is not supported: only silu and quick_gelu, full attention, "
            "projector_scale 1, default M-RoPE and weights that are not quantised are; give such a checkpoint"
        )
    lists = (rope.get("mrope_section") or (16, 24, 24), content.get("vision_encoder_ls") or ())
    if not all(isinstance(given, (list, tuple, str)) for given in lists):
        raise ValueError(f"config.json has mrope_section and vision_encoder_ls {lists}; they must be lists")
    tied = content.get("tie_word_embeddings") or False
    require_type("config.json's tie_word_embeddings", tied, bool, "true or false")
    # Published vision sections name only what differs from Qwen2-VL's defaults, and the channels by an older name.
    vision = {"in_channels": vision.get("in_chans", 3)} | vision | {"hidden_size": content["hidden_size"]}
    return ModelConfig(
        **_checked(ModelConfig, {name: content[name] for name in (*_SIZES, *_CONSTANTS)}),
        tie_word_embeddings=tied,
        mrope_section=tuple(lists[0]),
        **_checked(
            ModelConfig, {name: content[name] for name in ("image_resolution",) if content.get(name) is not None}
        ),
        kind=None if model_type == PLAIN_MODEL_TYPE else _kind(content, names),
        vision=VisionConfig(**_checked(VisionConfig, vision)),
        dino=DinoConfig(**_checked(DinoConfig, dino)),
        sam=SamConfig(**_checked(SamConfig, sam)),
    )


# What transformers moved from the top of the file into text_config with version 4.52.
_TEXT_FIELDS = (*_SIZES, *_CONSTANTS, "hidden_act", "use_sliding_window", "layer_types", "rope_scaling")


def _flattened(content: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of a `config.json` where files before transformers 4.52 have them.

    `text_config` wins over the top, as in transformers; `rope_parameters` holds what were `rope_theta` and
    `rope_scaling`.
    """
    text = content.get("text_config") or {}
    if not isinstance(text, Mapping):
        raise ValueError("config.json has a text_config that is not a JSON object: download it again")
    flat = dict(content)
    for place in (content, text):
        flat |= {name: place[name] for name in _TEXT_FIELDS if place.get(name) is not None}
        rope, older = place.get("rope_parameters") or {}, place.get("rope_scaling") or {}
        if not isinstance(rope, Mapping) or not isinstance(older, Mapping):
            raise ValueError(
                "config.json has rope_parameters or rope_scaling that is no JSON object: download it again"
            )
        if rope:
            flat["rope_scaling"] = {**older, **rope}
            flat |= {"rope_theta": rope["rope_theta"]} if "rope_theta" in rope else {}
    flat.setdefault("tie_word_embeddings", text.get("tie_word_embeddings", False))
    # Files that leave the grouping out mean one key head per query head.
    if flat.get("num_key_value_heads") is None and "num_attention_heads" in flat:
        flat["num_key_value_heads"] = flat["num_attention_heads"]
    return flat


def _checked(kind: type, values: Mapping[str, Any]) -> dict[str, Any]:
    """Return those of `values` that `kind` has fields for."""
    known = {item.name: item.type for item in fields(kind) if item.name in values}
    found, bad = {}, {}
    for name, form in known.items():
        value = values[name]
        if form == "bool":
            found[name] = value
            good = type(value) is bool
        elif form.startswith("tuple"):
            found[name] = tuple(value) if isinstance(value, (list, tuple)) else value
            good = isinstance(value, (list, tuple)) and all(type(item) is int for item in value)
        else:
            found[name] = value
            limit = _MOST_LAYERS if name in ("depth", "num_hidden_layers") else _LARGEST_SIZE
            good = type(value) in ((int,) if form == "int" else (int, float)) and 0 < value <= limit
        if not good:
            bad[name] = value
    if bad:
        raise ValueError(
            f"config.json has {bad}; sizes must be positive integers up to {_LARGEST_SIZE} ({_MOST_LAYERS} layers), "
            "constants positive numbers"
        )
    return found


def _is_full(layers: Any) -> bool:
    """Return whether no layer's type is another than full attention."""
    return not layers or (isinstance(layers, (list, tuple)) and set(map(str, layers)) == {"full_attention"})


def _kind(content: Mapping[str, Any], names: Iterable[str]) -> str:
    declared = content.get("vision_encoder_ls")
    if declared:
        encoders = [declared] if isinstance(declared, str) else list(declared)
        if len(encoders) != 1 or encoders[0] not in list(ENCODERS):
            raise ValueError(f"config.json has vision_encoder_ls {declared!r}; it must name one of {list(ENCODERS)}")
        return ENCODERS[encoders[0]]
    prefixes = {name.split("_projector.")[0] for name in names if "_projector." in name}
    kinds = prefixes & set(KINDS)
    if len(kinds) != 1:
        raise ValueError(
            f"cannot tell the re-encoder: config.json has no vision_encoder_ls and the tensors have the projectors "
            f"{sorted(kinds) or 'of no kind'}; a VPT checkpoint needs exactly one of clip_projector, "
            "detection_projector and seg_projector"
        )
    return kinds.pop()
