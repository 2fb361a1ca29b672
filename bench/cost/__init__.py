"""What the norms of a decoder layer cost, counted without a GPU: launches, bytes moved, bytes kept for the backward."""
