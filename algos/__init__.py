"""Pure functions on tensors: advantages, ratios, surrogates, reductions, KL; algorithms as values of them."""
