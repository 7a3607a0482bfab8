// Implementations → torch.library. The schemas are defined by vpt_kernels/library.py.
#include "ops.h"

STABLE_TORCH_LIBRARY_IMPL(vpt_kernels, CPU, m) {
  m.impl("roi_patches.cpp", TORCH_BOX(&vpt::cpu::roi_patches));
  m.impl("roi_patch_embed.cpp", TORCH_BOX(&vpt::cpu::roi_patch_embed));
  m.impl("roi_patch_embed_into.cpp", TORCH_BOX(&vpt::cpu::roi_patch_embed_into));
  m.impl("control_cross_attention.cpp", TORCH_BOX(&vpt::cpu::control_cross_attention));
  m.impl("control_cross_attention_into.cpp", TORCH_BOX(&vpt::cpu::control_cross_attention_into));
  m.impl("append_visual_kv.cpp", TORCH_BOX(&vpt::cpu::append_visual_kv));
  m.impl("append_visual_kv_.cpp", TORCH_BOX(&vpt::cpu::append_visual_kv_));
}
