"""Parts of the learner that a preference method alone has."""
