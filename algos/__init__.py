"""Pure functions on tensors: advantages, ratios, surrogates, reductions, KL; and algorithms as values made of them."""
