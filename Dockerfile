# The server with PyTorch for the CPU:  docker build -t nanoqwen .
#   docker run -p 127.0.0.1:8000:8000 -e NANOQWEN_API_KEY=KEY -v nanoqwen:/home/user/.cache nanoqwen --model Qwen/Qwen3-0.6B
# g++ compiles the token step at the first start, for the processor that it then runs on. The volume keeps that and what
# the hub gave for the next container.
FROM python:3.13-slim
RUN apt-get update && apt-get install --yes --no-install-recommends g++ && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home user && install --directory --owner=user --group=user /home/user/.cache
WORKDIR /nanoqwen
COPY pyproject.toml requirements.lock ./
RUN pip install --no-cache-dir --constraint requirements.lock --extra-index-url https://download.pytorch.org/whl/cpu torch==$(sed -n 's/^torch==//p' requirements.lock)+cpu \
    && pip install --no-cache-dir --constraint requirements.lock --editable .
COPY . .
USER user
EXPOSE 8000
# 0.0.0.0 inside the container only: `docker run -p` says who reaches it, and NANOQWEN_API_KEY has to be given.
ENTRYPOINT ["python", "serve.py", "--host", "0.0.0.0"]
CMD ["--model", "models/tiny"]
