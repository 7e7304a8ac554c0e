"""Types that are made of tensors: candidates of truncated sampling, contrasts of a preference loss."""
