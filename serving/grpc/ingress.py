"""The service's HTTP ingress, as the gateway asks it: one connection a call in flight, kept for the next."""

from __future__ import annotations

from collections.abc import Mapping
from types import TracebackType
from typing import Self

import aiohttp
from yarl import URL

from serving.grpc.refusals import Answer

_CONNECT_S = 5.0
_KEEP_S = 30.0
"""Less than the ingress keeps an idle connection, so that none is used while it is being closed."""


class Ingress:
    """Asks over HTTP. To be made, entered and used on one event loop.

    Args:
        url: of the ingress, without a path.
    """

    def __init__(self, url: str) -> None:
        self._url = url

    async def __aenter__(self) -> Self:
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=_KEEP_S),
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=_CONNECT_S),
            cookie_jar=aiohttp.DummyCookieJar(),
            skip_auto_headers=("User-Agent", "Accept", "Accept-Encoding", "Content-Type"),
            auto_decompress=False,
            trust_env=False,
        )
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._session.close()

    async def ask(self, method: str, path: str, headers: Mapping[str, str], body: bytes = b"") -> Answer:
        """One request and its answer. Cancelled, it closes the connection, so that the work ends there too.

        Args:
            path: percent-encoded.

        Raises:
            OSError: nobody listens, or the connection broke before the answer was whole.
        """
        url = URL(self._url + path, encoded=True)
        try:
            async with self._session.request(
                method, url, headers=headers, data=body or None, allow_redirects=False
            ) as answer:
                found = {name.lower(): value for name, value in answer.raw_headers}
                return Answer(answer.status, found, await answer.read())
        except aiohttp.ClientError as error:
            raise OSError(f"the ingress can't be asked: {error}") from error
