#!/usr/bin/env bash
# A search on Slurm: sbatch slurm.sh. Ray starts on all nodes of the job, and the command runs on the first one.
# To change: the resources, the environment, SHARDS and RESULTS (a file system or bucket that all nodes reach).
#SBATCH --job-name=tune-ego
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-task=1
#SBATCH --cpus-per-task=16
#SBATCH --time=24:00:00
#SBATCH --signal=B:TERM@120
set -euo pipefail
source "$HOME/venv/bin/activate"
export RAY_AUTH_MODE=token # the token: ray get-auth-token --generate, once, in the home that all nodes share

head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1) # this script runs there, too
command=(tune-ego tune full --data SHARDS --storage RESULTS --name full --address auto)
if tune-ego status RESULTS/full > /dev/null 2>&1; then # the job was queued again
    command=(tune-ego resume RESULTS/full --address auto)
fi
pid=$(mktemp)
export pid
srun --export=ALL ray symmetric-run --address "$head:6379" --min-nodes "$SLURM_JOB_NUM_NODES" \
    --num-cpus "$SLURM_CPUS_PER_TASK" --num-gpus 1 -- bash -c 'echo $$ > "$pid"; exec "$@"' bash "${command[@]}" &
srun=$!
# Two minutes before the end the driver writes checkpoints. A signal to srun would kill all of Ray instead.
trap 'kill -TERM "$(cat "$pid")" || true; wait "$srun"; exit' TERM
wait "$srun" # its exit code is the job's
