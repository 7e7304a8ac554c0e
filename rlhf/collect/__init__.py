"""What a step learns from: prompts -> completions -> scored groups, from rollouts, data or both."""
