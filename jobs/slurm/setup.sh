# shellcheck shell=bash
# Sourced by the batch scripts, which Slurm runs from a copy: goes to where sbatch was called, the repository's root,
# sets the environment, defines `fit`. Each setting can be given in the environment of sbatch:
#   CONFIG    configuration of the run                                 STRATEGY   overlay: ddp, deepspeed_2, deepspeed_3
#   VENV      virtual environment, made by jobs/install.sh             HF_HOME    the hub's cache, on a shared file system
cd "$SLURM_SUBMIT_DIR" || exit
export PATH="${VENV:-$PWD/.venv}/bin:$PATH"

# Compute nodes often have no network: nothing waits for one. `wandb sync RUN/wandb/offline-run-*` uploads later.
export HF_HUB_OFFLINE="${HF_HUB_OFFLINE:-1}" WANDB_MODE="${WANDB_MODE:-offline}"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-1}}"
# Since Slurm 22.05 srun doesn't take the cores of a task from sbatch by itself.
export SRUN_CPUS_PER_TASK="${SLURM_CPUS_PER_TASK:-1}"
# export NCCL_DEBUG=INFO             # where several nodes don't find each other
# export NCCL_SOCKET_IFNAME=ib0      # the network between nodes, if it is not the first one

echo "job $SLURM_JOB_ID on ${SLURM_JOB_NODELIST:-?}, restart ${SLURM_RESTART_COUNT:-0}, $(git log -1 --format=%h 2>/dev/null || echo 'no git')"

# Shards (lit-prune shard) are read from the shared file system. Where that is slow, copy them to each node's own disk
# in the batch script, behind the line that sources this file:
#   srun --ntasks="$SLURM_NNODES" --ntasks-per-node=1 cp -r data/shards "$SLURM_TMPDIR"
#   fit --data.init_args.train="$SLURM_TMPDIR/shards" "$@"

# Trains on all tasks of the job, which Lightning makes one run; goes on from the last checkpoint if there is one.
#   fit [options of lightning fit]
fit() {
    srun --kill-on-bad-exit=1 lightning fit -c "${CONFIG:-configs/rcp.yaml}" \
        -c "configs/strategies/${STRATEGY:-ddp}.yaml" \
        --trainer.devices="$SLURM_NTASKS_PER_NODE" --trainer.num_nodes="$SLURM_NNODES" --ckpt_path last "$@"
}
