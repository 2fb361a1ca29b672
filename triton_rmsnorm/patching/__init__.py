"""Patching: the RMS norms of existing models, recognized by what they compute and replaced in place."""

from triton_rmsnorm.patching.patching import patch, patched, unpatch
from triton_rmsnorm.patching.report import Report, Row, Status

__all__ = ["Report", "Row", "Status", "patch", "patched", "unpatch"]
