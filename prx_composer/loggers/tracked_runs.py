"""tracking.json in the run folder: the id that each tracker knows this run by, so that a resumed run goes on in the same one."""

import json
import logging
from pathlib import Path

from prx_composer.common.files import write_whole

log = logging.getLogger(__name__)

TRACKING = "tracking.json"


def remembered_run(folder: Path, tracker: str) -> str | None:
    """The id of this run at a tracker, if it has been there before."""
    run_id = _read(folder).get(tracker)
    return run_id if isinstance(run_id, str) and run_id else None


def remember_run(folder: Path, tracker: str, run_id: str) -> None:
    """On rank 0. A disk that is full is no reason not to train."""
    known = _read(folder)
    if known.get(tracker) == run_id:
        return
    try:
        write_whole(folder / TRACKING, (json.dumps(known | {tracker: run_id}, indent=1) + "\n").encode())
    except OSError as error:
        log.warning("%s cannot be written (%s): a resumed run will be another one at %s.", folder / TRACKING, error, tracker)


def _read(folder: Path) -> dict[str, object]:
    try:
        content = json.loads((folder / TRACKING).read_text())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        log.warning("%s cannot be read (%s): trackers begin another run.", folder / TRACKING, error)
        return {}
    return content if isinstance(content, dict) else {}
