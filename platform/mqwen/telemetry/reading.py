"""Data: what reading tasks emit as they read ahead, and training workers of the samples that they take."""

from mqwen.telemetry.metric import Counter, Histogram

DATASET = ("dataset",)  # the name of its folder

ROWS = Counter("mqwen_data_rows", "Rows that reading tasks built.", DATASET, "rows")
SAMPLES = Counter("mqwen_data_samples", "Samples of these rows, also those that could not be used.", DATASET, "samples")
READ_BYTES = Counter("mqwen_data_read_bytes", "Bytes of shards that reading tasks read.", DATASET, "bytes")
READ_SECONDS = Histogram(
    "mqwen_data_read_seconds",
    "Time of one read from storage: a run of neighbouring samples.",
    DATASET,
    "seconds",
    (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60),
)
QUARANTINED_SAMPLES = Counter(
    "mqwen_data_quarantined_samples",
    "Samples that training left out because they could not be used.",
    (*DATASET, "reason"),
    "samples",
)
