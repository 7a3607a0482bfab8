// Implementations → torch.library. The schemas are defined by vpt_kernels/library.py.
#include "ops.h"

using Append = vpt::AppendForms<vpt::cpu::append>;
using Control = vpt::ControlForms<vpt::cpu::project>;
using Packed = vpt::PackedForms<vpt::cpu::multiply_packed>;

STABLE_TORCH_LIBRARY_IMPL(vpt_kernels, CPU, m) {
  m.impl("roi_patches.cpp", TORCH_BOX(&vpt::cpu::roi_patches));
  m.impl("roi_patch_embed.cpp", TORCH_BOX(&vpt::cpu::roi_patch_embed));
  m.impl("roi_patch_embed_into.cpp", TORCH_BOX(&vpt::cpu::roi_patch_embed_into));
  m.impl("control_cross_attention.cpp", TORCH_BOX(&Control::fresh));
  m.impl("control_cross_attention_into.cpp", TORCH_BOX(&Control::into));
  m.impl("append_visual_kv.cpp", TORCH_BOX(&Append::fresh));
  m.impl("append_visual_kv_.cpp", TORCH_BOX(&Append::in_place));
  m.impl("cached_attention.cpp", TORCH_BOX(&vpt::cpu::cached_attention));
  m.impl("packed_linear.cpp", TORCH_BOX(&Packed::fresh));
  m.impl("packed_linear_into.cpp", TORCH_BOX(&Packed::into));
}
