"""Training with norms of several providers: the same start, the same batches, and the losses, times and memory side by side.

Except in functions that run later, no module here imports Triton or what imports it: `main` first decides whether Triton interprets.
"""
