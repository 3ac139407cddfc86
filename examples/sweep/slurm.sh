#!/bin/bash
# A comparison on several machines of a SLURM cluster, its cells as tasks of Ray:
#     sbatch examples/sweep/slurm.sh --model roberta-base --train reviews.csv --methods rosa,lora \
#         --ranks 2,8 --output runs/reviews-compared
# Submit it from a folder that all machines see, with rosa installed there or in an environment that is
# activated here. Where the time ends, the same line goes on.
#SBATCH --job-name=rosa-compare
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
#SBATCH --time=12:00:00
set -euo pipefail

cells_per_machine=1 # with GPUs: as many as a machine has
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
address=$(srun --nodes=1 --ntasks=1 --nodelist="$head" hostname --ip-address | awk '{print $1}')

srun ray symmetric-run --address "$address:6379" --min-nodes "$SLURM_JOB_NUM_NODES" \
    --disable-usage-stats -- \
    rosa compare --executor ray --jobs "$((SLURM_JOB_NUM_NODES * cells_per_machine))" "$@"
