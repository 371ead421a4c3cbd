# What every training job does around its one srun; sourced by train.sbatch and torchrun.sbatch.
#
# A job is started again (scontrol requeue, same job number, next SLURM_RESTART_COUNT) when the ranks ask for it with
# exit code 75: after a signal they have saved, after a hang they have named the rank. It is also started again when a
# rank was killed, as long as a checkpoint has been added since this start, so that a fault that comes back ends the
# job instead of repeating it for ever. A node that is lost is Slurm's own affair: `#SBATCH --requeue`.

REQUEUE=75
MAX_IDLE_RESTARTS=3 # in a row, without a new checkpoint

# Refuse what cannot be trained: two members of an array would share one run_dir.
refuse_arrays() {
    [ -z "${SLURM_ARRAY_TASK_ID:-}" ] && return
    echo "expertpipe: job arrays are not for training, each member would write into the same run_dir: sbatch one job a run" >&2
    exit 2
}

# The ranks' address: the first node of the job; the port differs between jobs, and between starts of one job.
rendezvous() {
    MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
    MASTER_PORT=$((20000 + (SLURM_JOB_ID * 16 + ${SLURM_RESTART_COUNT:-0}) % 10000))
    export MASTER_ADDR MASTER_PORT
}

newest_checkpoint() { ls -d "$run_dir"/checkpoints/step-* 2>/dev/null | sort | tail -n 1; }

# Everything wrong with the run, before a task starts; sets run_dir. Arguments: processes, then overrides.
check_run() {
    local processes=$1
    shift
    RANK=0 WORLD_SIZE=$processes python -m launcher train --check "$@" || exit
    run_dir=$(python -m launcher train --print-config "$@" | sed -n 's/^run_dir: //p')
    checkpoint_before=$(newest_checkpoint)
    # beside the ranks' stacks, instead of in a cache folder of each node (see env.sh)
    export TORCH_FR_DUMP_TEMP_FILE="${TORCH_FR_DUMP_TEMP_FILE:-$(realpath -m "$run_dir")/ranks/collectives_rank}"
}

# A signal to this shell (USR1 before the time limit, TERM at preemption) is handed to the tasks, if there are any yet.
asked= step= code=0
trap 'asked=1; [ -z "$step" ] || kill -USR1 "$step" 2>/dev/null' USR1 TERM

# Run srun; its exit code is in `code`. In the background, because bash runs a trap only between commands.
supervise() {
    srun "$@" &
    step=$!
    [ -z "$asked" ] || kill -USR1 "$step"
    wait "$step"
    code=$?
    while kill -0 "$step" 2>/dev/null; do # the wait was cut short by a signal
        wait "$step"
        code=$?
    done
}

# End the job with `code`, or put it back into the queue.
finish() {
    local count=0 reason=
    [ -f "$run_dir/ranks/hang.txt" ] && [ "$code" -ne 0 ] && reason="a rank hung: $(cat "$run_dir/ranks/hang.txt")"
    [ "$code" -gt 128 ] && reason=${reason:-"a task was killed (exit code $code)"}
    [ "$code" -eq "$REQUEUE" ] && reason=${reason:-"the ranks saved and asked for it"}
    [ -n "$asked" ] && [ "$code" -ne 0 ] && reason="a signal came, the ranks saved"
    [ -z "$reason" ] && exit "$code"
    if [ "$(squeue --noheader --jobs "$SLURM_JOB_ID" --format %T)" != RUNNING ]; then
        exit "$code" # cancelled by a person: Slurm's TERM looks the same to the ranks
    fi
    if [ "$(newest_checkpoint)" = "$checkpoint_before" ]; then
        count=$(($(cat "$run_dir/idle_restarts" 2>/dev/null || echo 0) + 1))
        if [ "$count" -gt "$MAX_IDLE_RESTARTS" ]; then
            echo "expertpipe: $reason; not started again: $MAX_IDLE_RESTARTS restarts have added no checkpoint" >&2
            exit 1
        fi
    fi
    echo "$count" >"$run_dir/idle_restarts"
    echo "expertpipe: $reason; job $SLURM_JOB_ID goes back into the queue"
    scontrol requeue "$SLURM_JOB_ID"
    sleep 60 # Slurm ends this shell
}
