"""A model of MLflow's registry, served over HTTP on the loopback interface."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import urllib.request
from pathlib import Path

import numpy as np
import pytest


def served_answers(uri: str, name: str, images: np.ndarray) -> dict[str, dict[str, list[list[float]]]]:
    """Answer of `mlflow models serve --env-manager local` to a request on the loopback interface."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    # Every proxy leads nowhere, so that a request to the network fails.
    offline = {"http_proxy": "http://127.0.0.1:9", "https_proxy": "http://127.0.0.1:9", "no_proxy": "127.0.0.1"}
    environment = {
        **os.environ,
        **offline,
        "PATH": path,
        "MLFLOW_TRACKING_URI": uri,
        "MLFLOW_REGISTRY_URI": uri,
        "MLFLOW_DISABLE_TELEMETRY": "true",
    }
    command = ["mlflow", "models", "serve", "--env-manager", "local", "-m", f"models:/{name}@champion"]
    server = subprocess.Popen(
        [*command, "--host", "127.0.0.1", "--port", str(port)],
        env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
    )  # fmt: skip
    try:
        assert server.stdout is not None
        lines = []
        for line in server.stdout:  # until it answers, or ends
            lines.append(line)
            if "Uvicorn running" in line:
                break
        else:
            pytest.fail("".join(lines))
        body = json.dumps({"inputs": {"images": images.tolist()}}).encode()
        address, headers = f"http://127.0.0.1:{port}/invocations", {"Content-Type": "application/json"}
        direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with direct.open(urllib.request.Request(address, body, headers), timeout=60) as answer:
            return dict(json.load(answer))
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        server.wait(timeout=30)
