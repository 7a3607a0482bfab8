// The CUDA implementations → torch.library. The schemas are defined by vpt_kernels/library.py.
#include "../ops.h"
#include "device.h"

using Append = vpt::AppendForms<vpt::cuda::append>;
using Control = vpt::ControlForms<vpt::cuda::project>;

STABLE_TORCH_LIBRARY_IMPL(vpt_kernels, VPT_DEVICE_KEY, m) {
  m.impl("roi_patches.cuda", TORCH_BOX(&vpt::cuda::roi_patches));
  m.impl("roi_patch_embed.cuda", TORCH_BOX(&vpt::cuda::roi_patch_embed));
  m.impl("roi_patch_embed_into.cuda", TORCH_BOX(&vpt::cuda::roi_patch_embed_into));
  m.impl("control_cross_attention.cuda", TORCH_BOX(&Control::fresh));
  m.impl("control_cross_attention_into.cuda", TORCH_BOX(&Control::into));
  m.impl("append_visual_kv.cuda", TORCH_BOX(&Append::fresh));
  m.impl("append_visual_kv_.cuda", TORCH_BOX(&Append::in_place));
}
