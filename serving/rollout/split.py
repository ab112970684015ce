"""Which requests a candidate gets: exactly its share, and the same callers each time where they say who.

Without anything to recognise a caller by, requests are dealt out by error diffusion, so that a share of 1%
is every hundredth request rather than one in a hundred on average. With it (the `x-session-id` header), a
hash decides: a caller stays with one version as long as the share doesn't shrink, and the callers of a
smaller share are among those of a larger one. Pure.
"""

from __future__ import annotations

from hashlib import blake2b

_HASH_BITS = 64


class Split:
    """One trial's share on one replica.

    Args:
        percent: of requests that go to the candidate, above 0 and up to 100.
        salt: tells trials apart, so that not the same callers come first each time.
        start: in [0, 1): where in its first round this replica begins. Replicas that differ here don't
            make the first callers of a small share wait for each replica's hundredth request.
    """

    def __init__(self, percent: float, *, salt: bytes = b"", start: float = 0.0) -> None:
        self._share = percent / 100
        self._salt = salt[:16]
        self._owed = start

    def takes(self, caller: bytes | None = None) -> bool:
        """Whether the next request goes to the candidate."""
        if caller:
            digest = blake2b(caller, digest_size=_HASH_BITS // 8, salt=self._salt).digest()
            return int.from_bytes(digest) < int(self._share * 2**_HASH_BITS)
        self._owed += self._share
        if self._owed < 1 - 1e-9:
            return False
        self._owed -= 1
        return True
