"""Traces by OpenTelemetry, where OTEL_EXPORTER_OTLP_ENDPOINT names a collector: Serve's own spans, sent by OTLP.

Serve makes a span of each request in the ingress and one in the replica, with the request's id; a client's
`traceparent` is their parent where the proxies trace too (see config.yaml).
"""

import os
from typing import Any

ENDPOINT = "OTEL_EXPORTER_OTLP_ENDPOINT"


def exporter() -> list[Any]:
    """Span processors, as Serve asks for them in each process. Settings are OpenTelemetry's variables."""
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    return [BatchSpanProcessor(OTLPSpanExporter())]


def environment() -> dict[str, str]:
    """What a replica's process needs to trace; empty where no collector is named.

    Headers hold a collector's keys, and Ray logs this environment: they are where the node's own has them.
    """
    if not os.environ.get(ENDPOINT):
        return {}
    named = {name: value for name, value in os.environ.items() if name.startswith("OTEL_")}
    own = {name: value for name, value in named.items() if not name.endswith("_HEADERS")}
    ratio = os.environ.get("RAY_SERVE_TRACING_SAMPLING_RATIO", "1.0")
    serves = {
        "RAY_SERVE_TRACING_EXPORTER_IMPORT_PATH": "serve.tracing:exporter",
        "RAY_SERVE_TRACING_SAMPLING_RATIO": ratio,
    }
    return own | serves
