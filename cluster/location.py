"""Where data is: a storage URI, parsed and made canonical. Contacts nothing.

A URI holds a scheme, a bucket, a prefix, and for S3-compatible servers an endpoint and a region; never
credentials, so it can be logged, written into manifests and kept in git.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import parse_qsl, urlsplit

from cluster.errors import BadInput, shown

_SCHEMES = ("file", "s3", "gs", "az", "abfs")
_QUERY_KEYS = ("endpoint", "region")


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
            BadInput: unknown scheme, credentials in the URI, an unknown option.
        """
        if "://" not in uri:
            return cls("file", "", str(Path(uri).expanduser().resolve()).strip("/"))
        try:
            parts = urlsplit(uri)
        except ValueError as error:
            raise _bad_uri(str(error), uri.split("://", 1)[0] + "://…") from None
        if "@" in parts.netloc or parts.fragment:
            # Not shown: what stands before an @ may be a secret.
            raise _bad_uri("a storage URI holds neither credentials nor a '#'", f"{parts.scheme}://…")
        options = dict(parse_qsl(parts.query, keep_blank_values=True))
        if parts.scheme not in _SCHEMES:
            raise _bad_uri(f"'{parts.scheme}' is not a kind of storage", shown(uri))
        if unknown := sorted(set(options) - set(_QUERY_KEYS)):
            raise _bad_uri(f"unknown option '{unknown[0]}' in the storage URI", f"{parts.scheme}://…")
        if ".." in parts.path.split("/"):
            raise _bad_uri("a storage URI has no '..'", shown(uri))
        if parts.scheme == "file":
            if parts.netloc not in ("", "localhost"):
                raise _bad_uri("a file URI names no host: it has three slashes", shown(uri))
            return cls("file", "", parts.path.strip("/"))
        if not parts.netloc:
            raise _bad_uri("the storage URI names no bucket", shown(uri))
        return cls(parts.scheme, parts.netloc, parts.path.strip("/"), options)

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


def _bad_uri(failed: str, got: str) -> BadInput:
    return BadInput(
        failed,
        got=got,
        allowed="a path, file:///dir, s3://bucket/prefix[?endpoint=URL&region=NAME], gs://…, az://…",
        fix="keep credentials in the environment or the shared credentials file",
    )
