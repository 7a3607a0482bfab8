"""Vision, language, encoders and caches live here, tensors in and tensors out; it may import checkpoint, text, config
and vpt_kernels."""
