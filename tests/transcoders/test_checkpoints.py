"""Resume equals an uninterrupted run; nothing that goes wrong while writing costs more than the last interval."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.transcoders.conftest import SMALL
from tests.transcoders.test_train import assert_equal
from tl_neuron_circuits._errors import FileFormatError, NumericalError, SaveError, SettingsError
from tl_neuron_circuits.transcoders import train
from tl_neuron_circuits.transcoders._train import checkpoints, newest_checkpoint, read_checkpoint, write_checkpoint
from tl_neuron_circuits.transcoders._trainee import Trainee

VARIANTS = [
    SMALL,
    SMALL.replace(activation="relu", penalty=0.3, dead_features="resample", skip=True, dead_after=50),
    SMALL.replace(activation="jumprelu", buffer_size=0, target="sae"),
    SMALL.replace(activation="topk", k=1, d_dict=64, dead_after=100, precision="bfloat16", ignore_tokens=(3,)),
]
each_variant = pytest.mark.parametrize("config", VARIANTS, ids=lambda config: config.activation)


class _StoppedError(Exception):
    pass


def stop_at(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """Let training end abruptly before a step."""
    original = Trainee.step

    def stopping(self: Trainee, x: Tensor, y: Tensor, now: int) -> dict[str, float]:
        if now == step:
            raise _StoppedError
        return original(self, x, y, now)

    monkeypatch.setattr(Trainee, "step", stopping)


@each_variant
def test_resume_equals_an_uninterrupted_run_bit_for_bit(
    one_tiny: Any, tokens: Tensor, config: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = train(one_tiny, tokens, config, verbose=False)
    with monkeypatch.context() as patch:
        stop_at(patch, 13)
        with pytest.raises(_StoppedError):
            train(one_tiny, tokens, config, directory=tmp_path, verbose=False)
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-00000009"]
    resumed = train(one_tiny, tokens, config, directory=tmp_path, resume=True, verbose=False)
    assert_equal(whole, resumed)
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-00000018", "checkpoint-00000024"]


def test_a_finished_run_resumes_to_its_result(one_tiny: Any, tokens: Tensor, tmp_path: Path) -> None:
    whole = train(one_tiny, tokens, SMALL, directory=tmp_path, verbose=False)
    assert_equal(whole, train(one_tiny, tokens, SMALL, directory=tmp_path, resume=True, verbose=False))


@pytest.mark.parametrize("once", [False, True])
def test_an_iterable_resumes_too(one_tiny: Any, tokens: Tensor, tmp_path: Path, once: bool) -> None:
    batches = list(tokens.repeat(4, 1).split(4))

    def source() -> Any:
        return iter(batches) if once else batches

    whole = train(one_tiny, source(), SMALL, directory=tmp_path, verbose=False)
    for path in checkpoints(tmp_path)[1:]:
        _remove(path)
    assert_equal(whole, train(one_tiny, source(), SMALL, directory=tmp_path, resume=True, verbose=False))


def _remove(path: Path) -> None:
    for file in path.iterdir():
        file.unlink()
    path.rmdir()


_KILLED = """
import os, signal, sys, torch
from tests.families import model_cases, random_tokens
from tests.transcoders.conftest import SMALL
from tl_neuron_circuits import _files
from tl_neuron_circuits.transcoders import train
original = _files.save_file
def dying(tensors, path, metadata):
    original(tensors, path, metadata)
    if "00000018" in str(path):  # the folder of the checkpoint
        with open(path, "r+b") as file:
            file.truncate(1000)
        os.kill(os.getpid(), signal.SIGKILL)
_files.save_file = dying
model = model_cases("gpt2")[-1].build(torch.float32)
train(model, random_tokens(model, batch=40, pos=12), SMALL, directory=sys.argv[1], verbose=False)
"""


def test_a_process_killed_while_writing_leaves_a_readable_directory(
    one_tiny: Any, tokens: Tensor, tmp_path: Path
) -> None:
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", _KILLED, str(tmp_path)], cwd=root, capture_output=True, timeout=300)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-00000009"]
    assert len(list(tmp_path.iterdir())) == 2  # what was being written is still there, but not as a checkpoint
    resumed = train(one_tiny, tokens, SMALL, directory=tmp_path, resume=True, verbose=False)
    assert_equal(train(one_tiny, tokens, SMALL, verbose=False), resumed)
    assert len(list(tmp_path.iterdir())) == 2 == len(checkpoints(tmp_path))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs limits on file sizes")
def test_a_full_disk_is_a_clear_error_and_earlier_checkpoints_stay(
    one_tiny: Any, tokens: Tensor, tmp_path: Path
) -> None:
    """A limit on the size of files stands for the full disk: the system refuses the write halfway in the same way."""
    import resource

    train(one_tiny, tokens, SMALL.replace(steps=9), directory=tmp_path, verbose=False)
    config = SMALL.replace(steps=9)
    tensors, notes = read_checkpoint(newest_checkpoint(tmp_path), config, {})
    contents = {name: getattr(notes, name) for name in notes.__struct_fields__}
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
        with pytest.raises(SaveError, match=r"could not be written.*checkpoint-00000009 is whole"):
            write_checkpoint(tmp_path, 18, tensors, contents, keep=2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-00000009"]
    again, _ = read_checkpoint(newest_checkpoint(tmp_path), config, {})
    assert all(torch.equal(tensor, again[name]) for name, tensor in tensors.items())


def test_other_settings_are_refused(one_tiny: Any, tokens: Tensor, tmp_path: Path) -> None:
    train(one_tiny, tokens, SMALL.replace(steps=2), directory=tmp_path, verbose=False)
    with pytest.raises(SettingsError, match=r"other settings: \{'steps': 2\}"):
        train(one_tiny, tokens, SMALL.replace(steps=3), directory=tmp_path, resume=True, verbose=False)
    with pytest.raises(SettingsError, match="already holds checkpoints"):
        train(one_tiny, tokens, SMALL.replace(steps=2), directory=tmp_path, verbose=False)


def test_another_model_or_other_tokens_are_refused(one_tiny: Any, tokens: Tensor, tmp_path: Path) -> None:
    config = SMALL.replace(steps=2)
    train(one_tiny, tokens, config, directory=tmp_path, verbose=False)
    with pytest.raises(SettingsError, match=r"written with different tokens \("):
        train(one_tiny, tokens.flip(0), config, directory=tmp_path, resume=True, verbose=False)
    with torch.no_grad():
        next(iter(one_tiny.parameters())).add_(1)
    with pytest.raises(SettingsError, match=r"written with different model \("):
        train(one_tiny, tokens, config, directory=tmp_path, resume=True, verbose=False)


def test_weights_that_are_not_finite_never_reach_a_checkpoint(one_tiny: Any, tokens: Tensor, tmp_path: Path) -> None:
    """The loss of a step is finite and its update overflows: what is on disk is from before it."""
    config = SMALL.replace(checkpoint_every=1)
    original = Trainee.step

    def overflowing(self: Trainee, x: Tensor, y: Tensor, step: int) -> dict[str, float]:
        measured = original(self, x, y, step)
        if step == 2:
            self.weights["W_enc"].detach().mul_(1e38).mul_(10)
        return measured

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainee, "step", overflowing)
        with pytest.raises(NumericalError, match=r"not finite after step 3.*checkpoint-00000002 is unchanged"):
            train(one_tiny, tokens, config, directory=tmp_path, verbose=False)
    tensors, _ = read_checkpoint(newest_checkpoint(tmp_path), config, {})
    assert all(tensor.isfinite().all() for tensor in tensors.values())


def test_damaged_checkpoints_are_refused(one_tiny: Any, tokens: Tensor, tmp_path: Path) -> None:
    config = SMALL.replace(steps=2)
    with pytest.raises(SettingsError, match="needs the directory"):
        train(one_tiny, tokens, config, resume=True, verbose=False)
    with pytest.raises(FileFormatError, match="there is none"):
        train(one_tiny, tokens, config, directory=tmp_path, resume=True, verbose=False)
    train(one_tiny, tokens, config, directory=tmp_path, verbose=False)
    (file,) = tmp_path.glob("*/*.safetensors")
    file.write_bytes(file.read_bytes()[:500])
    with pytest.raises(FileFormatError, match="truncated"):
        train(one_tiny, tokens, config, directory=tmp_path, resume=True, verbose=False)


def test_an_iterator_that_ends_early_leaves_the_checkpoints(one_tiny: Any, tokens: Tensor, tmp_path: Path) -> None:
    def some() -> Iterator[Tensor]:
        yield from tokens.split(4)[:8]

    with pytest.raises(SettingsError, match=r"8 batches, then no more.*checkpoint-00000009 is unchanged"):
        train(one_tiny, some(), SMALL, directory=tmp_path, verbose=False)
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-00000009"]


def test_two_trainings_do_not_share_a_directory(
    one_tiny: Any, tokens: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second raises at once and writes nothing; its own folder is free again when the first ends."""
    original, tried = Trainee.step, []

    def second(self: Trainee, x: Tensor, y: Tensor, now: int) -> Any:
        if now == 5 and not tried:
            for resume in (False, True):
                tried.append(resume)
                with pytest.raises(SaveError, match="in use by another process"):
                    train(one_tiny, tokens, SMALL, directory=tmp_path, resume=resume, verbose=False)
        return original(self, x, y, now)

    monkeypatch.setattr(Trainee, "step", second)
    whole = train(one_tiny, tokens, SMALL, directory=tmp_path, verbose=False)
    assert tried == [False, True]
    assert_equal(whole, train(one_tiny, tokens, SMALL, directory=tmp_path, resume=True, verbose=False))
