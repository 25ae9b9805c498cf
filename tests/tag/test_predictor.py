"""What the computation of scores says when it fails."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from ast_core.errors import UserError
from pipeline.tag.predictor import Predictor
from tests.tag import stub

WINDOWS = np.zeros((3, 100, 128), np.float16)
OF_GPU = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
FOR_MODEL = "the GPU has too little memory for the model; raise --gpus-per-worker, or use --device cpu"
FOR_WINDOWS = (
    "the GPU has too little memory for 3 windows; lower --batch-windows, or raise --gpus-per-worker, or use "
    "--device cpu"
)
OF_MACHINE = "the machine has too little memory for 3 windows; lower --batch-windows, or lower --num-workers"


class Failing(stub.BandTagger):
    def __init__(self, *, in_move: Exception | None = None, in_windows: Exception | None = None) -> None:
        super().__init__()
        self.in_move, self.in_windows = in_move, in_windows

    def to(self, *args: Any, **options: Any) -> "Failing":
        if self.in_move is not None:
            raise self.in_move
        return self

    def outputs(self, fbank_BTM: torch.Tensor) -> Any:
        if self.in_windows is not None:
            raise self.in_windows
        return super().outputs(fbank_BTM)


def predictor(model: Failing, *, embeddings: bool = False) -> Predictor:
    member = replace(stub.member(), model=model.eval())
    return Predictor([member], torch.device("cpu"), embeddings=embeddings, frames=False)


@pytest.mark.parametrize("embeddings", [False, True])
@pytest.mark.parametrize(
    ("error", "line"),
    [
        (OF_GPU, FOR_WINDOWS),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."), OF_MACHINE),
        (MemoryError(), OF_MACHINE),
    ],
)
def test_too_little_memory_for_windows_is_a_line(error: Exception, line: str, embeddings: bool):
    with pytest.raises(UserError) as caught:
        predictor(Failing(in_windows=error), embeddings=embeddings)(WINDOWS)
    assert str(caught.value) == line


def test_too_little_memory_for_the_model_is_a_line_and_other_errors_are_not():
    with pytest.raises(UserError) as caught:
        predictor(Failing(in_move=OF_GPU))
    assert str(caught.value) == FOR_MODEL
    with pytest.raises(RuntimeError, match=r"^shapes do not match$"):
        predictor(Failing(in_windows=RuntimeError("shapes do not match")))(WINDOWS)
