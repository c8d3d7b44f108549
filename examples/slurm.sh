#!/bin/bash
# One run on all GPUs of several nodes, from a folder that all of them see, with the environment of qaroma active:
#
#     sbatch examples/slurm.sh mine.yaml runs/mine
#
# Parsed and walked through with stand-ins for Slurm and torchrun; never run on a cluster.
#SBATCH --job-name=qaroma
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=2
#SBATCH --cpus-per-task=8
#SBATCH --time=12:00:00
#SBATCH --requeue
#SBATCH --signal=B:USR1@300
#SBATCH --open-mode=append

config=$1
run=$2
resume=()
[[ -f $run/config.yaml ]] && resume=(--resume)

first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=240 # seconds that a run has to end its step and save, where torchrun knows it
# Before the run begins, so that no signal finds the job without them. Five minutes before the time is over the run is
# told to save its state, and the job takes a place in the queue again. At a preemption Slurm does both by itself.
trap 'again=yes; scancel --signal=TERM "$SLURM_JOB_ID.0"' USR1
trap : TERM

# No node is killed because another has ended: the first may still be saving.
srun --kill-on-bad-exit=0 --cpus-per-task="$SLURM_CPUS_PER_TASK" \
    torchrun --nnodes="$SLURM_NNODES" --nproc-per-node=gpu --rdzv-id="$SLURM_JOB_ID" --rdzv-backend=c10d \
    --rdzv-endpoint="$first:$((29500 + SLURM_JOB_ID % 1000))" \
    -m qaroma finetune --config "$config" --output "$run" "${resume[@]}" &
step=$!

while kill -0 "$step" 2> /dev/null; do
    sleep 1 # and not wait, which misses a signal that comes just before it
done
wait "$step"
code=$?
[[ $again == yes && $code -ne 0 ]] && scontrol requeue "$SLURM_JOB_ID"
exit "$code"
