"""The best validation loss of a run so far, and when to stop because it improves no more."""

import math
from typing import NamedTuple


class Best(NamedTuple):
    """The lowest validation loss so far, the step that had it, and how many evaluations have come since."""

    loss: float | None = None
    step: int = 0
    since: int = 0

    def after(self, step: int, loss: float) -> "Best":
        """Return what is the best after an evaluation at `step`; a loss that is not finite is never the best."""
        if math.isfinite(loss) and (self.loss is None or loss < self.loss):
            return Best(loss, step)
        return self._replace(since=self.since + 1)

    def ends(self, patience: int) -> bool:
        """Return whether the last `patience` evaluations brought no new best; 0 is endless patience."""
        return 0 < patience <= self.since
