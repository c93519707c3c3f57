"""The notice that a node of the group will be taken away: a checkpoint is due before it is."""

from __future__ import annotations

from ray.train.v2._internal.execution.context import get_train_context
from ray.train.v2.api.preemption import PreemptionInfo


class Notice:
    """What Ray tells this worker. The public `ray.train.get_preemption_info` makes all ranks meet in an actor, which no
    step is to wait for; so the training asks here, and its ranks agree in a message that they exchange anyway."""

    def __init__(self) -> None:
        self._heard: PreemptionInfo | None = None

    def given(self) -> bool:
        """Whether there is one since which no checkpoint was begun."""
        return self._info() != self._heard

    def heard(self) -> None:
        """A checkpoint was begun."""
        self._heard = self._info()

    def _info(self) -> PreemptionInfo | None:
        return get_train_context().preemption_context.preemption_info
