"""wandb, TensorBoard and MLflow: Composer's loggers, with one run for all of a run's restarts.

tracker.py      what they have in common          runs.py   which of the tracker's runs this one is
wandb.py        tensorboard.py       mlflow.py
"""

from prx_composer.tracking.tracker import Tracker, log_checkpoint, log_drawings

__all__ = ["Tracker", "log_checkpoint", "log_drawings"]
