"""What each dashboard shows: its panels, each one or more PromQL expressions over declared metrics.

`$run`, `$model` and `$dataset` are the dashboards' variables. Ray marks each series with its process: sum over it.
"""

from dataclasses import dataclass

from mqwen.telemetry import reading, serving, storing, training
from mqwen.telemetry.metric import Counter, Gauge, Histogram

WINDOW = "$__rate_interval"
RUN, DATA, MODEL = '{run=~"$run"}', '{dataset=~"$dataset"}', '{model_name=~"$model"}'


@dataclass(frozen=True)
class Panel:
    """`queries` are legends and their expressions. `unit` is Grafana's name of it. `exporter` is who emits what Ray and
    mqwen do not."""

    title: str
    queries: dict[str, str]
    unit: str = "short"
    exporter: str = ""


@dataclass(frozen=True)
class Dashboard:
    """`variables` are labels by the variable's name, each with the metric that lists its values."""

    uid: str
    title: str
    variables: dict[str, tuple[str, str]]
    rows: dict[str, list[Panel]]


def rate(counter: Counter, where: str, by: str) -> str:
    return f"sum by ({by}) (rate({counter.exported}{where}[{WINDOW}]))"


def newest(gauge: Gauge, where: str, by: str = "run") -> str:
    """A gauge of one process, of which two are there for a moment after a restart."""
    return f"max by ({by}) ({gauge.exported}{where})"


def quantile(share: float, histogram: Histogram, where: str, by: str) -> str:
    buckets = f"sum by (le, {by}) (rate({histogram.exported}_bucket{where}[{WINDOW}]))"
    return f"histogram_quantile({share}, {buckets})"


def quantiles(title: str, histogram: Histogram, where: str, by: str) -> Panel:
    shares = {"p50": 0.5, "p95": 0.95, "p99": 0.99}
    legends = {f"{{{{{by}}}}} {name}": quantile(share, histogram, where, by) for name, share in shares.items()}
    return Panel(title, legends, "s")


def ratio(title: str, part: Counter, whole: Counter, where: str, by: str) -> Panel:
    parts, wholes = rate(part, where, by), rate(whole, where, by)  # where nothing was counted yet, the part is none
    return Panel(title, {f"{{{{{by}}}}}": f"({parts} or 0 * {wholes}) / {wholes}"}, "percentunit")


def one(title: str, gauge: Gauge, unit: str = "short", where: str = RUN, by: str = "run") -> Panel:
    return Panel(title, {f"{{{{{by}}}}}": newest(gauge, where, by)}, unit)


def flow(title: str, counter: Counter, unit: str, where: str = RUN, by: str = "run") -> Panel:
    return Panel(title, {f"{{{{{by}}}}}": rate(counter, where, by)}, unit)


RUN_VARIABLE = {"run": ("run", training.STEP.exported)}
MODEL_VARIABLE = {"model": ("model_name", serving.NUM_REQUESTS_RUNNING.exported)}
DATASET_VARIABLE = {"dataset": ("dataset", reading.ROWS.exported)}
MODEL_NAME = "model_name"

LOSS = one("Loss", training.LOSS)
MFU = one("MFU", training.MFU, "percentunit")
GOODPUT = one("Goodput", training.GOODPUT, "percentunit")
POSITIONS = flow("Positions per second", training.POSITIONS, "short")
DATA_WAIT = flow("Time spent waiting for data", training.DATA_WAIT_SECONDS, "percentunit")
CHECKPOINT_AGE = Panel(
    "Age of the last checkpoint", {"{{run}}": f"time() - {newest(training.LAST_CHECKPOINT_TIMESTAMP, RUN)}"}, "s"
)
FIRST_TOKEN = quantiles("Time to first token", serving.TIME_TO_FIRST_TOKEN_SECONDS, MODEL, MODEL_NAME)
REQUESTS = Panel(
    "Requests in the engines",
    {
        "{{model_name}} running": f"sum by (model_name) ({serving.NUM_REQUESTS_RUNNING.exported}{MODEL})",
        "{{model_name}} waiting": f"sum by (model_name) ({serving.NUM_REQUESTS_WAITING.exported}{MODEL})",
    },
)
ENDED = Panel(
    "Requests ended per second",
    {"{{finished_reason}}": rate(serving.REQUEST_SUCCESS, MODEL, "finished_reason")},
    "reqps",
)
KV_CACHE = one("KV cache in use, fullest replica", serving.KV_CACHE_USAGE_PERC, "percentunit", MODEL, MODEL_NAME)
STORAGE = Panel(
    "Requests refused by storage, per second",
    {"refused": f"sum(rate({storing.FAILED_REQUESTS.exported}[{WINDOW}])) or vector(0)"},
    "reqps",
)
NODES = Panel("CPU in use", {"{{instance}}": "avg by (instance) (ray_node_cpu_utilization)"}, "percent")
MEMORY = Panel("Memory in use", {"{{instance}}": "max by (instance) (ray_node_mem_used)"}, "bytes")
OBJECTS = Panel("Object store", {"{{Location}}": "sum by (Location) (ray_object_store_memory)"}, "bytes")
GPUS = Panel("GPU in use", {"GPU {{gpu}} {{Hostname}}": "DCGM_FI_DEV_GPU_UTIL"}, "percent", "DCGM")
GPU_MEMORY = Panel("GPU memory in use", {"GPU {{gpu}} {{Hostname}}": "DCGM_FI_DEV_FB_USED"}, "decmbytes", "DCGM")

DASHBOARDS = [
    Dashboard(
        "mqwen-overview",
        "MQWen: overview",
        RUN_VARIABLE | MODEL_VARIABLE,
        {
            "Training": [LOSS, POSITIONS, MFU, GOODPUT],
            "Serving": [FIRST_TOKEN, REQUESTS, ENDED, KV_CACHE],
            "Machines": [NODES, MEMORY, OBJECTS, STORAGE, GPUS],
        },
    ),
    Dashboard(
        "mqwen-training",
        "MQWen: training",
        RUN_VARIABLE,
        {
            "Learning": [
                LOSS,
                one("Held-out loss", training.HELD_OUT_LOSS),
                one("Gradient norm", training.GRADIENT_NORM),
                one("Learning rate", training.LEARNING_RATE),
                one("Step", training.STEP),
                Panel(
                    "Steps left out",
                    {
                        "{{run}}": f"sum by (run) ({training.LEFT_OUT_STEPS.exported}{RUN})"
                        f" or 0 * {newest(training.STEP, RUN)}"
                    },
                ),
            ],
            "Speed": [
                POSITIONS,
                flow("Labelled tokens per second", training.TOKENS, "short"),
                flow("Pictures per second", training.IMAGES, "short"),
                quantiles("Step time", training.STEP_SECONDS, RUN, "run"),
                MFU,
                DATA_WAIT,
                one("Memory of rank 0's device", training.MEMORY_BYTES, "bytes"),
                GPU_MEMORY,
            ],
            "Staying up": [
                GOODPUT,
                CHECKPOINT_AGE,
                quantiles("Checkpoint time", training.CHECKPOINT_SECONDS, RUN, "run"),
                Panel("Starts of workers", {"{{run}}": f"sum by (run) ({training.WORKER_GROUP_STARTS.exported}{RUN})"}),
            ],
        },
    ),
    Dashboard(
        "mqwen-data",
        "MQWen: data",
        DATASET_VARIABLE | RUN_VARIABLE,
        {
            "Reading": [
                flow("Rows per second", reading.ROWS, "short", DATA, "dataset"),
                flow("Samples per second", reading.SAMPLES, "short", DATA, "dataset"),
                flow("Bytes per second", reading.READ_BYTES, "Bps", DATA, "dataset"),
                quantiles("Time of a read", reading.READ_SECONDS, DATA, "dataset"),
                DATA_WAIT,
                STORAGE,
            ],
            "Samples": [
                Panel(
                    "Samples left out",
                    {
                        "{{dataset}} {{reason}}": "sum by (dataset, reason) "
                        f"({reading.QUARANTINED_SAMPLES.exported}{DATA})"
                        f" or 0 * sum by (dataset) ({reading.SAMPLES.exported}{DATA})"
                    },
                ),
                OBJECTS,
            ],
        },
    ),
    Dashboard(
        "mqwen-serving",
        "MQWen: serving",
        MODEL_VARIABLE,
        {
            "Latency": [
                FIRST_TOKEN,
                quantiles("Time from token to token", serving.INTER_TOKEN_LATENCY_SECONDS, MODEL, MODEL_NAME),
                quantiles("Time of a request", serving.E2E_REQUEST_LATENCY_SECONDS, MODEL, MODEL_NAME),
                quantiles("Time in the engine's queue", serving.REQUEST_QUEUE_TIME_SECONDS, MODEL, MODEL_NAME),
            ],
            "Load": [
                REQUESTS,
                ENDED,
                Panel(
                    "Errors per second",
                    {
                        "{{status}} {{code}}": f"{rate(serving.REQUEST_ERRORS, MODEL, 'status, code')}"
                        f" or 0 * sum(rate({serving.REQUEST_SUCCESS.exported}{MODEL}[{WINDOW}]))"
                    },
                    "reqps",
                ),
                flow("Prompt positions per second", serving.PROMPT_TOKENS, "short", MODEL, MODEL_NAME),
                flow("Generated tokens per second", serving.GENERATION_TOKENS, "short", MODEL, MODEL_NAME),
                Panel(
                    "Requests waiting for a replica",
                    {"{{deployment}}": "sum by (application, deployment) (ray_serve_deployment_queued_queries)"},
                ),
            ],
            "Engines": [
                KV_CACHE,
                ratio("Prefix cache hits", serving.PREFIX_CACHE_HITS, serving.PREFIX_CACHE_QUERIES, MODEL, MODEL_NAME),
                ratio("Picture cache hits", serving.MM_CACHE_HITS, serving.MM_CACHE_QUERIES, MODEL, MODEL_NAME),
                Panel(
                    "Preemptions",
                    {
                        "{{model_name}}": f"sum by (model_name) ({serving.NUM_PREEMPTIONS.exported}{MODEL})"
                        f" or 0 * sum by (model_name) ({serving.NUM_REQUESTS_RUNNING.exported}{MODEL})"
                    },
                ),
                Panel(
                    "Replicas",
                    {
                        "{{application}} {{deployment}} healthy": "sum by (application, deployment) "
                        "(ray_serve_deployment_replica_healthy)",
                        "{{application}} {{deployment}} wanted": "max by (application, deployment) "
                        "(ray_serve_autoscaling_target_replicas)",
                    },
                ),
                GPUS,
            ],
        },
    ),
]
