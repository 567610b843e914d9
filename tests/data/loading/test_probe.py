"""The choice of a decoder: probes in other processes, what a machine has, and what a run began with."""

from __future__ import annotations

import io
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from data.augment.augmentation import Augmentation
from data.augment.crops import EvaluationCrop, TrainingCrop
from data.loading import probe
from data.loading.datamodule import LoaderSettings, ShardData
from data.loading.decoder import DecoderChoice, DecodeSettings, GpuDecoder
from data.loading.loader import TrainingLoader
from data.loading.order import TrainingPlan
from data.loading.probe import Probe, candidates, choose_gpu_decoder, try_decoder
from data.shards.dataset import Dataset
from data.storage.local import LocalShards

GPU = torch.device("cuda", 0)


def probe_of(dataset: Dataset) -> Probe:
    index, decode, crop = dataset.index("train"), DecodeSettings(dataset.mean, dataset.std), TrainingCrop(32)
    plan = TrainingPlan(index.shard_samples, seed=0, shuffle_window=1_000_000, batch_size=4)
    loader = TrainingLoader(index, LocalShards(dataset.root), plan=plan, augment=Augmentation(crop), decode=decode)
    return Probe(loader.first_inputs(), decode, crop)


def data_of(dataset: Dataset, **settings: object) -> ShardData:
    crops = {"training_augment": Augmentation(TrainingCrop(32)), "evaluation_crop": EvaluationCrop(32)}
    return ShardData(dataset, settings=LoaderSettings(batch_size=4, **settings), **crops)


def test_a_probe_decodes_a_batch_in_another_process(photographs: Dataset) -> None:
    whole = probe_of(photographs)
    assert try_decoder(whole, whole) is None
    images, *crops = whole.inputs
    damaged = whole._replace(inputs=([*images[:2], images[2][:200], images[3]], *crops))
    assert str(try_decoder(whole, damaged)).startswith("nvImageCodec failure: ")


@pytest.mark.parametrize(
    ("program", "answer"),
    [
        ("import os; os.kill(os.getpid(), 11)", "killed by SIGSEGV"),
        ("import sys; sys.exit('no such device')", "no such device"),
        ("import time; time.sleep(60)", "no answer in 0.2 s"),
    ],
)
def test_a_crash_is_an_answer(photographs: Dataset, monkeypatch: pytest.MonkeyPatch, program: str, answer: str) -> None:
    monkeypatch.setattr(probe, "COMMAND", (sys.executable, "-c", program))
    monkeypatch.setattr(probe, "SECONDS", 0.2 if "sleep" in program else 60)
    assert try_decoder(probe_of(photographs)) == answer


def test_images_unlike_the_cpus_are_refused(photographs: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = probe_of(photographs)
    expected, images = probe.decoded_images(whole), probe.decoded_images(whole).clone()
    images[2] += 0.3  # one of several
    decoded = [expected, images]
    monkeypatch.setattr(probe, "decoded_images", lambda _: decoded.pop())
    saved = io.BytesIO(probe.pickle.dumps([whole]))
    monkeypatch.setattr("sys.stdin", SimpleNamespace(buffer=saved))
    assert "levels from the CPU's" in str(probe.main())


def test_regions_need_an_nvjpeg_that_interpolates_chroma_in_them() -> None:
    both = [GpuDecoder(), GpuDecoder(hardware_load=0.0)]
    entire = [replace(one, regions=False) for one in both]
    assert list(candidates(GpuDecoder(), nvjpeg=(13, 3))) == both + entire
    assert list(candidates(GpuDecoder(), nvjpeg=(13, 1))) == entire
    assert list(candidates(GpuDecoder(hardware_load=0.0), nvjpeg=(13, 2))) == [both[1], entire[1]]


def test_the_first_decoder_that_works_is_chosen_and_the_others_are_explained(
    photographs: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = probe_of(photographs)
    whole = whole._replace(decode=replace(whole.decode, gpu_decoder=GpuDecoder()))
    answers = {GpuDecoder(): "killed by SIGSEGV", GpuDecoder(hardware_load=0.0): None}
    monkeypatch.setattr(probe, "loaded_nvjpeg", lambda: ((13, 3, 2), "FILE"))
    monkeypatch.setattr(probe, "try_decoder", lambda one: answers[one.decode.gpu_decoder])
    crash = "GPU, regions, at most 65% by its hardware decoder: killed by SIGSEGV"
    assert choose_gpu_decoder(whole) == (GpuDecoder(hardware_load=0.0), crash)
    monkeypatch.setattr(probe, "loaded_nvjpeg", lambda: ((13, 0, 1), "FILE"))
    monkeypatch.setattr(probe, "try_decoder", lambda one: "no device")
    decoder, reason = choose_gpu_decoder(whole)
    assert decoder is None
    assert reason.startswith("regions need nvJPEG 13.2, which is 13.0.1 in FILE; GPU, entire images")
    assert reason.count("no device") == 2
    monkeypatch.setattr(probe, "loaded_nvjpeg", lambda: None)
    assert choose_gpu_decoder(whole) == (None, "nvJPEG is not installed: pip install nvidia-nvjpeg")


def test_without_a_gpu_the_cpu_decodes(photographs: Dataset) -> None:
    cpu = torch.device("cpu")
    assert data_of(photographs).choose_decoder(cpu, before=None, probes=True) == (None, "no GPU trains")
    with pytest.raises(ValueError, match=r"^decoder=gpu needs a GPU that trains: use cpu or auto$"):
        data_of(photographs, decoder="gpu").choose_decoder(cpu, before=None, probes=True)
    with pytest.raises(ValueError, match=r"^decoder=tpu is not one of auto, gpu, cpu$"):
        data_of(photographs, decoder="tpu")
    with pytest.raises(ValueError, match=r"^hw_decoder_load=1.5 must be a number from 0 to 1, or null$"):
        data_of(photographs, hw_decoder_load=1.5)


def test_a_gpu_is_probed_once_and_a_run_keeps_the_choice(photographs: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    probed: list[Probe] = []
    answer = DecoderChoice(GpuDecoder(regions=False), "it decoded a batch")

    def remember(one: Probe) -> DecoderChoice:
        probed.append(one)
        return answer

    monkeypatch.setattr("data.loading.datamodule.choose_gpu_decoder", remember)
    data = data_of(photographs, hw_decoder_load=0.3)
    assert data.choose_decoder(GPU, before=None, probes=True) == answer
    assert data.gpu_decoder == answer.decoder
    assert probed[0].decode.gpu_decoder == GpuDecoder(hardware_load=0.3)
    assert len(probed[0].inputs[0]) == 4
    assert data.choose_decoder(GPU, before=None, probes=False).decoder is None, "rank 0 tells the others"
    for before in (DecoderChoice(None, "as the run began"), DecoderChoice(GpuDecoder(), "as the run began")):
        assert data_of(photographs).choose_decoder(GPU, before=before, probes=True) == before
    other = data.choose_decoder(GPU, before=DecoderChoice(GpuDecoder(), "as the run began"), probes=True)
    assert other.decoder == GpuDecoder(hardware_load=0.3), "which the run refuses"
    assert data_of(photographs, decoder="cpu").choose_decoder(GPU, before=answer, probes=True).decoder is None
    assert len(probed) == 1
    monkeypatch.setattr("data.loading.datamodule.choose_gpu_decoder", lambda _: DecoderChoice(None, "no device"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    for probes in (True, False):  # all ranks fail together
        with pytest.raises(ValueError, match=r"^decoder=gpu does not decode this data set \(no device\): use cpu$"):
            data_of(photographs, decoder="gpu").choose_decoder(GPU, before=None, probes=probes)


def test_the_hardware_of_hopper_decodes_all(photographs: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    loads = []
    for capability in ((8, 0), (9, 0), (12, 0)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, capability=capability: capability)
        probed = data_of(photographs)._probe(GPU).decode.gpu_decoder
        assert probed is not None
        loads.append(probed.hardware_load)
    assert loads == [0.65, 1.0, 0.65]


def test_a_run_whose_probe_fell_back_resumes_with_the_same_load(photographs: Dataset) -> None:
    data = data_of(photographs, hw_decoder_load=0.9)
    fallback = DecoderChoice(GpuDecoder(hardware_load=0.0), "as the run began")
    assert data.choose_decoder(GPU, before=fallback, probes=True) == fallback


def test_every_rank_gets_the_decoder_of_rank_0(photographs: Dataset) -> None:
    data = data_of(photographs)
    strategy = SimpleNamespace(broadcast=lambda mine: (mine, GpuDecoder())[1])
    data.trainer = SimpleNamespace(world_size=2, strategy=strategy)
    data.setup("fit")
    assert data.gpu_decoder == GpuDecoder()


def test_a_gpu_gets_uint8_crops_from_either_decoder(photographs: Dataset) -> None:
    data = data_of(photographs, threads=3, io_threads=8, prefetch=4)
    crops = data._settings_on(GPU, num_devices=1)
    assert (crops.device_id, crops.graph_device, crops.crops_only) == (0, None, True)
    assert (crops.threads, crops.io_threads, crops.prefetch) == (3, 8, 4)
    data.gpu_decoder = GpuDecoder()
    floats = data._settings_on(GPU, num_devices=1)
    assert (floats.device_id, floats.graph_device, floats.crops_only) == (0, 0, True)
