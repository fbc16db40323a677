"""Whether a serve-engine of this machine is ready, for containers: `python -m fcn_deploy.runtime.serve.check [PID]`.

It asks where that process listens, by the options that it was started with. Exit 0: ready; 1: not, with one line. Only
the standard library: it is started every few seconds.
"""

import argparse
import ssl
import sys
import urllib.request
from collections.abc import Sequence
from http.client import HTTPException
from pathlib import Path

ANY = {"0.0.0.0": "127.0.0.1", "::": "::1", "": "127.0.0.1"}  # addresses of all interfaces, and one to ask of each
SECONDS = 2.0


def address(words: Sequence[str]) -> str:
    """The URL of a server that was started with these words."""
    options = argparse.ArgumentParser(allow_abbrev=False, add_help=False)
    options.add_argument("--host", default="127.0.0.1")
    options.add_argument("--port", default="8000")
    options.add_argument("--tls-cert")
    given, _ = options.parse_known_args(words)
    host = ANY.get(given.host, given.host)
    return f"http{'s' if given.tls_cert else ''}://{f'[{host}]' if ':' in host else host}:{given.port}"


def ready(url: str) -> None:
    """Raises OSError where the server at a URL is not ready."""
    # It asks this machine, by a name that is in no certificate.
    trusting = ssl.create_default_context()
    trusting.check_hostname, trusting.verify_mode = False, ssl.CERT_NONE
    direct = urllib.request.ProxyHandler({})
    opener = urllib.request.build_opener(direct, urllib.request.HTTPSHandler(context=trusting))
    opener.open(f"{url}/v2/health/ready", timeout=SECONDS).close()


def main() -> int:
    process = sys.argv[1] if len(sys.argv) > 1 else "1"
    try:
        words = Path("/proc", process, "cmdline").read_bytes().decode().rstrip("\0").split("\0")
        ready(address(words))
    except (OSError, HTTPException, ValueError) as error:  # a status that is none of success, too
        print(f"not ready: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
