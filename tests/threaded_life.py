"""A life whose import starts a thread, so that a nursery can't fork it."""

import threading

from fake_member import live

threading.Thread(target=threading.Event().wait, daemon=True).start()

__all__ = ["live"]
