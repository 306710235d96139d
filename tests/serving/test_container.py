"""The Dockerfile: what it copies is there, and where there is a builder it builds and answers."""

import re
import shutil
import subprocess
import time
from pathlib import Path

import httpx
import pytest

ROOT = Path(__file__).resolve().parents[2]


def test_it_copies_what_is_there_and_starts_the_server():
    text = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    for line in re.findall(r"^COPY (.+) \S+$", text, re.MULTILINE):
        assert all((ROOT / name).exists() for name in line.split())
    assert 'ENTRYPOINT ["python", "serve.py", "--host", "0.0.0.0"]' in text and "USER user" in text
    ignored = (ROOT / ".dockerignore").read_text(encoding="utf-8").split()
    assert ".venv" in ignored and ".git" in ignored


def test_it_builds_and_answers():
    docker = shutil.which("docker")
    if docker is None or subprocess.run([docker, "info"], capture_output=True, timeout=30, check=False).returncode:
        pytest.skip("there is no docker daemon here to build with")
    subprocess.run([docker, "build", "--quiet", "--tag", "nanoqwen-test", str(ROOT)], check=True, timeout=1200)
    command = [docker, "run", "--rm", "--detach", "-p", "127.0.0.1::8000", "-e", "NANOQWEN_API_KEY=k", "nanoqwen-test"]
    container = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    try:
        port = subprocess.run([docker, "port", container, "8000"], capture_output=True, text=True, check=True).stdout
        url = f"http://{port.split()[0]}"
        deadline = time.monotonic() + 120
        while True:
            try:
                assert httpx.get(f"{url}/health").json() == {"status": "ok"}
                break
            except httpx.TransportError:
                assert time.monotonic() < deadline
                time.sleep(0.5)
        assert httpx.get(f"{url}/v1/models").status_code == 401
    finally:
        subprocess.run([docker, "kill", container], check=False, capture_output=True)
