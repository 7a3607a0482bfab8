"""How each alternative is called: what a reader of a ratio must know of the other side; threads and dtype as ours."""

ALTERNATIVES = {
    "transformers' Pillow processor + F.linear": (
        "PIL crop and NEAREST step, Qwen2VLImageProcessorPil, one F.linear over its patches; the same pixels as ours"
    ),
    "F.interpolate, not exact, + F.linear": (
        "slices of the uint8 image, torch's antialiased bicubic resize (uint8 on a CPU, float32 on a GPU), one gather "
        "into patches, one F.linear with normalisation folded into weight and bias; sizes from our plan"
    ),
    "F.interpolate, not exact, + oneDNN": "the same with mkldnn._linear_pointwise instead of MKL's product",
    "F.interpolate, not exact": "torch's antialiased bicubic resize of the uint8 image, to planes, not into patches",
    "torchvision's resize, not exact, + F.linear": "as F.interpolate, by torchvision.transforms.v2.functional.resize",
    "transformers' torchvision processor, not exact, + F.linear": "Qwen2VLImageProcessor on the row's device, F.linear",
    "GEMM alone": "F.linear over a patch matrix that is already there",
    "GEMM alone, oneDNN": "the same with mkldnn._linear_pointwise",
    "torch.compile": "the eager composition, fullgraph (control, append), default mode, inductor; compiled per row",
    "eager": "the published composition: layer_norm, linear (no convolution: a product over blocks), einsum, residual",
    "eager + oneDNN": "the same with mkldnn._linear_pointwise instead of MKL's product",
    "eager index_copy_": "rotation by two products, index_copy_ into both caches; position rows mixed before",
    "copy of the same bytes": "copy_ of q, k and v: as many bytes as the append reads and writes, and no arithmetic",
    "transformers rotary + StaticCache": "apply_rotary_pos_emb and StaticCache.update; position rows mixed before",
    "rotation + FlashInfer append": "eager rotation, flashinfer.append_paged_kv_cache",
    "Liger M-RoPE + index_copy_": "liger_multimodal_rotary_pos_emb on contiguous copies, index_copy_",
    "flash_attn_with_kvcache": "flash-attn's append inside its attention",
    "transformers, cache continued with explicit positions": (
        "Qwen2-VL of transformers (SDPA) over the same weights, its DynamicCache continued with our positions"
    ),
    "transformers, the same with our float32 products": (
        "the same, its nn.Linear and patch embedding multiplying as the engine does (oneDNN)"
    ),
    "published procedure": "the conversation prefilled again, two language-model calls a token",
    "transformers, its cache continued": "Qwen2-VL of transformers (SDPA) over the same weights, greedy, DynamicCache",
    "transformers, with our float32 products": "the same, its nn.Linear multiplying as the engine does",
    "floor: the weights read once": "sum() over every weight that a token needs",
    "transformers' processor and patch embedding": "Qwen2VLImageProcessorPil and PatchEmbed, a Conv3d, as shipped",
    "transformers' processor, patched patch embedding": "the same with vpt_kernels.patch on the embedding only",
    "transformers, not patched": "the same model, weights and cache without vpt_kernels.patch",
}
