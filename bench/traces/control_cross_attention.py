import torch.nn.functional as F


def run(
    features,
    control,
    cu_seqlens,
    feature_norm_weight,
    feature_norm_bias,
    feature_weight,
    feature_bias,
    control_norm_weight,
    control_norm_bias,
    control_weight,
    control_bias,
):
    """Return f + (f·k)k, f = Linear(LN(features)), one k = Linear(LN(control)) an image; float32 until the end."""
    dtype = features.dtype

    def wide(*tensors):
        return [tensor.float() for tensor in tensors]

    f = F.layer_norm(features.float(), features.shape[-1:], *wide(feature_norm_weight, feature_norm_bias), 1e-5)
    f = F.linear(f, *wide(feature_weight, feature_bias))
    k = F.layer_norm(control.float(), control.shape[-1:], *wide(control_norm_weight, control_norm_bias), 1e-5)
    k = F.linear(k, *wide(control_weight, control_bias)).repeat_interleave(cu_seqlens.diff(), 0)
    return (f + (f * k).sum(-1, keepdim=True) * k).to(dtype)
