"""What is known of one request by the time it's answered, for metrics, the request log and spans.

Every layer fills in what it knows; nothing here knows where it goes.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class Account:
    """One request's. A phase that it didn't come to is 0."""

    tenant: str = ""
    """Whose key it came with; empty where none is asked for."""
    version: str = ""
    """Which version of the model answered, or was to."""
    rows: int = 0
    decode_s: float = 0.0
    """From the whole body to checked arrays."""
    queue_s: float = 0.0
    """From the queue to the first batch that had rows of it."""
    run_s: float = 0.0
    """From there until the last of its rows had run."""
    encode_s: float = 0.0
    """From outputs to the answer's bytes."""
    received_bytes: int = 0
    sent_bytes: int = 0
    """Both of bodies."""
