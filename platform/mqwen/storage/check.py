"""Does a place answer? Asked before anything starts: one small request each, and a clear answer in ten seconds."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from mqwen.storage.errors import StorageError
from mqwen.storage.location import Location, locate
from mqwen.storage.s3 import S3, S3Settings

TIMEOUT = 3  # seconds, for the connection and for the answer
ATTEMPTS = 2
JOBS_COPY = "working_dir_files"  # of a path inside what Ray unpacks of a submitted job's working directory
REFUSED = ("InvalidAccessKeyId", "SignatureDoesNotMatch", "InvalidToken", "ExpiredToken")


def readable(uri: str | Path) -> Location:
    """The location, whose storage answers; whether something lies there is not asked. Raises StorageError."""
    location = locate(uri)
    if isinstance(location.filesystem, S3):
        bucket, _, key = location.path.partition("/")
        with _answers(location, "read", location.filesystem.settings) as client:
            client.list_objects_v2(Bucket=bucket, Prefix=key, MaxKeys=1)
    return location


def writable(uri: str | Path) -> Location:
    """The location, in which files can be made, and stay; nothing is left there now. Raises StorageError."""
    location = locate(uri)
    if JOBS_COPY in Path(location.path).parts:
        raise StorageError(
            f"{location} lies in this job's own copy of its working directory, which Ray deletes after the job: give "
            "an absolute folder, or s3://BUCKET/NAME"
        )
    if isinstance(location.filesystem, S3):
        bucket, _, key = location.path.partition("/")
        with _answers(location, "written", location.filesystem.settings) as client:
            # An upload that is begun and abandoned: the right to write is proved, and no object ever appears.
            place = {"Bucket": bucket, "Key": f"{key}/.check".lstrip("/")}
            upload = client.create_multipart_upload(**place)
            with suppress(client.exceptions.ClientError):
                client.abort_multipart_upload(**place, UploadId=upload["UploadId"])
    else:
        path = Path(location.path)
        try:
            parent = next(folder for folder in (path, *path.parents) if folder.exists())
            tempfile.TemporaryFile(dir=parent).close()
        except OSError as error:
            raise StorageError(f"{location} cannot be written ({error.strerror}); choose another place") from error
    return location


@contextmanager
def _answers(location: Location, done: str, settings: S3Settings) -> Iterator[Any]:
    """A client for one request; what it fails with becomes the line that the user reads."""
    import botocore.exceptions as failures
    from botocore.config import Config
    from botocore.session import get_session

    server = settings.endpoint or f"AWS S3 in {settings.region}"
    bucket = location.path.partition("/")[0]
    limits = Config(connect_timeout=TIMEOUT, read_timeout=TIMEOUT, retries={"total_max_attempts": ATTEMPTS})
    try:
        yield get_session().create_client(
            "s3", region_name=settings.region, endpoint_url=settings.endpoint, config=limits
        )
    except failures.SSLError as error:
        raise StorageError(
            f"{location} cannot be {done}: the certificate of {server} is not trusted ({error}); AWS_CA_BUNDLE names a "
            "file of those that are"
        ) from error
    except (failures.ConnectionError, failures.HTTPClientError) as error:
        raise StorageError(
            f"{location} cannot be {done}: {server} does not answer; is it up, and AWS_ENDPOINT_URL right?"
        ) from error
    except failures.ClientError as error:
        code, message = (error.response["Error"].get(name, "") for name in ("Code", "Message"))
        if code == "NoSuchBucket":
            way_out = f"{server} has no bucket {bucket!r}; make it, or name another"
        elif code in REFUSED:
            way_out = (
                f"{server} refuses the keys ({code}); check AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE"
            )
        elif code == "AccessDenied":
            way_out = f"{server} denies it to these keys; use others, or have the right granted to them"
        else:
            way_out = f"{server} answers {code}: {message}"
        raise StorageError(f"{location} cannot be {done}: {way_out}") from error
    except failures.ParamValidationError as error:
        raise StorageError(f"{location} cannot be {done}: {bucket!r} is no name of a bucket") from error
    except failures.BotoCoreError as error:
        raise StorageError(f"{location} cannot be {done}: {error}") from error
