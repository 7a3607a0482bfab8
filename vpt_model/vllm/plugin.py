"""What vLLM is told of VPT checkpoints, in every process: the API server, the engine core and the workers."""

from __future__ import annotations

ARCHITECTURES = ("VPT_Qwen2VLForConditionalGeneration", "VRT_Qwen2VLForConditionalGeneration")
"""The authors' two names of their class."""


def register() -> None:
    """Register model, configuration and reasoning parser with vLLM; entry point of its group `vllm.general_plugins`.

    Any number of calls do what one does. `vpt_model.vllm.contract` checks vLLM's version only when a VPT checkpoint is
    served, so that other models are served as without this package.
    """
    from transformers import AutoConfig
    from vllm import ModelRegistry
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP
    from vllm.reasoning import ReasoningParserManager

    from vpt_model.vllm.defaults import CONFIGS, LookDefaults

    for config in CONFIGS:
        AutoConfig.register(config.model_type, config, exist_ok=True)
    for name in ARCHITECTURES:
        if name not in ModelRegistry.get_supported_archs():
            ModelRegistry.register_model(name, "vpt_model.vllm.model:VPTQwen2VL")
        MODELS_CONFIG_MAP[name] = LookDefaults
    ReasoningParserManager.register_lazy_module("vpt", "vpt_model.vllm.reasoning", "LookParser")
