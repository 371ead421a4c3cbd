"""Loss and gradient spikes: found before the update, from the medians of the last steps, the same on all ranks.

The state is part of a checkpoint, so a resumed run judges as the straight one would.
"""

import math
import statistics
from collections import deque
from typing import Any

from launcher.run_config import TrainConfig

WARM_UP_STEPS = 8  # without a judgement: a median of fewer means little


class SpikeGuard:
    """Judges each step by its loss and gradient norm, which all ranks see alike.

    train.spike_policy: `warn` updates all the same, `skip` and `rollback` do not.
    """

    def __init__(self, train: TrainConfig) -> None:
        self._train = train
        self._losses: deque[float] = deque(maxlen=train.spike_window)
        self._norms: deque[float] = deque(maxlen=train.spike_window)
        self.spike: str | None = None  # what was wrong with the step that was judged last

    def judge(self, loss: float, norm: float) -> bool:
        """Whether the step may update the weights. Spikes do not enter the medians."""
        self.spike = self._spike(loss, norm)
        if self.spike is None:
            self._losses.append(loss)
            self._norms.append(norm)
            return True
        return self._train.spike_policy == "warn"

    def _spike(self, loss: float, norm: float) -> str | None:
        if len(self._losses) < min(WARM_UP_STEPS, self._train.spike_window):
            return None
        usual, usual_norm = statistics.median(self._losses), statistics.median(self._norms)
        if loss > usual + self._train.spike_loss:
            return f"loss {loss:.4g}, median {usual:.4g} (train.spike_loss={self._train.spike_loss:g})"
        if norm > usual_norm * self._train.spike_grad_norm and math.isfinite(norm):
            limit = f"train.spike_grad_norm={self._train.spike_grad_norm:g}"
            return f"gradient norm {norm:.4g}, median {usual_norm:.4g} ({limit})"
        return None

    def state(self) -> dict[str, Any]:
        """As JSON."""
        return {"losses": list(self._losses), "norms": list(self._norms)}

    def load(self, state: dict[str, Any] | None) -> None:
        """Take over what `state` gave; None: begin anew."""
        for mine, theirs in ((self._losses, "losses"), (self._norms, "norms")):
            mine.clear()
            mine.extend((state or {}).get(theirs, ()))
