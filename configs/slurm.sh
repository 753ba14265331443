#!/bin/bash
# A run that outlives its time limit: ten minutes before it Slurm sends SIGUSR1, the run saves a checkpoint after the
# step in progress and ends, and the job is queued again, where it goes on. Ten minutes must cover the longest step and
# one save.
#
#     sbatch configs/slurm.sh vcr1-fast train CONFIG.yaml
#     sbatch --gpus-per-node=8 configs/slurm.sh torchrun --nproc-per-node=8 -m vcr1_fast train CONFIG.yaml
#
#SBATCH --job-name=vcr1-fast
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --gpus-per-node=1
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@600
#SBATCH --requeue
#SBATCH --open-mode=append

was_asked=
# To the run, or where that is torchrun to its ranks. torchrun itself must ignore the signal: the one it handles, SIGTERM,
# gives the ranks 30 s, and without a handler it would die and leave them behind.
trap 'was_asked=1; kill -USR1 "$run"; pkill -USR1 -P "$run"' USR1
(trap '' USR1; exec "$@") &
run=$!

wait "$run"
code=$?
while kill -0 "$run" 2>/dev/null; do # `wait` ends with the trap, too
    wait "$run"
    code=$?
done
[ -z "$was_asked" ] || [ "$code" -eq 0 ] || scontrol requeue "$SLURM_JOB_ID"
exit "$code"
