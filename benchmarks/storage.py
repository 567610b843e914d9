"""Cost of an object store: requests beside the library's own loop, and a training beside one from local disk.

    apt-get install nginx-light libnginx-mod-http-lua
    python -m benchmarks.storage            makes 1,000 JPEGs of 500 x 375, then 3 rounds

nginx serves the shards on the loopback interface, and holds each request back for 2 ms where a row says so. Each
contender is a process; they take turns. A training has a ResNet-18, 64 px, and one thread, because on a machine with
other work the threads of torch wait for each other; two threads decode. Its time is that from opening the storage to
the last step. The lowest time is the one that other work has disturbed least.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from benchmarks.loader import IMAGES, MEAN, STD, make_images

PORTS, DELAY_MS = {"http": 8771, "slow": 8772}, 2
MODULES = Path("/usr/lib/nginx/modules")
NGINX = """
{modules}
daemon off; worker_processes 1; pid {folder}/pid; error_log {folder}/error.log; user root;
events {{ worker_connections 1024; }}
http {{
  access_log off; sendfile on; keepalive_requests 100000000; default_type application/octet-stream;
  lua_load_resty_core off;
  server {{ listen 127.0.0.1:{http}; root {root}; }}
  server {{ listen 127.0.0.1:{slow}; root {root}; access_by_lua_block {{ ngx.sleep({seconds}) }} }}
}}
"""
RANGE, RANGES, BATCH, INFLIGHT = 100_000, 4000, 200, 64
IMAGE_SIZE, BATCH_SIZE, THREADS = 64, 50, 2
TRAININGS = ("local", "no cache", "empty cache", "full cache")


@contextmanager
def nginx(root: Path, folder: Path) -> Iterator[None]:
    """Serve the files of a folder, on one port without and on one with a delay."""
    names = ("ndk_http_module.so", "ngx_http_lua_module.so")
    modules = "".join(f"load_module {MODULES / name};\n" for name in names)
    config = folder / "nginx.conf"
    config.write_text(NGINX.format(modules=modules, folder=folder, root=root, seconds=DELAY_MS / 1000, **PORTS))
    server = subprocess.Popen(["nginx", "-c", str(config)])
    try:
        time.sleep(1)
        assert server.poll() is None
        yield
    finally:
        server.terminate()
        server.wait()


def ranges_of(folder: Path) -> list[tuple[str, int]]:
    """Return the same ranges of the shards for both loops."""
    import numpy as np

    shards, random = sorted((folder / "shards").glob("*.tar")), np.random.default_rng(0)
    chosen = random.integers(0, len(shards), RANGES)
    return [(shards[one].name, int(random.integers(0, shards[one].stat().st_size - RANGE))) for one in chosen]


def read_by_ours(folder: Path, url: str) -> Callable[[], None]:
    """Return a function that reads all ranges by `read_batch`."""
    import numpy as np

    from data.storage.local import Request
    from data.storage.location import Url
    from data.storage.remote import RemoteShards

    storage, ranges = RemoteShards(Url(url), inflight=INFLIGHT), ranges_of(folder)
    buffers = [np.empty(RANGE, np.uint8) for _ in range(BATCH)]

    def read() -> None:
        for start in range(0, RANGES, BATCH):
            batch = zip(ranges[start : start + BATCH], buffers, strict=True)
            storage.read_batch([Request(file, offset, into) for (file, offset), into in batch])

    return read


def read_by_library(folder: Path, url: str) -> Callable[[], None]:
    """Return a function that reads all ranges by the library's `get_range_async`, as many at once, into nothing."""
    import obstore
    from obstore.store import from_url

    store, ranges = from_url(url, client_options={"allow_http": True}), ranges_of(folder)

    async def read_all() -> None:
        free = asyncio.Semaphore(INFLIGHT)

        async def read_one(file: str, offset: int) -> None:
            async with free:
                content = await obstore.get_range_async(store, file, start=offset, length=RANGE)
                assert len(content) == RANGE

        await asyncio.gather(*(read_one(*one) for one in ranges))

    return lambda: asyncio.run(read_all())


def requests_per_second(name: str, folder: Path) -> float:
    """Measure a loop after one that warms it up."""
    loop, port = name.split()
    make = {"ours": read_by_ours, "library": read_by_library}[loop]
    read = make(folder, f"http://127.0.0.1:{PORTS[port]}/shards")
    read()
    start = time.perf_counter()
    read()
    return RANGES / (time.perf_counter() - start)


def training_seconds(name: str, folder: Path, *, trains: bool) -> float:
    """Measure an epoch from the opening of the storage on; `trains=False` only loads."""
    import torch

    from data.augment.augmentation import Augmentation
    from data.augment.crops import TrainingCrop
    from data.loading.decoder import DecodeSettings
    from data.loading.loader import TrainingLoader
    from data.loading.order import TrainingPlan
    from data.shards.indexing import open_dataset
    from data.storage.location import Url
    from data.storage.open import StorageSettings, open_storage
    from models.residual import resnet

    torch.set_num_threads(1)
    root = folder / "shards" if name == "local" else Url(f"http://127.0.0.1:{PORTS['slow']}/shards")
    dataset, _ = open_dataset(root, None if name == "local" else folder / "index")
    index, decode = dataset.index("train"), DecodeSettings(MEAN, STD, threads=THREADS)
    plan = TrainingPlan(index.shard_samples, seed=0, shuffle_window=4_000_000, batch_size=BATCH_SIZE)
    net = resnet(num_classes=10, variant="resnet18")
    optimizer = torch.optim.SGD(net.parameters(), 0.01)
    net(torch.zeros(2, 3, IMAGE_SIZE, IMAGE_SIZE)).sum().backward()
    with tempfile.TemporaryDirectory(dir=folder) as empty:
        cache = {"empty cache": Path(empty), "full cache": folder / "cache"}.get(name)
        start = time.perf_counter()
        settings = StorageSettings(inflight=INFLIGHT, folder=cache, gigabytes=0.5)
        storage = open_storage(dataset.root, dataset.shard_bytes, settings=settings)
        loader = TrainingLoader(
            index, storage, plan=plan, augment=Augmentation(TrainingCrop(IMAGE_SIZE)), decode=decode
        )
        images = 0
        for batch in loader:
            images += len(batch.labels)
            if trains:
                optimizer.zero_grad()
                torch.nn.functional.cross_entropy(net(batch.images), batch.labels).backward()
                optimizer.step()
        seconds = time.perf_counter() - start
        assert images == IMAGES
        if hasattr(storage, "close"):
            storage.close()
    return seconds


def measure(name: str, folder: Path) -> float:
    """Measure a contender, named by its part and by what it is."""
    part, _, which = name.partition(": ")
    if part == "requests":
        return requests_per_second(which, folder)
    return training_seconds(which, folder, trains=part == "training")


def main() -> None:
    """Make the images, run the rounds, print the medians."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--part", choices=("requests", "loading", "training"), help="by default all")
    parser.add_argument("--one", nargs=2, metavar=("CONTENDER", "FOLDER"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(measure(arguments.one[0], Path(arguments.one[1]))))
        return
    names = [f"requests: {loop} {port}" for port in PORTS for loop in ("library", "ours")]
    names += [f"{part}: {name}" for part in ("loading", "training") for name in TRAININGS]
    names = [name for name in names if arguments.part in (None, name.partition(":")[0])]
    with tempfile.TemporaryDirectory(prefix="storage-") as name:
        folder = Path(name)
        folder.chmod(0o755)
        make_images(folder)
        _pack(folder)
        with nginx(folder, folder):
            _fill_cache(folder)
            results = _take_turns(names, folder, rounds=arguments.rounds)
    _print(results, names)


def _take_turns(names: list[str], folder: Path, *, rounds: int) -> dict[str, list[float]]:
    results: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(rounds):
        for name in names:
            command = [sys.executable, "-m", "benchmarks.storage", "--one", name, str(folder)]
            output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
            results[name].append(json.loads(output.splitlines()[-1]))
    return results


def _print(results: dict[str, list[float]], names: list[str]) -> None:
    base = {"requests: ours http": "requests: library http", "requests: ours slow": "requests: library slow"}
    print(f"{'contender':<28}{'median':>10}{'lowest':>10}{'highest':>10}{'ratio':>8}{'of lowest':>10}")
    for name in names:
        first = base.get(name, f"{name.partition(':')[0]}: local")
        ratios = [one / other for one, other in zip(results[name], results.get(first, results[name]), strict=True)]
        values = results[name]
        columns = (statistics.median(values), min(values), max(values))
        extreme = max if name.startswith("requests") else min
        best = extreme(values) / extreme(results.get(first, values))
        cells = "".join(f"{one:>10.5g}" for one in columns)
        print(f"{name:<28}{cells}{statistics.median(ratios):>8.3f}{best:>10.3f}")


def _pack(folder: Path) -> None:
    from data.shards import sources
    from data.shards.pack import PackSettings, pack

    source = sources.folder(folder / "train", "benchmark", val_fraction=0, seed=0)
    pack(source, folder / "shards", settings=PackSettings(shard_samples=50))


def _fill_cache(folder: Path) -> None:
    from data.shards.indexing import open_dataset
    from data.storage.cached import CachedShards
    from data.storage.location import Url
    from data.storage.open import StorageSettings, open_storage

    url = Url(f"http://127.0.0.1:{PORTS['slow']}/shards")
    dataset, _ = open_dataset(url, folder / "index")
    settings = StorageSettings(folder=folder / "cache", gigabytes=0.5)
    storage = open_storage(url, dataset.shard_bytes, settings=settings)
    assert isinstance(storage, CachedShards)
    storage.expect(sorted(dataset.shard_bytes))
    while len(list((folder / "cache").glob("*.shard"))) < len(dataset.shard_bytes):
        time.sleep(0.1)
    storage.close()


if __name__ == "__main__":
    main()
