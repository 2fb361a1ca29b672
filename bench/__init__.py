"""Measurements of triton_rmsnorm; run from a checkout."""
