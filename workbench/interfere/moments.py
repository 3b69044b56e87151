"""The second moment of keys over general text, layer by layer, kept in the cache; and its shrinkage."""

import hashlib
import json
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from workbench.models import HookedModel, Patch, pad_batch
from workbench.models.cache import cache_folder, require_space
from workbench.recollection import by_length, text_chunks

#: At most so many tokens of general text, in pieces of so many.
TEXT_TOKENS = 20_000
PIECE = 256

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Moment:
    """What is kept of the keys of one layer: mean k k^T, mean |k|^4, and over how many tokens."""

    second: Float[Tensor, "neuron neuron"]
    fourth: float
    tokens: int

    def shrunk(self) -> tuple[Float[Tensor, "neuron neuron"], float]:
        """`C = (1 - s) S + s m I`: Ledoit and Wolf's (2004) closed form, uncentred; and the shrinkage s.

        With S the mean of k k^T over n tokens and d neurons, m = tr S / d, and

            s = min(1, (mean |k|^4 - |S|^2) / n / |S - m I|^2)     (Frobenius norms)

        which minimises the expected squared error were the tokens independent. Tokens of one text are not, so s is
        rather too small. Without any spread, or where nothing was active at all, C is m I or I.

        >>> moment = Moment(torch.diag(torch.tensor([3.0, 1.0])), 12.0, 4)
        >>> moment.shrunk()[0].tolist(), moment.shrunk()[1]
        ([[2.75, 0.0], [0.0, 1.25]], 0.25)
        """
        eye = torch.eye(len(self.second), dtype=self.second.dtype)
        mean = float(self.second.trace()) / len(self.second)
        if not mean > 0:
            return eye, 1.0
        spread = float((self.second - mean * eye).square().sum())
        error = (self.fourth - float(self.second.square().sum())) / self.tokens
        shrinkage = min(1.0, max(0.0, error / spread)) if spread > 0 else 1.0
        return (1 - shrinkage) * self.second + shrinkage * mean * eye, shrinkage

    def factor(self) -> tuple[Float[Tensor, "neuron neuron"], float]:
        """The lower Cholesky factor of the shrunk second moment, and the shrinkage.

        Where that is singular to rounding, as with neurons that never speak and hardly any shrinkage, shrinkage is
        doubled until it is not.
        """
        covariance, shrinkage = self.shrunk()
        eye = torch.eye(len(covariance), dtype=covariance.dtype)
        mean = float(self.second.trace()) / len(self.second)
        lower, failed = torch.linalg.cholesky_ex(covariance)
        while failed:
            shrinkage = min(1.0, max(2 * shrinkage, 1e-6))
            lower, failed = torch.linalg.cholesky_ex((1 - shrinkage) * self.second + shrinkage * mean * eye)
        return lower, shrinkage


def second_moments(
    model: HookedModel, passages: Sequence[str], layers: Sequence[int], budget: float, progress: bool = False
) -> Iterator[tuple[int, Moment]]:
    """`E[k k^T]` of each layer, k the inputs of its down-projection at every token of general text but first ones.

    The first token of a piece is left out: it is where models park attention, and its activations, a hundred times
    those of words, would be most of the moment. What was measured is kept in the cache by the digests of the model and
    of the text's tokens (`2 d_mlp^2` bytes a layer), and measured again where its file is damaged; layers are measured
    in groups that fit `budget` bytes. What is refused is refused at the call, before anything is measured.

    Raises:
        ValueError: no text, or a budget that does not hold one layer.
    """
    chunks = text_chunks(model, passages, max_tokens=TEXT_TOKENS, length=PIECE)
    each = 8 * model.d_mlp**2
    size = int(budget // (2 * each))  # as much again for a pass and for the layer at hand
    if size < 1:
        raise ValueError(
            f"The keys' second moment of one layer of {model.name} takes {2 * each / 2**30:.2f} GiB, more than the "
            f"{budget / 2**30:.2f} GiB at hand: give more with memory=."
        )
    return _in_groups(model, chunks, layers, size, progress)


def _in_groups(
    model: HookedModel, chunks: Sequence[Sequence[int]], layers: Sequence[int], size: int, progress: bool
) -> Iterator[tuple[int, Moment]]:
    """The moments, stored or measured, of so many layers at a time."""
    key = hashlib.sha256((model.digest + json.dumps(chunks)).encode()).hexdigest()
    folder = cache_folder("moments", key[:32])
    for start in range(0, len(layers), size):
        group = layers[start : start + size]
        found = {layer: _stored(folder / f"{layer}.safetensors", model.d_mlp) for layer in group}
        missing = [layer for layer, moment in found.items() if moment is None]
        found.update(_measured(model, chunks, missing, progress) if missing else {})
        for layer in missing:
            _store(folder / f"{layer}.safetensors", found[layer])
        for layer in group:
            moment = found.pop(layer)
            assert moment is not None
            yield layer, moment


@torch.no_grad()
def _measured(
    model: HookedModel, chunks: Sequence[Sequence[int]], layers: Sequence[int], progress: bool
) -> dict[int, Moment | None]:
    """The moments of some layers, from one run of the whole text."""
    total = {layer: torch.zeros(model.d_mlp, model.d_mlp, dtype=torch.float64) for layer in layers}
    fourth = dict.fromkeys(layers, 0.0)
    kept: Tensor

    def add(layer: int) -> Patch:
        def read(activation: Tensor) -> Tensor:
            keys = activation[kept].float()
            total[layer] += (keys.T @ keys).cpu()
            fourth[layer] += float(keys.square().sum(-1).cpu().double().square().sum())
            return activation

        return read

    tokens = 0
    with tqdm(total=len(chunks), unit="piece", desc="keys of text", disable=not progress) as bar:
        for batch in by_length([len(chunk) for chunk in chunks]):
            ids, mask = pad_batch([chunks[i] for i in batch], side="left")
            kept = (mask.cumsum(-1) > 1).to(model.device)
            tokens += int(kept.sum())
            with model.patched("neuron", {layer: add(layer) for layer in layers}):
                model.logits(ids, mask, last=1)
            bar.update(len(batch))
    # rounded as they are stored, so that what is measured equals what is read again
    return {layer: Moment((total[layer] / tokens).float().double(), fourth[layer] / tokens, tokens) for layer in layers}


def _store(file: Path, moment: Moment | None) -> None:
    """Keep the lower triangle, whole or not at all; a full disk costs the next run its time and nothing else."""
    assert moment is not None
    rows, columns = torch.tril_indices(*moment.second.shape)
    tensors = {"lower": moment.second[rows, columns].float()}
    about = {"fourth": repr(moment.fourth), "tokens": str(moment.tokens)}
    about["sha256"] = _sum_of(tensors["lower"], about)
    draft = file.with_name(f".{file.name}.{os.getpid()}.draft")
    try:
        require_space(file.parent, 2 * tensors["lower"].nbytes, "keeping the second moment of the keys")
        save_file(tensors, draft, metadata=about)
        os.replace(draft, file)
    except OSError as error:
        log.warning("the second moment of the keys is not kept: %s", error)
        draft.unlink(missing_ok=True)


def _stored(file: Path, width: int) -> Moment | None:
    """What was kept; None where there is nothing, or what is there is damaged, or has no sum that would tell."""
    if not file.is_file():
        return None
    try:
        with safe_open(file, framework="pt") as stored:
            about, lower = stored.metadata() or {}, stored.get_tensor("lower")
    except (OSError, SafetensorError) as error:
        log.warning("the second moment of the keys in %s cannot be read and is measured again: %s", file, error)
        return None
    if (told := about.get("sha256")) != _sum_of(lower, about):
        if told is not None:
            log.warning("the second moment of the keys in %s is damaged and is measured again", file)
        return None
    second = torch.zeros(width, width, dtype=torch.float64)
    rows, columns = torch.tril_indices(width, width)
    second[rows, columns] = second[columns, rows] = lower.double()
    return Moment(second, float(about["fourth"]), int(about["tokens"]))


def _sum_of(lower: Tensor, about: Mapping[str, str]) -> str:
    """The sha256 of all numbers of a moment."""
    digest = hashlib.sha256(f"{about.get('fourth')} {about.get('tokens')} {lower.dtype} {list(lower.shape)}".encode())
    digest.update(lower.numpy().data)
    return digest.hexdigest()
