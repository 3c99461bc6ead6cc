"""pretrain: learn to go on with text. A recipe without a list of steps is this one step.

It is the stages tokens, train and model, in the run's own folder where it is the only step and in steps/NAME otherwise.
The first step of a run begins with random weights, or with those of the recipe's ``init``; a later one goes on from the
model of the step before.
"""

from __future__ import annotations

from shenhong.stages.training import Training


class Pretrain(Training):
    takes_model = False


STEP = Pretrain
