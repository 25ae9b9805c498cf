"""A toy model, as docs/extending.md describes: the mean over time, and one linear layer."""

from torch import Tensor, nn

from ast_core.models.patchout import Patchout
from ast_core.models.tagger import Tagger


class MeanOverTime(Tagger):
    """`[batch, frames, mel bins]` → raw logits `[batch, label_dim]`, for any number of frames."""

    head = "classifier"

    def __init__(self, label_dim: int, input_tdim: int, input_fdim: int) -> None:
        super().__init__()
        self.label_dim, self.input_shape = label_dim, (input_tdim, input_fdim)
        self.classifier = nn.Linear(input_fdim, label_dim)

    def forward_features(self, fbank_BTM: Tensor) -> Tensor:
        return fbank_BTM.mean(dim=1)

    def forward(self, fbank_BTM: Tensor, patchout: Patchout | None = None) -> Tensor:
        return self.classifier(self.forward_features(fbank_BTM))

    def forward_flops(self, patchout_f: int = 0, patchout_t: int = 0) -> int:
        return 2 * self.label_dim * self.input_shape[1]
