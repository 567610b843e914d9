"""Object stores on the loopback interface: moto's S3, and nginx."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import boto3
import pytest

from tests.support.processes import free_port

KEYS = {"AWS_ACCESS_KEY_ID": "AKIA-of-a-test", "AWS_SECRET_ACCESS_KEY": "never-printed", "AWS_REGION": "us-east-1"}
NGINX = """
daemon off; worker_processes 1; error_log {folder}/error.log; pid {folder}/pid; {user}
events {{ worker_connections 512; }}
http {{
  access_log {folder}/access.log; sendfile on; keepalive_requests 1000000; default_type application/octet-stream;
  client_body_temp_path {folder}/body; proxy_temp_path {folder}/proxy; fastcgi_temp_path {folder}/fastcgi;
  uwsgi_temp_path {folder}/uwsgi; scgi_temp_path {folder}/scgi;
  server {{ listen 127.0.0.1:{port}; root {root}; location /denied/ {{ return 403; }} }}
}}
"""


class S3:
    """moto's server at a port; `environment` is that of its users."""

    def __init__(self, port: int) -> None:
        self.endpoint = f"http://127.0.0.1:{port}"
        self.environment = {**KEYS, "AWS_ENDPOINT_URL": self.endpoint, "AWS_ALLOW_HTTP": "true"}
        self.client = boto3.client(
            "s3",
            endpoint_url=self.endpoint,
            aws_access_key_id=KEYS["AWS_ACCESS_KEY_ID"],
            aws_secret_access_key=KEYS["AWS_SECRET_ACCESS_KEY"],
            region_name=KEYS["AWS_REGION"],
        )

    def upload(self, folder: Path, bucket: str, *, only: str = "*") -> str:
        """Put the files of a folder into a new bucket; return the URL of their folder there."""
        self.client.create_bucket(Bucket=bucket)
        files = [path for path in sorted(folder.rglob(only)) if path.is_file() and not path.name.startswith(".")]
        assert files
        for path in files:
            self.put(bucket, f"data/{path.relative_to(folder)}", path.read_bytes())
        return f"s3://{bucket}/data"

    def put(self, bucket: str, key: str, content: bytes) -> None:
        """Put one object."""
        self.client.put_object(Bucket=bucket, Key=key, Body=content)

    def check_signatures(self, checks: bool) -> None:
        """Let the server check access keys and signatures, or not."""
        count, headers = b"0" if checks else b"inf", {"Content-Type": "text/plain"}
        request = urllib.request.Request(f"{self.endpoint}/moto-api/reset-auth", count, headers)
        urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request).close()


@contextmanager
def moto() -> Iterator[S3]:
    """Run moto's server."""
    port = free_port()
    command = [sys.executable, "-m", "moto.server", "--host", "127.0.0.1", "--port", str(port)]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        _wait_for(port, server)
        yield S3(port)
    finally:
        server.terminate()
        server.wait(timeout=30)


@contextmanager
def nginx(root: Path, folder: Path) -> Iterator[str]:
    """Serve the files in `root`; `folder` is for nginx and its `access.log`. Yields the URL.

    Skips the test where nginx is missing.
    """
    program = shutil.which("nginx")
    if program is None:
        pytest.skip("nginx is not installed: apt-get install nginx-light")
    port = free_port()
    config = folder / "nginx.conf"
    user = "user root;" if os.getuid() == 0 else ""
    config.write_text(NGINX.format(folder=folder, root=root, port=port, user=user))
    server = subprocess.Popen([program, "-c", str(config), "-e", str(folder / "start.log")])
    try:
        _wait_for(port, server)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.terminate()
        server.wait(timeout=30)


def _wait_for(port: int, server: subprocess.Popen[bytes]) -> None:
    for _ in range(3000):
        with socket.socket() as client:
            if client.connect_ex(("127.0.0.1", port)) == 0:
                return
        assert server.poll() is None
        time.sleep(0.01)
    pytest.fail("the server does not answer")
