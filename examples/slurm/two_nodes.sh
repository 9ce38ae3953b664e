#!/usr/bin/env bash
# Two nodes of eight GPUs under Slurm, sharded by FSDP2: sbatch examples/slurm/two_nodes.sh CONFIG.yaml [--key value ...]
# The configuration must not set optim_in_backward, which is for one GPU. Not yet run on a cluster.
#
# Ten minutes before the time is up every rank saves a checkpoint and the job goes back into the queue; so it does after a
# preemption. It goes on from the last complete checkpoint, on as many GPUs as it then gets.
#SBATCH --job-name=amopo
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@600
set -uo pipefail

# The launcher hands SIGTERM on to its workers (not SIGUSR1, which ends it), and waits for them to save: 30 s by default.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=480

stopped=
trap 'stopped=1; scancel --signal=TERM "$SLURM_JOB_ID"' USR1  # the steps, not this script

host=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
processes=$((SLURM_JOB_NUM_NODES * SLURM_GPUS_ON_NODE))
# shellcheck disable=SC2016  # each node's own SLURM_NODEID
srun bash -c 'exec accelerate launch --config_file configs/accelerate/fsdp2.yaml \
    --num_machines "$SLURM_JOB_NUM_NODES" --machine_rank "$SLURM_NODEID" --num_processes "$0" \
    --main_process_ip "$1" --main_process_port 29500 --rdzv_backend c10d \
    -m amopo_fast.cli train --config "${@:2}" --resume_from_checkpoint auto' "$processes" "$host" "$@" &
srun=$!
wait "$srun"
status=$?
while kill -0 "$srun" 2>/dev/null; do  # a signal ends `wait` before srun has ended
    wait "$srun"
    status=$?
done
if [ -n "$stopped" ]; then scontrol requeue "$SLURM_JOB_ID"; fi
exit "$status"
