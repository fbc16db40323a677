#!/usr/bin/env bash
# gcsfs asks an emulator of Google's storage over TLS gRPC, and waits a minute for it, in every operation.
#
# Seen with gcsfs 2026.10.1, where support of hierarchical and zonal buckets is on by itself. It asks for the kind of a
# bucket by gRPC at the host and port of STORAGE_EMULATOR_HOST, over TLS though that says http://, and tries again for 60
# seconds. No emulator answers there (fake-gcs-server, gcp-storage-emulator and tests' own servers speak the JSON API).
# What it could not learn is not kept: the next operation waits anew, and then gives the right result. Here the minute is
# cut to 3 seconds by retry_timeout, so that the script ends.
#
# Why it matters: a test suite against an emulator takes a minute longer for each call after an upgrade, until CI kills it,
# without an error that names the reason: it is a warning in the log of gcsfs.
# Remedy: GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT=false in the environment, before gcsfs is imported.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --disable-pip-version-check gcsfs==2026.10.1 fsspec==2026.9.0
cat > "$work/ask.py" <<'EOF'
import json, logging, os, socket, sys, threading, time
from importlib.metadata import version

tls = plain = 0
OBJECT = {"name": "a.txt", "size": "1", "bucket": "b"}


def serve(client):
    """The JSON API as far as this needs it, and nothing of TLS."""
    global tls, plain
    with client:
        first = client.recv(65536)
        if first[:1] == b"\x16":  # of a TLS handshake
            tls += 1
            return
        plain += 1
        found = {"items": [OBJECT]} if b"/o?" in first.split(b"\r\n")[0] else OBJECT
        body = json.dumps(found).encode()
        head = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nConnection: close\r\nContent-Length: %d\r\n\r\n"
        client.sendall(head % len(body) + body)


def accept():
    while True:
        threading.Thread(target=serve, args=(listener.accept()[0],), daemon=True).start()


listener = socket.create_server(("127.0.0.1", 0))
threading.Thread(target=accept, daemon=True).start()
os.environ["STORAGE_EMULATOR_HOST"] = f"http://127.0.0.1:{listener.getsockname()[1]}"
import gcsfs
from gcsfs.retry import DEFAULT_RETRY_CONFIG

kind = os.environ["GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT"]
if kind == "true":
    print("gcsfs", version("gcsfs"), "tries for", DEFAULT_RETRY_CONFIG["timeout"], "seconds unless it is told")
options = {"retry_timeout": 3} if kind == "true" else {}
fs = gcsfs.GCSFileSystem(token="anon", skip_instance_cache=True, use_listings_cache=False, **options)
warned = []
log = logging.Handler()
log.emit = lambda record: warned.append(record.getMessage())
logging.getLogger("gcsfs").addHandler(log)
waits, took = [], []
for _ in range(3):
    before, started = len(warned), time.monotonic()
    found = fs.ls("b", detail=True)
    if [each["name"] for each in found] != ["b/a.txt"]:
        sys.exit(f"not what this is about: ls gives {found}")
    waits.append(sum("Could not determine bucket type" in said for said in warned[before:]))
    took.append(time.monotonic() - started)
print(f"hierarchical buckets {kind}: three ls of an http:// emulator, {plain} plain requests, {tls} TLS connections;",
      "given up in each", waits, "seconds", [round(each, 1) for each in took])
expected = kind == "true"
if (tls > 0) != expected or any((count > 0) != expected for count in waits):
    sys.exit("not seen any more: operations on an emulator do not wait for gRPC over TLS")
EOF
for kind in true false; do
    GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT=$kind timeout 60 "$work/venv/bin/python" -W ignore "$work/ask.py" 2>"$work/log" ||
        { tail -n 5 "$work/log"; exit 1; }
done
