"""From tensors to launched kernels. Nothing here knows autograd."""
