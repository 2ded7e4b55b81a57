"""What an evaluation acts in: the right world, the right tasks. More in test_twinbrain_runs.py."""

from dataclasses import replace

import numpy as np
import pytest

import common
import twinbrain
from worlds import loop

CFG = replace(twinbrain.Config(), size=32, wrist_size=16)


class Still:
    """Does nothing, as trained on recordings of so many cameras and numbers."""

    def __init__(self, cameras=2, numbers=7):
        self.stats = {"action": {"q01": [0.0] * numbers}, "cameras": ["front", "hand"][:cameras]}

    def act(self, observations, instructions, rng):
        return np.zeros((len(observations), 8, len(self.stats["action"]["q01"])), np.float32)


@pytest.mark.parametrize("made, words", [
    (dict(cameras=1), "2 cameras (static, wrist) and actions of 7 numbers, the policy was trained "
                      "with 1 (front) and 7"),
    (dict(numbers=4), "trained with 2 (front, hand) and 4"), (dict(numbers=14), "and 14"),
])  # fmt: skip
def test_a_policy_of_another_robot_does_not_act(made, words):
    starts = loop.starts_of("tabletop:bridge", "in", 2, 0)
    with pytest.raises(common.UserError) as error:
        loop.rollout(Still(**made), CFG, "tabletop:bridge", starts)
    assert words in str(error.value) and "\n" not in str(error.value)
    assert loop.rollout(Still(), CFG, "tabletop:bridge", starts)[0] == [0, 0]
