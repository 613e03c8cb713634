# docker build -t dyndit .    docker run --rm -v "$PWD/runs:/work/runs" dyndit quickstart
FROM python:3.11-slim
COPY . /src
RUN pip install --no-cache-dir /src && useradd --create-home dyndit && mkdir /work && chown dyndit /work
USER dyndit
WORKDIR /work
ENTRYPOINT ["dyndit"]
CMD ["--help"]
