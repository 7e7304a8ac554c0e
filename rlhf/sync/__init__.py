"""Sends the learner's weights to the engine and checks that the engine samples from them."""
