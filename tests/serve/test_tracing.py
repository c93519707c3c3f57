"""What replicas are told of the collector goes through Ray's logs."""

import pytest

from serve.tracing import ENDPOINT, environment


def test_no_key_of_the_collector_goes_through_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_SERVICE_NAME", "mine")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_HEADERS", "authorization=key")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TRACES_HEADERS", "authorization=key")
    monkeypatch.delenv(ENDPOINT, raising=False)
    assert environment() == {}
    monkeypatch.setenv(ENDPOINT, "http://127.0.0.1:4318")
    found = environment()
    assert found[ENDPOINT] == "http://127.0.0.1:4318"
    assert found["OTEL_SERVICE_NAME"] == "mine"
    assert "key" not in str(found)
