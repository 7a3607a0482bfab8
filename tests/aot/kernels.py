"""Every compilation that the tests demand."""

from tests.aot import append_and_control, roi

VARIANTS = (*append_and_control.VARIANTS, *roi.VARIANTS)
