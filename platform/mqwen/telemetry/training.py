"""Training: what rank 0 emits for the whole run, and its driver of itself."""

from mqwen.telemetry.metric import Counter, Gauge, Histogram

RUN = ("run",)  # its name

DRIVEN = Gauge("mqwen_train_driven", "1 as long as the run's driver lives, also where it waits for workers.", RUN)
STEP = Gauge("mqwen_train_step", "The step that was done last.", RUN)
LAST_STEP_TIMESTAMP = Gauge(
    "mqwen_train_last_step_timestamp_seconds",
    "When the last step was done, in Unix time; time() less it grows while a run hangs.",
    RUN,
    "seconds",
)
LOSS = Gauge("mqwen_train_loss", "Mean loss of the last step's labelled positions.", RUN)
HELD_OUT_LOSS = Gauge(
    "mqwen_train_held_out_loss", "Mean loss of the held-out labelled positions, at the last evaluation.", RUN
)
LEARNING_RATE = Gauge("mqwen_train_learning_rate", "The largest learning rate of the last step.", RUN)
GRADIENT_NORM = Gauge("mqwen_train_gradient_norm", "Global norm of the last step's gradient, before clipping.", RUN)

POSITIONS = Counter(
    "mqwen_train_positions", "Positions trained on, pictures expanded; the rate is positions/s.", RUN, "positions"
)
TOKENS = Counter("mqwen_train_tokens", "Labelled positions trained on; the rate is tokens/s.", RUN, "tokens")
IMAGES = Counter("mqwen_train_images", "Pictures trained on; the rate is images/s.", RUN, "images")
DATA_WAIT_SECONDS = Counter(
    "mqwen_train_data_wait_seconds",
    "Time that a rank waited for rows, the ranks' mean; the rate is the share of time.",
    RUN,
    "seconds",
)
LEFT_OUT_STEPS = Counter(
    "mqwen_train_left_out_steps",
    "Steps left out for their loss or gradient: no number, or a spike.",
    RUN,
    "steps",
)

MFU = Gauge("mqwen_train_mfu", "Share of the workers' peak rate that the last step's model computations reached.", RUN)
GOODPUT = Gauge("mqwen_train_goodput", "Share of the time since the job's start that went into steps that count.", RUN)
MEMORY_BYTES = Gauge("mqwen_train_memory_bytes", "The most memory that rank 0 held so far on its device.", RUN, "bytes")

STEP_SECONDS = Histogram(
    "mqwen_train_step_seconds",
    "Time of a step, the wait for its rows included.",
    RUN,
    "seconds",
    (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2, 3, 5, 7.5, 10, 15, 20, 30, 60, 120, 300),
)
CHECKPOINT_SECONDS = Histogram(
    "mqwen_train_checkpoint_seconds",
    "Time from the beginning of a checkpoint to its commit.",
    RUN,
    "seconds",
    (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 30, 60, 120, 300, 600),
)
LAST_CHECKPOINT_TIMESTAMP = Gauge(
    "mqwen_train_last_checkpoint_timestamp_seconds",
    "When a checkpoint was committed last, in Unix time; time() less it is the checkpoint's age.",
    RUN,
    "seconds",
)
WORKER_GROUP_STARTS = Counter(
    "mqwen_train_worker_group_starts", "Starts of the run's workers; each but a job's first is a restart.", RUN
)
