"""When a run evaluates, draws and saves: at intervals, and a budgeted run once at its beginning, to see what it costs."""

from collections.abc import Callable

from composer.core import Event, State

Due = Callable[[State, Event], bool]


def rehearsing(state: State) -> bool:
    """Whether what the end of the run does is to be done now, at full size; see `TimeBudget`."""
    return any(getattr(callback, "rehearsing", False) for callback in state.callbacks)


def with_rehearsal(due: Due, event: Event = Event.BATCH_CHECKPOINT) -> Due:
    """`due`, and also at the rehearsals' `event`; once per batch."""
    return once_per_batch(lambda state, at: due(state, at) or (at == event and rehearsing(state)))


def once_per_batch(due: Due) -> Due:
    """`due`, which is asked every time, but not twice in a batch: where an epoch ends with it, say."""
    last = -1

    def check(state: State, event: Event) -> bool:
        nonlocal last
        is_due = bool(due(state, event))
        batch = int(state.timestamp.batch)
        if not is_due or batch == last:
            return False
        last = batch
        return True

    return check
