"""Ends a run early without changing its schedule."""

from composer.core import Callback, State
from composer.loggers import Logger

from prx_composer.schedule.moments import Moment


class StopAfter(Callback):
    """Stops training at a time, with a checkpoint and the final evaluation, as a time slot of a cluster would.

    `max_duration`, and with it the learning rate and everything given as a part of the run, stays what it is: the same command
    without this callback and with `autoresume: true` goes on bit for bit. A shorter `max_duration` would be another schedule.

    Args:
        time: a `Moment`, such as "500ba", "2h" (of training, over all restarts) or "500ba or 0.5budget".
    """

    def __init__(self, time: str):
        self._time = Moment(time)

    def batch_end(self, state: State, logger: Logger) -> None:
        if self._time.has_come(state):
            state.stop_training()
