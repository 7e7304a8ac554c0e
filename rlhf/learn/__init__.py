"""Scored groups -> Experience -> updates of the policy, the critic and what else is learned."""
