"""Patching: the RMS norms of existing models, recognized by what they compute and replaced in place."""

from triton_rmsnorm.patching.patching import Report, Row, patch, patched, unpatch

__all__ = ["Report", "Row", "patch", "patched", "unpatch"]
