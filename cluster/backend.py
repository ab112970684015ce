"""From a location to the client that speaks to it, and what that client's errors mean.

The client's own retries are off, but for the parts of large files: it gives up after a number of
attempts, so a server that refuses connections for two seconds would be given up on, and it does not
repeat conditional writes at all. `cluster.storage` repeats calls instead, by time.
"""

from __future__ import annotations

import configparser
import os
import re
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

from obstore.exceptions import (
    AlreadyExistsError,
    BaseError,
    PermissionDeniedError,
    PreconditionError,
    UnauthenticatedError,
)
from obstore.store import AzureStore, GCSStore, LocalStore, ObjectStore, S3Store

from cluster.errors import StorageError, shown
from cluster.location import Location

_STATUS = re.compile(r"status code: (\d{3})")
_METADATA_SERVICES = ("169.254.", "metadata.google.internal")
_FIRMLY = (
    FileNotFoundError,
    PermissionError,
    AlreadyExistsError,
    PreconditionError,
    PermissionDeniedError,
    UnauthenticatedError,
)


@dataclass(frozen=True)
class Deadlines:
    """How long a store may take: to connect, to answer one request, to be asked again after failures.

    A request that begins just before `retry_s` may still take `request_s`: `total_s` bounds a call.
    """

    connect_s: float = 5
    request_s: float = 30
    retry_s: float = 60

    @property
    def total_s(self) -> float:
        """The most that one request takes, with its retries."""
        return self.retry_s + self.request_s


def open_backend(where: Location, deadlines: Deadlines, *, retries: int = 0) -> ObjectStore:
    """The client for a location; no server is contacted.

    Args:
        retries: how often the client repeats a single request by itself.

    Raises:
        StorageError: the directory can't be made.
    """
    if where.scheme == "file":
        try:
            # Clean-up removes a folder that is empty, even one that another writer is about to use.
            return LocalStore("/" + where.prefix, mkdir=True, automatic_cleanup=False)
        except (BaseError, OSError) as error:
            raise StorageError(
                f"the folder /{where.prefix} can't be used",
                got=shown(first_line(error)),
                allowed="a folder that this user may write to, or make",
                fix="correct the path, or its rights",
            ) from None
    retry: Any = {"max_retries": retries, "retry_timeout": timedelta(seconds=deadlines.request_s)}
    client: Any = {
        "timeout": timedelta(seconds=deadlines.request_s),
        "connect_timeout": timedelta(seconds=deadlines.connect_s),
    }
    prefix = where.prefix or None
    if where.scheme == "gs":
        return GCSStore(where.bucket, prefix=prefix, client_options=client, retry_config=retry)
    if where.scheme in ("az", "abfs"):
        return AzureStore(where.bucket, prefix=prefix, client_options=client, retry_config=retry)
    s3 = s3_settings(where)
    if s3["endpoint"]:
        client["allow_http"] = s3["endpoint"].startswith("http://")
    config: Any = {key: value for key, value in s3.items() if value}
    return S3Store(where.bucket, prefix=prefix, client_options=client, retry_config=retry, **config)


def s3_settings(where: Location) -> dict[str, str]:
    """Endpoint, region and, from the shared credentials file only, keys. Empty: the client's default."""
    env = os.environ
    endpoint = (
        where.options.get("endpoint") or env.get("AWS_ENDPOINT_URL_S3") or env.get("AWS_ENDPOINT_URL", "")
    )
    region = where.options.get("region") or env.get("AWS_REGION") or env.get("AWS_DEFAULT_REGION", "")
    settings = {"endpoint": endpoint, "region": region or ("us-east-1" if endpoint else "")}
    if "AWS_ACCESS_KEY_ID" in env:
        return settings
    profiles = configparser.ConfigParser(interpolation=None)
    profiles.read(env.get("AWS_SHARED_CREDENTIALS_FILE", Path.home() / ".aws" / "credentials"))
    profile = env.get("AWS_PROFILE", "default")
    if profiles.has_section(profile):
        section = profiles[profile]
        settings["access_key_id"] = section.get("aws_access_key_id", "")
        settings["secret_access_key"] = section.get("aws_secret_access_key", "")
        settings["session_token"] = section.get("aws_session_token", "")
    return settings


def is_transient(error: Exception) -> bool:
    """Whether a client's error may be gone the next time, by itself.

    Connections refused, reset or cut, time-outs, bodies that end early, and the answers of a server
    that is overloaded or failing (408, 429, 5xx). Not what it answers about us or the object, nor the
    absence of credentials, nor anything that a local disk says.
    """
    if isinstance(error, _FIRMLY) or not isinstance(error, BaseError):
        return False
    said = str(error)
    if any(service in said for service in _METADATA_SERVICES):  # asked for want of credentials
        return False
    if status := _STATUS.search(said):
        code = int(status[1])
        # S3 says 400 of a body that came too slowly.
        return code in (408, 429) or (code >= 500 and code != 501) or "RequestTimeout" in said
    # The client's words for a failed exchange, and for an answer that is not whole.
    return "HTTP error" in said or "Got invalid" in said or "Internal error" in said


def is_refusal(error: Exception) -> bool:
    """Whether the server refused us, rather than failed."""
    if isinstance(error, PermissionDeniedError | UnauthenticatedError | PermissionError):
        return True
    said = first_line(error)
    return " 401 " in said or " 403 " in said  # listings report it as any failure


def lacks_credentials(error: Exception) -> bool:
    """Whether there were no credentials to ask with."""
    said = str(error)
    return "169.254" in said or "credential" in said.lower()


def first_line(error: Exception) -> str:
    """What an error says; the lines after the first are the client's debug dump."""
    return str(error).split("\n", 1)[0]
