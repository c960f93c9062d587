"""The choice of the device."""

import os

import pytest
import torch

from l2ul.common import device
from l2ul.common.errors import InputError


def test_the_chosen_device_must_exist():
    assert device.choose_device("cpu").type == "cpu"
    assert device.choose_device(None, no_cuda=True).type == "cpu"
    with pytest.raises(InputError, match="contradict"):
        device.choose_device("cuda", no_cuda=True)
    with pytest.raises(InputError, match="--device cuda is not available on this machine; expected one of"):
        device.choose_device("cuda")


def test_tests_and_the_processes_they_start_use_the_cpu():
    assert device.choose_device(None).type == "cpu"
    assert os.environ["CUDA_VISIBLE_DEVICES"] == ""


@pytest.mark.cuda
def test_tests_with_the_mark_use_the_gpu():
    assert device.choose_device(None).type == "cuda"


@pytest.mark.parametrize(
    ("others", "options", "threads"),
    [
        (0.2, {}, 4),
        (1.7, {}, 2),
        (9.0, {}, 1),
        (9.0, {"threads": 3}, 3),  # the user's choice
        (9.0, {"report": None}, 4),  # a caller that does not ask for it
    ],
)
def test_a_busy_machine_is_reported_and_its_other_processes_keep_their_cores(monkeypatch, others, options, threads):
    before, sentences = torch.get_num_threads(), []
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(device, "other_processes", lambda: others)
    monkeypatch.setattr(device.os, "sched_getaffinity", lambda process: set(range(4)), raising=False)
    torch.set_num_threads(4)
    try:
        device.choose_device("cpu", **{"report": sentences.append} | options)
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    if threads < 3:
        assert f"compute on 4 cores; using {threads} of 4 threads" in sentences[0]
    assert len(sentences) == (threads < 3)


def test_the_load_of_processes_that_have_ended_does_not_count(monkeypatch):
    monkeypatch.setattr(device.os, "getloadavg", lambda: (3.5, 0.0, 0.0))
    monkeypatch.setattr(device, "SAMPLE_SECONDS", 0)
    for running, expected in (("1/200", 0.0), ("3/200", 2.0), ("9/200", 3.5)):
        text = f"3.50 0.00 0.00 {running} 77\n"
        monkeypatch.setattr(device.Path, "read_text", lambda path, content=text: content)
        assert device.other_processes() == expected
