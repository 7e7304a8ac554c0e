"""Checks of `data.improve_prompt` and `data.improve_column`: who makes the answers that are improved."""

from __future__ import annotations

from collections.abc import Iterator

from rlhf.algos.algorithm import Algorithm
from rlhf.config.run import Config


def revision_problems(config: Config, algorithm: Algorithm) -> Iterator[str]:
    """A line for each problem."""
    name, column = config.algorithm["name"], config.data.improve_column
    revises = algorithm.preference is not None and algorithm.preference.form.revises
    if column is not None and config.data.improve_prompt is None:
        yield (
            f"data.improve_column is {column}, an answer that the policy is asked to improve: say in which "
            "words, as data.improve_prompt='Improve your answer.'"
        )
    if column is not None and (config.environment.path or revises):
        other = f"algorithm {name} makes second answers itself" if revises else "an environment answers too"
        yield f"data.improve_column has the policy improve answers of the data, but {other}: leave one out"
    if not revises:
        return
    if config.data.improve_prompt is None:
        yield (
            f"algorithm {name} learns to improve an answer, but data.improve_prompt is not set: say how the "
            "model is asked to, as data.improve_prompt='Improve your answer.'"
        )
    if config.pairs.rule in ("all", "dno_prct"):
        yield (
            f"pairs.rule is {config.pairs.rule}, which gives several pairs of a prompt, but {name} makes "
            "second answers of one pair: take best_worst, or another rule that gives one"
        )
    if config.data.precompute_reference:
        yield f"data.precompute_reference scores the data alone, but {name} makes second answers of it"
