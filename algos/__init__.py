"""Pure functions on tensors: advantages, ratios, surrogates, reductions, KL; algorithms combine them."""
