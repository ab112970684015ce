"""Where data is: a storage URI, parsed and made canonical. Contacts nothing.

A URI holds a scheme, a bucket, a prefix, and for S3-compatible servers an endpoint and a region; never
credentials, so it can be logged, written into manifests and kept in git.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from cluster.errors import BadInput, shown

_SCHEMES = ("file", "s3", "gs", "az", "abfs")
_OPTIONS = {
    "endpoint": re.compile(r"https?://[A-Za-z0-9._\[\]:-]+(/[A-Za-z0-9._/-]*)?"),
    "region": re.compile(r"[A-Za-z0-9-]+"),
}
_BUCKET = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,254}")
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")


@dataclass(frozen=True)
class Location:
    """A parsed storage URI. `bucket` is empty for `file`; `prefix` has no slash at either end."""

    scheme: str
    bucket: str
    prefix: str
    options: dict[str, str] = field(default_factory=dict)

    @classmethod
    def parse(cls, uri: str) -> Location:
        """Read a URI, or a plain path as a directory of this machine.

        Raises:
            BadInput: unknown scheme, credentials in the URI, an unknown option; the error shows no secret.
        """
        if not uri or _CONTROL.search(uri):
            raise _bad_uri("a storage URI is not empty and has no control characters", _without_secrets(uri))
        scheme, mark, rest = uri.partition("://")
        if not mark:
            return cls("file", "", _absolute(uri))
        if scheme == "file":
            return cls("file", "", _file_path(uri, rest))
        if scheme not in _SCHEMES:
            raise _bad_uri(f"{shown(scheme)} is not a kind of storage", _without_secrets(uri))
        if "#" in rest or "%" in rest or "@" in rest:
            raise _bad_uri(
                "a storage URI holds no credentials, and no '@', '#' or '%'", _without_secrets(uri)
            )
        path, _, query = rest.partition("?")
        bucket, _, prefix = path.partition("/")
        if not _BUCKET.fullmatch(bucket):
            raise _bad_uri("the storage URI names no bucket", _without_secrets(uri))
        prefix = prefix.strip("/")
        if any(name in ("", ".", "..") for name in prefix.split("/") if prefix):
            raise _bad_uri("a storage URI has no '..', '.' or '//' in it", _without_secrets(uri))
        return cls(scheme, bucket, prefix, _options(uri, query))

    @property
    def uri(self) -> str:
        """The canonical URI."""
        if self.scheme == "file":
            return f"file:///{self.prefix}"
        path = f"{self.scheme}://{self.bucket}" + (f"/{self.prefix}" if self.prefix else "")
        return path + ("?" + "&".join(f"{k}={v}" for k, v in self.options.items()) if self.options else "")

    def child(self, *names: str) -> Location:
        """The location of a key below this one."""
        prefix = "/".join([p for p in (self.prefix, *names) if p])
        return Location(self.scheme, self.bucket, prefix, self.options)


def _absolute(path: str) -> str:
    try:
        return str(Path(path).expanduser().resolve()).strip("/")
    except (OSError, RuntimeError, ValueError) as error:
        raise _bad_uri("the path can't be used", f"{shown(path)} ({error})") from None


def _file_path(uri: str, rest: str) -> str:
    """The path of a file URI, taken as it is written: a folder's name may hold '#', '?' or '%'."""
    host, slash, path = rest.partition("/")
    if host not in ("", "localhost") or not slash:
        raise _bad_uri("a file URI names no host: it has three slashes", _without_secrets(uri))
    if ".." in path.split("/"):
        raise _bad_uri("a storage URI has no '..'", _without_secrets(uri))
    return str(PurePosixPath("/" + path)).strip("/")


def _options(uri: str, query: str) -> dict[str, str]:
    options: dict[str, str] = {}
    for option in query.split("&") if query else ():
        name, _, value = option.partition("=")
        if name not in _OPTIONS:
            raise _bad_uri(f"unknown option {shown(name)} in the storage URI", _without_secrets(uri))
        if name in options or not _OPTIONS[name].fullmatch(value):
            raise _bad_uri(f"the option '{name}' in the storage URI can't be used", _without_secrets(uri))
        options[name] = value
    return options


def _without_secrets(uri: str) -> str:
    """As much of a URI as is never a secret: what stands before an '@' or after a '?' may be one."""
    return f"{shown(uri.partition('://')[0])[1:-1]}://…" if "://" in uri else shown(uri)


def _bad_uri(failed: str, got: str) -> BadInput:
    return BadInput(
        failed,
        got=got,
        allowed="a path, file:///dir, s3://bucket/prefix[?endpoint=URL&region=NAME], gs://…, az://…",
        fix="keep credentials in the environment or the shared credentials file",
    )
