// a·b + c, fused where the instruction set can; included inside its region. Contraction is off for the whole library, as
// the resampling coefficients need it off: ask for it where it pays.
#pragma once

#if defined(__FMA__) || defined(__ARM_FEATURE_FMA)
#define VPT_FMA(a, b, c) __builtin_fmaf(a, b, c)
#else
#define VPT_FMA(a, b, c) ((a) * (b) + (c))
#endif
