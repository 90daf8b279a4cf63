#!/usr/bin/env bash
# Four nodes of eight GPUs: sbatch recipes/speedrun_24h/slurm.sh [key=value …]
# The run folder (runs/ by default) and the data must lie on a file system that all nodes share.
#SBATCH --job-name=speedrun_24h
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=96
#SBATCH --exclusive
#SBATCH --time=12:00:00
#SBATCH --signal=TERM@180    # three minutes before the limit every process is asked to stop; it writes a checkpoint
#SBATCH --requeue            # a failed node or a preemption: the job starts again, and the run goes on
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
set -uo pipefail

export MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1) MASTER_PORT=29500
export ARGUMENTS="$*"

srun --kill-on-bad-exit=1 bash -c '
    exec uv run --no-sync composer -n 8 \
        --world_size $((8 * SLURM_JOB_NUM_NODES)) --node_rank "$SLURM_NODEID" --base_rank $((8 * SLURM_NODEID)) \
        --master_addr "$MASTER_ADDR" --master_port "$MASTER_PORT" \
        train.py yamls/24h.yaml $ARGUMENTS
'
code=$?
# 143: stopped with a checkpoint, by the limit of this job. The time budget is of training, however many jobs it takes.
[ "$code" -ne 143 ] || scontrol requeue "$SLURM_JOB_ID"
exit "$code"
