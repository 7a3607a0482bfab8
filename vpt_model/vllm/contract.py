"""What is used of vLLM beyond its documented interfaces, in one list: checked when an engine starts, and by a test."""

from __future__ import annotations

import importlib
import inspect
import re
from collections import OrderedDict
from typing import Any

VERSIONS = ((0, 32), (0, 33))
"""The versions that the tests have run on."""

SCHEDULER, REQUEST = "vllm.v1.core.sched.scheduler:Scheduler", "vllm.v1.request:Request"
_CAPTURE = "vllm.v1.sample.logits_processor.interface:LogitsProcessor"
_MODEL, _PROCESSING = "vllm.model_executor.models.qwen2_vl", "vllm.multimodal.processing"
_DUMMIES = f"{_PROCESSING}.dummy_inputs:BaseDummyInputsBuilder"
_PARSER = "vllm.reasoning.abs_reasoning_parsers:ReasoningParser"
_CONFIG = "vllm.model_executor.models.config:VerifyAndUpdateConfig"
PARAMETERS = {
    f"{SCHEDULER}.__init__": ("vllm_config", "kv_cache_config", "structured_output_manager", "block_size"),
    f"{SCHEDULER}.add_request": ("request",),
    f"{SCHEDULER}.schedule": (),
    f"{SCHEDULER}.reset_prefix_cache": ("reset_running_requests", "reset_connector"),
    f"{SCHEDULER}.make_stats": (),
    f"{SCHEDULER}._update_request_with_output": ("request", "new_token_ids", "is_stale"),
    f"{SCHEDULER}._handle_stopped_request": ("request",),
    f"{SCHEDULER}._update_request_as_session": ("session", "update"),
    f"{SCHEDULER}._free_request": ("request",),
    f"{SCHEDULER}._free_request_blocks": ("request",),
    "vllm.v1.core.sched.async_scheduler:AsyncScheduler.__init__": (),
    "vllm.v1.core.encoder_cache_manager:EncoderCacheManager.free": ("request",),
    "vllm.platforms.interface:Platform.validate_request": ("processed_inputs", "params"),
    "vllm.exceptions:VLLMValidationError.__init__": ("message", "parameter"),
    "vllm.v1.core.sched.request_queue:RequestQueue.remove_request": ("request",),
    "vllm.v1.core.sched.request_queue:RequestQueue.prepend_request": ("request",),
    f"{REQUEST}.__init__": ("request_id", "prompt_token_ids", "sampling_params", "mm_features", "resumable"),
    f"{REQUEST}.update_block_hashes": (),
    "vllm.v1.sample.logits_processor:process_dict_updates": ("req_entries", "batch_update", "new_state"),
    f"{_CAPTURE}.__init__": ("vllm_config",),
    f"{_CAPTURE}.validate_params": ("sampling_params",),
    f"{_CAPTURE}.is_argmax_invariant": (),
    f"{_CAPTURE}.update_state": ("batch_update",),
    f"{_CAPTURE}.apply": ("logits",),
    "vllm.v1.worker.gpu.sample.logits_processor.interface:LogitsProcessor.add_request": ("req_idx", "sampling_params"),
    "vllm.v1.worker.gpu.sample.logits_processor.interface:LogitsProcessor.apply": ("logits", "ctx"),
    "vllm.multimodal.inputs:MultiModalBatchedField.__init__": ("keep_on_cpu",),
    "vllm.multimodal.inputs:MultiModalFieldElem.__init__": ("data", "field"),
    "vllm.multimodal.inputs:PlaceholderRange.__init__": ("offset", "length", "is_embed"),
    "vllm.multimodal.inputs:MultiModalFeatureSpec.__init__": (
        "data",
        "modality",
        "identifier",
        "mm_position",
        "mm_hash",
    ),
    f"{_MODEL}:Qwen2VLForConditionalGeneration.__init__": ("vllm_config", "prefix"),
    f"{_MODEL}:Qwen2VLForConditionalGeneration.load_weights": ("weights",),
    f"{_MODEL}:Qwen2VLForConditionalGeneration.get_mrope_input_positions": ("input_tokens", "mm_features"),
    f"{_MODEL}:Qwen2VLForConditionalGeneration.embed_multimodal": (),
    f"{_MODEL}:Qwen2VLForConditionalGeneration.compute_logits": ("hidden_states",),
    f"{_MODEL}:Qwen2VisionPatchEmbed.__init__": ("patch_size", "temporal_patch_size", "in_channels", "embed_dim"),
    f"{_MODEL}:Qwen2VisionPatchEmbed.forward": ("x",),
    f"{_CONFIG}.verify_and_update_config": ("vllm_config",),
    f"{_CONFIG}.verify_and_update_model_config": ("model_config",),
    f"{_PROCESSING}.context:BaseProcessingInfo.get_hf_config": (),
    f"{_PROCESSING}.context:BaseProcessingInfo.get_supported_mm_limits": (),
    f"{_PROCESSING}.context:BaseProcessingInfo.get_mm_max_tokens_per_item": ("seq_len", "mm_counts"),
    f"{_DUMMIES}.get_dummy_text": ("mm_counts",),
    f"{_DUMMIES}.get_dummy_mm_data": ("seq_len", "mm_counts", "mm_options"),
    f"{_DUMMIES}._get_dummy_images": ("width", "height", "num_images"),
    f"{_PROCESSING}:BaseMultiModalProcessor._call_hf_processor": ("hf_data", "hf_kwargs"),
    f"{_PROCESSING}:BaseMultiModalProcessor._get_mm_fields_config": ("hf_inputs", "hf_processor_mm_kwargs"),
    f"{_PROCESSING}:BaseMultiModalProcessor._get_prompt_updates": (
        "mm_items",
        "hf_processor_mm_kwargs",
        "out_mm_kwargs",
    ),
    f"{_PARSER}.is_reasoning_end": ("input_ids",),
    f"{_PARSER}.is_reasoning_end_streaming": ("input_ids", "delta_ids"),
    f"{_PARSER}.extract_content_ids": ("input_ids",),
    f"{_PARSER}.extract_reasoning": ("model_output", "request"),
    f"{_PARSER}.extract_reasoning_streaming": ("previous_text", "current_text", "delta_text"),
    f"{_PARSER}Manager.register_lazy_module": ("name", "module_path", "class_name"),
    "vllm.v1.metrics.loggers:StatLoggerBase.__init__": ("vllm_config", "engine_index"),
    "vllm.v1.metrics.loggers:StatLoggerBase.log_engine_initialized": (),
    "vllm.v1.metrics.loggers:StatLoggerBase.record": (
        "scheduler_stats",
        "iteration_stats",
        "mm_cache_stats",
        "engine_idx",
    ),
}
"""Functions that are called or overridden, and the parameters that are relied on."""

ASSIGNED = {
    f"{SCHEDULER}.__init__": (
        "vllm_config",
        "requests",
        "running",
        "waiting",
        "kv_holding_waiting",
        "encoder_cache_manager",
        "hash_block_size",
        "max_model_len",
    ),
    f"{REQUEST}.__init__": (
        "request_id",
        "_all_token_ids",
        "_output_token_ids",
        "prompt_token_ids",
        "num_prompt_tokens",
        "num_computed_tokens",
        "num_preemptions",
        "block_hashes",
        "mm_features",
        "resumable",
        "streaming_queue",
        "status",
        "stop_reason",
        "max_tokens",
        "sampling_params",
    ),
}
"""Attributes that a constructor sets and that are read or written here."""

FIELDS = {
    "vllm.v1.metrics.stats:SchedulerStats": ("num_kv_fetch_reqs_by_stage",),
    "vllm.config:VllmConfig": ("instance_id", "structured_outputs_config", "scheduler_config", "speculative_config"),
    "vllm.config.structured_outputs:StructuredOutputsConfig": ("enable_in_reasoning",),
    "vllm.config.scheduler:SchedulerConfig": ("scheduler_cls", "async_scheduling", "max_num_seqs"),
    "vllm.sampling_params:SamplingParams": (
        "extra_args",
        "stop_token_ids",
        "max_tokens",
        "min_tokens",
        "ignore_eos",
        "structured_outputs",
    ),
}
"""Fields of configurations and statistics."""


def check() -> None:
    """Raise one ValueError that names the installed vLLM, the tested versions, and whatever this one lacks."""
    import vllm

    lacking = missing()
    version = tuple(map(int, re.findall(r"\d+", vllm.__version__)[:2]))
    tested = ", ".join(".".join(map(str, each)) for each in VERSIONS)
    if version not in VERSIONS or lacking:
        found = f"; it lacks {'; '.join(lacking)}" if lacking else ""
        raise ValueError(
            f"second looks were tested with vLLM {tested}, not with {vllm.__version__}{found}: install those"
        )


def missing() -> list[str]:
    """Return every name, parameter and behaviour of the lists above that the installed vLLM does not have."""
    lacking = []
    for name, parameters in PARAMETERS.items():
        function = _found(name)
        known = inspect.signature(function).parameters if function is not None else {}
        lacking += [f"{name}({each})" for each in parameters if each not in known] or [name] * (function is None)
    for name, attributes in ASSIGNED.items():
        source = inspect.getsource(_found(name) or missing)
        lacking += [f"{name}: self.{each}" for each in attributes if not re.search(rf"self\.{each}\b", source)]
    for name, fields in FIELDS.items():
        known = getattr(_found(name), "__annotations__", {})
        lacking += [f"{name}.{each}" for each in fields if each not in known]
    status = _found("vllm.v1.request:RequestStatus")
    if status is None or status.get_finished_reason(status.RUNNING) is not None:
        lacking.append("no finish reason for a running request")
    caches = _found("vllm.v1.core.encoder_cache_manager:EncoderCacheManager")
    if caches is None or not isinstance(caches(1).freeable, OrderedDict):
        lacking.append("an encoder cache that evicts in a given order")
    return lacking


def _found(name: str) -> Any:
    module, _, path = name.partition(":")
    try:
        found = importlib.import_module(module)
        for part in path.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError):
        return None
    return found
