"""Every compilation that the tests demand."""

from tests.aot import append_and_control, attention, decode, fused, roi

VARIANTS = (*append_and_control.VARIANTS, *roi.VARIANTS, *attention.VARIANTS, *decode.VARIANTS, *fused.VARIANTS)
