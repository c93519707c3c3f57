"""The application where Serve's own HAProxy stands before it: the tests that look at what a proxy could change."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.serve.running import Service, application, running
from tests.serve.test_service import (  # noqa: F401
    client,
    cluster,
    expected,
    test_a_client_that_leaves_aborts_its_generation,
    test_a_conversation_with_pictures,
    test_a_stream_gives_the_same_text_and_its_usage,
    test_a_stream_on_the_wire,
    test_above_the_queue_is_429_and_below_it_an_answer,
    test_huge_headers_reach_nobody,
    test_many_at_once_get_the_answers_of_each_alone,
    test_one_key_over_two_ingresses,
    test_probes_need_no_key_and_requests_have_ids,
    url,
)

pytestmark = pytest.mark.soak


@pytest.fixture(scope="module")
def service(artifact: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    shared = {"checkpoint": str(artifact), "cpus": 0.15}
    narrow = {"name": "narrow", "auth": "off", "max_ongoing_requests": 1, "max_queued_requests": 2}
    with running(
        tmp_path_factory.mktemp("service") / "log",
        application("main", "/", **shared, ingress_replicas=2, key_concurrency=30),
        application("narrow", "/narrow", **shared, **narrow, min_replicas=2, max_replicas=2),
        RAY_SERVE_ENABLE_HA_PROXY="1",
    ) as service:
        yield service
