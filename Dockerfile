# docker build --tag sglang-vericache .
# docker run --gpus all --shm-size 32g --publish 30000:30000 sglang-vericache --host 0.0.0.0 --model-path MODEL
FROM lmsysorg/sglang:v0.5.23

COPY pyproject.toml README.md LICENSE /opt/sglang-vericache/
COPY sglang_vericache /opt/sglang-vericache/sglang_vericache
COPY kernels /opt/sglang-vericache/kernels
# The image has every dependency already, in the versions that SGLang was released with.
RUN python3 -m pip install --no-cache-dir --no-deps /opt/sglang-vericache

# Away from both source trees, so that Python finds the installed packages.
WORKDIR /
RUN python3 -m sglang_vericache check

EXPOSE 30000
ENTRYPOINT ["python3", "-m", "sglang.launch_server", "--enable-vericache"]
