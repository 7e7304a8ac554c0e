"""The benchmark of step rewards: which steps of a chain are right, and where they end."""

from __future__ import annotations

import random

from benchmarks.step_rewards import chain, each_step, judged, outcome, wrong_steps


def test_a_step_is_right_where_its_result_is_that_of_the_digits_so_far():
    # modulo 4: 3 + 0 = 3, + 2 = 1, + 3 = 0; the second is wrong, then repeated rightly
    text, digits = "3 0 3 ; 3 2 0 ; again 3 2 1 ; 1 3 0 ; = 0 .", [3, 0, 2, 3]
    assert judged(text, digits) == [(7, True), (15, False), (29, True), (37, True)]
    assert each_step([text], [digits]) == [[(7, 0.0), (15, -1.0), (29, 0.0), (37, 0.0)]]
    assert wrong_steps([text], [digits]) == [-1.0] and outcome([text], [digits]) == [1.0]
    # behind an error every step is wrong, however rightly it adds, and so is one for which there is no digit
    text = "3 0 2 ; 2 2 0 ; 0 3 3 ; 3 3 2 ; = 2 ."
    assert [right for _, right in judged(text, digits)] == [False] * 4
    assert outcome([text, "3 0 3 ; = 0"], [digits] * 2) == [0.0, 0.0]


def test_the_chains_that_are_taught_are_read_as_they_are_written():
    rng = random.Random(0)
    found = [judged(chain([3, 0, 2, 3], rng), [3, 0, 2, 3]) for _ in range(400)]
    lengths = [len(steps) for steps in found]
    # 3 / (1 - .35) = 4.6 steps
    assert min(lengths) == 3 and 4.3 < sum(lengths) / 400 < 4.9
    # the first step is wrong in one of five
    assert 50 < sum(not steps[0][1] for steps in found) < 110
