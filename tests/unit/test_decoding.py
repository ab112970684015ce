"""Decoding in processes: the same bytes as here, named errors, and no harm when a process is lost."""

import io
import os
import select
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from cluster import images
from cluster.signature import ImageEncoding
from training.data import decoding
from training.data.decoder import BadImage
from training.data.decoding import Decoders, decode_here

GREY = ImageEncoding(height=7, width=9, channels=1)


def png(number: int) -> bytes:
    out = io.BytesIO()
    noise = np.random.default_rng(number).integers(0, 256, (7, 9), np.uint8)
    Image.fromarray(noise).save(out, "PNG")
    return out.getvalue()


FILES = [png(number) for number in range(30)]
PIXELS = np.stack([images.decode(file, GREY) for file in FILES])


@pytest.fixture(scope="module")
def decoders() -> Iterator[Decoders]:
    made = Decoders(1)
    made.wait_until_ready()
    yield made
    made.close()


def column(files: list[bytes | None]) -> pa.ChunkedArray:
    half = len(files) // 2
    return pa.chunked_array([pa.array(part, pa.large_binary()) for part in (files[:half], files[half:])])


def test_a_process_gives_the_same_bytes(decoders: Decoders) -> None:
    pixels = np.zeros_like(PIXELS)
    decoders.decode(column(FILES).slice(3, 20), GREY, pixels[3:23])
    np.testing.assert_array_equal(pixels[3:23], PIXELS[3:23])
    assert not pixels[:3].any()
    decoders.decode(column([]), GREY, pixels[:0])


@pytest.mark.parametrize("bad", [None, b"", b"text", FILES[17][:60]])
def test_the_first_bad_file_is_named_and_the_process_goes_on(decoders: Decoders, bad: bytes | None) -> None:
    files = column([*FILES[:17], bad, *FILES[18:]])
    told = []
    for decode in (decoders.decode, decode_here):
        with pytest.raises(BadImage) as caught:
            decode(files, GREY, np.empty_like(PIXELS))
        told.append((caught.value.place, caught.value.failed, caught.value.got, caught.value.allowed))
    assert told[0] == told[1]
    assert told[0][0] == 17
    pixels = np.empty_like(PIXELS)
    decoders.decode(column(FILES), GREY, pixels)
    np.testing.assert_array_equal(pixels, PIXELS)


def test_when_a_process_is_killed_its_files_are_decoded_here() -> None:
    decoders = Decoders(1)
    decoders.wait_until_ready()
    os.kill(decoders.pids[0], signal.SIGKILL)
    for _ in range(2):
        pixels = np.empty_like(PIXELS)
        decoders.decode(column(FILES), GREY, pixels)
        np.testing.assert_array_equal(pixels, PIXELS)
    decoders.close()
    decoders.close()


def test_before_a_process_is_ready_files_are_decoded_here_and_closing_waits_for_nobody() -> None:
    decoders = Decoders(1)
    pixels = np.empty_like(PIXELS)
    decoders.decode(column(FILES), GREY, pixels)
    decoders.close()
    np.testing.assert_array_equal(pixels, PIXELS)


def test_a_process_that_hangs_is_given_up_and_its_files_are_decoded_here(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(decoding, "_ANSWERS_WITHIN_S", 0.2)
    decoders = Decoders(1)
    decoders.wait_until_ready()
    os.kill(decoders.pids[0], signal.SIGSTOP)
    for _ in range(2):
        pixels = np.empty_like(PIXELS)
        decoders.decode(column(FILES), GREY, pixels)
        np.testing.assert_array_equal(pixels, PIXELS)
    with pytest.raises(ProcessLookupError):  # killed and waited for, not left behind
        os.kill(decoders.pids[0], 0)
    decoders.close()


def test_where_no_process_can_be_started_files_are_decoded_here(monkeypatch: pytest.MonkeyPatch) -> None:
    real, started = subprocess.Popen, []

    def only_one(*args: Any, **options: Any) -> Any:
        if started:
            raise BlockingIOError(11, "Resource temporarily unavailable")
        started.append(real(*args, **options))
        return started[0]

    monkeypatch.setattr(subprocess, "Popen", only_one)
    decoders = Decoders(3)
    assert decoders.pids == [started[0].pid]
    decoders.close()
    started.clear()
    started.append(None)
    none = Decoders(3)
    pixels = np.empty_like(PIXELS)
    none.decode(column(FILES), GREY, pixels)
    np.testing.assert_array_equal(pixels, PIXELS)
    none.close()


def test_a_folder_of_the_same_name_where_the_trainer_stands_is_not_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """People call their own packages `training`, and run from the folder that holds them."""
    (tmp_path / "training").mkdir()
    (tmp_path / "training" / "__init__.py").write_text("raise SystemExit(1)")
    monkeypatch.chdir(tmp_path)
    decoders = Decoders(1)
    decoders.wait_until_ready()
    assert decoders._idle.qsize() == 1
    decoders.close()


TRAINER = """
import sys
from training.data.decoding import Decoders
decoders = Decoders(2)
decoders.wait_until_ready()
print(*decoders.pids, flush=True)
sys.stdin.read()
"""


def test_when_the_trainer_is_killed_its_processes_end() -> None:
    trainer = subprocess.Popen(
        [sys.executable, "-c", TRAINER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert trainer.stdout is not None
    watched = [os.pidfd_open(int(pid)) for pid in trainer.stdout.readline().split()]
    assert len(watched) == 2
    trainer.kill()
    trainer.communicate(timeout=10)
    for process in watched:
        assert select.select([process], [], [], 10)[0], "it outlived its trainer"
        os.close(process)
