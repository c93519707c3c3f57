"""S3 as the environment describes it: endpoint, region and credentials, from the places that AWS's tools look at."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from functools import lru_cache
from urllib.parse import urlsplit

import pyarrow.fs as pafs

from mqwen.storage.errors import StorageError

# A request that fails is tried again, with growing pauses: a server that restarts costs no run. A dead one is an error
# after about six seconds where it refuses, half a minute where it swallows connections, a minute where it is mute.
ATTEMPTS = 5
CONNECT_TIMEOUT = 3.0  # seconds
REQUEST_TIMEOUT = 10.0  # seconds without a byte
NO_CREDENTIALS = (
    "no AWS credentials were found; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE to a profile"
)


@dataclass(frozen=True)
class S3Settings:
    """How to reach a bucket. Keys that do not expire are here and travel to other nodes.

    Where `access_key` is None the credentials renew themselves (roles of instances, pods and containers, single
    sign-on): each process then finds its own, through the SDK in Arrow.
    """

    endpoint: str | None
    region: str
    ca_bundle: str | None
    access_key: str | None = None
    secret_key: str | None = field(default=None, repr=False)
    session_token: str | None = field(default=None, repr=False)


class S3(pafs.S3FileSystem):
    """Arrow's S3 with our limits. One for each settings in a process, also of those that came by pickle: they share
    their connections, and Arrow's own pickles would forget the retries."""

    def __init__(self, settings: S3Settings) -> None:
        endpoint = urlsplit(settings.endpoint) if settings.endpoint else None
        super().__init__(
            access_key=settings.access_key,
            secret_key=settings.secret_key,
            session_token=settings.session_token,
            region=settings.region,
            scheme=endpoint.scheme if endpoint else None,
            endpoint_override=endpoint.netloc + endpoint.path.rstrip("/") if endpoint else None,
            tls_ca_file_path=settings.ca_bundle,
            connect_timeout=CONNECT_TIMEOUT,
            request_timeout=REQUEST_TIMEOUT,
            retry_strategy=pafs.AwsStandardS3RetryStrategy(max_attempts=ATTEMPTS),
        )
        self.settings = settings

    def __reduce__(self) -> tuple:
        return connect, (self.settings,)


@lru_cache
def connect(settings: S3Settings) -> S3:
    if settings.endpoint:
        # Else the SDK sends checksums in a form that many servers other than AWS's do not know, and refuse.
        os.environ.setdefault("AWS_REQUEST_CHECKSUM_CALCULATION", "when_required")
        os.environ.setdefault("AWS_RESPONSE_CHECKSUM_VALIDATION", "when_required")
    return S3(settings)


def find_settings() -> S3Settings:
    """The environment's settings. Raises StorageError where they lack something, or cannot serve a long run."""
    from botocore.credentials import RefreshableCredentials  # a fifth of a second, for those who use S3
    from botocore.exceptions import BotoCoreError
    from botocore.session import get_session

    session = get_session()
    try:
        endpoint = _endpoint(session.get_scoped_config())
        region = os.environ.get("AWS_REGION") or session.get_config_variable("region")
        ca_bundle = session.get_config_variable("ca_bundle")
        credentials = session.get_credentials()
    except BotoCoreError as error:
        raise StorageError(f"the AWS configuration cannot be used: {error}") from error
    if credentials is None:
        raise StorageError(NO_CREDENTIALS)
    if not (region or endpoint):
        raise StorageError(
            "no AWS region is set; set AWS_REGION to the bucket's, or AWS_ENDPOINT_URL for another server"
        )
    region = region or "us-east-1"  # what other servers call theirs
    if credentials.method == "assume-role":  # of these Arrow's SDK knows no way to get new ones
        raise StorageError(
            "the AWS profile assumes a role, whose keys would end before a run does; give this machine the role, "
            "or pass its keys for a while: eval $(aws configure export-credentials --format env)"
        )
    if isinstance(credentials, RefreshableCredentials):
        return S3Settings(endpoint, region, ca_bundle)
    keys = credentials.get_frozen_credentials()
    return S3Settings(endpoint, region, ca_bundle, keys.access_key, keys.secret_key, keys.token)


def _endpoint(profile: dict[str, str]) -> str | None:
    """Where another server than AWS holds the buckets."""
    named = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or profile.get("endpoint_url")
    if named and (urlsplit(named).scheme not in ("http", "https") or not urlsplit(named).netloc):
        raise StorageError(f"AWS_ENDPOINT_URL {named!r} is no endpoint; http://HOST:PORT or https://HOST is allowed")
    return named or None
