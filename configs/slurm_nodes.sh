#!/bin/bash
# What slurm.sh is, for several nodes: one torchrun on each, and the signal before the time limit goes to the ranks of
# the first node; one rank that is asked is enough, all save after the same step. Not tried under Slurm yet.
#
#     sbatch --nodes=2 configs/slurm_nodes.sh vcr1-fast train configs/qwen2_5_vl_7b_grounding_throughput_2x8xh100.yaml
#
#SBATCH --job-name=vcr1-fast
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@600
#SBATCH --requeue
#SBATCH --open-mode=append

[ "$1" = vcr1-fast ] || { echo "got $1, wanted vcr1-fast, its command and a config" >&2; exit 2; }
was_asked=
# torchrun starts a rank as `python -u -m vcr1_fast`; it must not get the signal itself, which would end it
trap 'was_asked=1; pkill -USR1 -u "$(id -u)" -f -- "^[^ ]+ -u -m vcr1_fast "' USR1
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
srun --ntasks-per-node=1 torchrun --nnodes="$SLURM_NNODES" --nproc-per-node="$SLURM_GPUS_ON_NODE" \
    --rdzv-id="$SLURM_JOB_ID" --rdzv-backend=c10d --rdzv-endpoint="$first:29500" -m vcr1_fast "${@:2}" &
run=$!

wait "$run"
code=$?
while kill -0 "$run" 2>/dev/null; do # `wait` ends with the trap, too
    wait "$run"
    code=$?
done
[ -z "$was_asked" ] || [ "$code" -eq 0 ] || scontrol requeue "$SLURM_JOB_ID"
exit "$code"
