"""Serving: what replicas emit of their engine, and the HTTP side of its answers. The names are vLLM's."""

from mqwen.telemetry.metric import Counter, Gauge, Histogram

MODEL = ("model_name",)  # as clients ask for it
FIRST_TOKEN = (0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160)
NEXT_TOKEN = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 10, 40)
WHOLE_REQUEST = (0.05, 0.1, 0.2, 0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960)

NUM_REQUESTS_RUNNING = Gauge("mqwen_num_requests_running", "Requests that the engine works on.", MODEL)
NUM_REQUESTS_WAITING = Gauge("mqwen_num_requests_waiting", "Requests in the engine that wait for room.", MODEL)
KV_CACHE_USAGE_PERC = Gauge("mqwen_kv_cache_usage_perc", "Share of the KV cache's blocks in use; 1 is all.", MODEL)
NUM_PREEMPTIONS = Counter(
    "mqwen_num_preemptions", "Times that a request gave its KV blocks up and waited again.", MODEL
)
PREFIX_CACHE_QUERIES = Counter(
    "mqwen_prefix_cache_queries", "Positions of prompts looked for in the prefix cache.", MODEL
)
PREFIX_CACHE_HITS = Counter("mqwen_prefix_cache_hits", "Positions of prompts found there.", MODEL)
MM_CACHE_QUERIES = Counter("mqwen_mm_cache_queries", "Pictures looked for in the cache of their features.", MODEL)
MM_CACHE_HITS = Counter("mqwen_mm_cache_hits", "Pictures found there, so not encoded again.", MODEL)

REQUEST_SUCCESS = Counter(
    "mqwen_request_success",
    "Requests that the engine ended, by stop, length, or abort where the client left.",
    (*MODEL, "finished_reason"),
)
REQUEST_ERRORS = Counter(
    "mqwen_request_errors",
    "Errors that the HTTP side answered with, by HTTP status and the error's code.",
    (*MODEL, "status", "code"),
)
PROMPT_TOKENS = Counter("mqwen_prompt_tokens", "Positions of prompts worked on, pictures expanded.", MODEL, "tokens")
GENERATION_TOKENS = Counter("mqwen_generation_tokens", "Tokens generated.", MODEL, "tokens")

REQUEST_QUEUE_TIME_SECONDS = Histogram(
    "mqwen_request_queue_time_seconds",
    "Time from a request's arrival at the engine to its first step, its pictures' decoding included.",
    MODEL,
    "seconds",
    WHOLE_REQUEST,
)
TIME_TO_FIRST_TOKEN_SECONDS = Histogram(
    "mqwen_time_to_first_token_seconds",
    "Time from a request's arrival at the engine to its first token.",
    MODEL,
    "seconds",
    FIRST_TOKEN,
)
INTER_TOKEN_LATENCY_SECONDS = Histogram(
    "mqwen_inter_token_latency_seconds", "Time from a token to the next.", MODEL, "seconds", NEXT_TOKEN
)
E2E_REQUEST_LATENCY_SECONDS = Histogram(
    "mqwen_e2e_request_latency_seconds",
    "Time of an answered request at the HTTP side, its wait for a replica included.",
    MODEL,
    "seconds",
    WHOLE_REQUEST,
)
