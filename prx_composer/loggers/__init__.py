"""Where numbers and pictures go: `metrics.jsonl`, wandb, TensorBoard, MLflow."""
