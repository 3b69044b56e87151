"""`HookedModel`: one adapter over transformers and TransformerLens that checks itself when it opens.

Two structural copies of the same weights stand side by side. `hf` is plain transformers, fast, and carries the
hooks of the engine; `bridge` is TransformerLens' `TransformerBridge` with the field's hook names. Both share the
storage of the weights they were opened from, and neither changes the module tree, the flags or the gradients of
the object that the user gave.
"""

import hashlib
import inspect
import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from workbench.facts import FactSet, TokenisedFact

Unit = Literal["node", "neuron"]
Patch = Callable[[Tensor], Tensor]

log = logging.getLogger(__name__)

#: Settings of a configuration that change nothing of what a model says.
NO_MATTER = frozenset(
    ["_name_or_path", "architectures", "attn_implementation", "_attn_implementation", "auto_map", "dtype", "id2label",
     "label2id", "task_specific_params", "torch_dtype", "transformers_version", "use_cache"]
)  # fmt: skip
#: What a tokenizer does to these lines tells it from others.
PROBES = ("The capital of France is Paris.", " 3.14 = x_1\n\tDon't", "Zoë naïve 東京 🦊")


@dataclass(frozen=True, eq=False)
class HookedModel:
    """A decoder-only language model with dense FFNs that one can look into.

    Attributes:
        name: what the user called it.
        hf: plain transformers model, in evaluation mode, its parameters without gradients.
        tokenizer: its tokenizer.
        bridge: TransformerLens' bridge over the same weights, with hooks named `blocks.{l}.mlp.out.hook_out` (nodes)
            and `blocks.{l}.mlp.out.hook_in` (neurons).
        block_names: qualified names of the transformer blocks in `hf`, one a layer.
        down_names: qualified names of the FFN down-projections in `hf`, one a layer.
        path: the folder of safetensors it was opened from, or None.
    """

    name: str
    hf: Any
    tokenizer: Any
    bridge: Any
    block_names: tuple[str, ...]
    down_names: tuple[str, ...]
    path: Path | None = None

    def __repr__(self) -> str:
        sizes = f"{self.n_layers} layers, {self.d_model} nodes and {self.d_mlp} neurons each, {self.d_vocab} tokens"
        return f"HookedModel({self.name!r}: {sizes}, {str(self.dtype).removeprefix('torch.')} on {self.device})"

    @property
    def config(self) -> Any:
        """The transformers configuration."""
        return self.hf.config

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.W_E.device

    @property
    def dtype(self) -> torch.dtype:
        """The type of the weights."""
        return self.W_E.dtype

    @property
    def n_layers(self) -> int:
        """Number of transformer blocks."""
        return len(self.block_names)

    @property
    def d_model(self) -> int:
        """Width of a down-projection's output: the number of nodes per layer."""
        return self.width("node")

    @property
    def d_mlp(self) -> int:
        """Width of a down-projection's input: the number of neurons per layer."""
        return self.width("neuron")

    @property
    def d_vocab(self) -> int:
        """Number of rows of the unembedding."""
        return self.W_U.shape[0]

    @property
    def max_tokens(self) -> int | None:
        """The longest text in tokens, or None where the architecture sets no limit.

        Rotary tables that change with the longest text of a batch (longrope, dynamic) set theirs where they change:
        beyond it what is read of a text would depend on the others in its batch.
        """
        text = self.config.get_text_config()
        names = ("max_position_embeddings", "n_positions", "max_seq_len")
        limit = next((found for name in names if (found := getattr(text, name, None))), None)
        rope = getattr(text, "rope_parameters", None) or {}
        kinds = [one for one in (rope, *rope.values()) if isinstance(one, Mapping)]  # one, or one a kind of layer
        if any(one.get("rope_type") in ("longrope", "dynamic") for one in kinds):
            firsts = [one.get("original_max_position_embeddings") for one in kinds]
            firsts.append(getattr(text, "original_max_position_embeddings", None))
            return min(first for first in (*firsts, limit) if first)
        return limit

    @property
    def W_E(self) -> Float[Tensor, "d_vocab d_embed"]:
        """Token embedding, one row a token."""
        return self.hf.get_input_embeddings().weight

    @property
    def W_U(self) -> Float[Tensor, "d_vocab d_embed"]:
        """Unembedding, one row a token (the same tensor as `W_E` where the two are tied)."""
        return self.hf.get_output_embeddings().weight

    @property
    def digest(self) -> str:
        """SHA-256 over what a model says: equal for equal models, whatever their name.

        That is every weight's name, type, shape and bytes, the settings of the architecture, and what the tokenizer
        makes of a few lines of text (a BOS among them). It is computed anew once the weights, which a loaded model
        shares with its owner, have been changed in place (seen by PyTorch's count of writes and the weights' sums).
        """
        weights = self.hf.state_dict()
        sums = torch.stack([tensor.detach().sum(dtype=torch.float32) for tensor in weights.values()]).tolist()
        state = [
            (name, t.data_ptr(), t._version, total) for (name, t), total in zip(weights.items(), sums, strict=True)
        ]
        kept: tuple[Any, str] | None = self.__dict__.get("_digest")
        if kept is None or kept[0] != repr(state):
            kept = (repr(state), self._computed_digest())
            self.__dict__["_digest"] = kept
        return kept[1]

    def _computed_digest(self) -> str:
        settings = self.config.to_diff_dict().items()
        plain = {name: value for name, value in settings if name not in NO_MATTER and not name.endswith("_token_id")}
        tokens = [list(self.tokenizer(line).input_ids) for line in PROBES] if self.tokenizer is not None else None
        digest = hashlib.sha256(json.dumps([plain, tokens], sort_keys=True, default=str).encode())
        for name, tensor in sorted(self.hf.state_dict().items()):
            digest.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)};".encode())
            digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
        return digest.hexdigest()

    def width(self, unit: str) -> int:
        """Number of units per layer: `d_model` nodes or `d_mlp` neurons."""
        return projection_widths(self.down_proj(0))[check_unit(unit) == "node"]

    def down_proj(self, layer: int) -> nn.Module:
        """The down-projection of one layer: `nn.Linear`, or gpt2's transposed `Conv1D`."""
        return self.hf.get_submodule(self.down_names[layer])

    def block(self, layer: int) -> nn.Module:
        """One transformer block."""
        return self.hf.get_submodule(self.block_names[layer])

    def tokenise(self, facts: FactSet) -> list[TokenisedFact]:
        """Tokenise facts for this model: each must fit its context, and every id its vocabulary (else `ValueError`)."""
        tokens = facts.tokenise(self.tokenizer, max_tokens=self.max_tokens)
        for fact in tokens:
            if max(fact.ids) >= self.d_vocab:
                raise ValueError(
                    f"The tokenizer gives fact {fact.fact_id!r} the id {max(fact.ids)}, but {self.name} has only "
                    f"{self.d_vocab} tokens: the tokenizer belongs to another model."
                )
        return tokens

    def inputs(
        self, input_ids: Int[Tensor, "batch pos"], attention_mask: Int[Tensor, "batch pos"] | None = None
    ) -> dict[str, Any]:
        """Keyword arguments of `hf` for a padded batch: positions count real tokens, so padding changes nothing."""
        input_ids = input_ids.to(self.device)
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask.to(self.device)
        inputs = {"input_ids": input_ids, "attention_mask": mask}
        if takes_position_ids(self.hf):
            inputs["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)
        return inputs

    def keeping(self, last: int) -> dict[str, int]:
        """Keyword arguments of `hf` with which it unembeds at least the `last` positions, and no others if it can."""
        return {"logits_to_keep": last} if "logits_to_keep" in inspect.signature(self.hf.forward).parameters else {}

    @torch.no_grad()
    def logits(
        self,
        input_ids: Int[Tensor, "batch pos"],
        attention_mask: Int[Tensor, "batch pos"] | None = None,
        *,
        last: int | None = None,
    ) -> Float[Tensor, "batch kept d_vocab"]:
        """Next-token logits at every position, equal to plain transformers' on the unpadded text.

        With `last`, only at that many last positions, which spares the others their unembedding.
        """
        options = {} if last is None else self.keeping(last)
        logits = self.hf(**self.inputs(input_ids, attention_mask), use_cache=False, **options).logits
        return logits if last is None else logits[:, -last:]

    @torch.no_grad()
    def resid_post(
        self,
        input_ids: Int[Tensor, "batch pos"],
        attention_mask: Int[Tensor, "batch pos"] | None,
        positions: Int[Tensor, " batch"],
    ) -> Float[Tensor, "layer batch d_model"]:
        """The residual stream after every block, at one position of each row."""
        positions = positions.to(self.device)
        rows = torch.arange(len(positions), device=self.device)
        kept: list[Tensor] = []

        def keep(module: nn.Module, args: Any, output: Any) -> None:
            hidden = output if isinstance(output, Tensor) else output[0]
            kept.append(hidden[rows, positions].clone())

        with ExitStack() as stack:
            for layer in range(self.n_layers):
                stack.callback(self.block(layer).register_forward_hook(keep).remove)
            self.hf(**self.inputs(input_ids, attention_mask), use_cache=False)
        return torch.stack(kept)

    @contextmanager
    def patched(self, unit: str, patches: Mapping[int, Patch]) -> Iterator[None]:
        """Replace the unit activations of some layers inside the `with`: `patches[layer](activation) -> activation`.

        Activations have shape (batch, pos, unit). No hook outlives the `with`, also after an error.
        """
        check_unit(unit)

        batch = 0

        def count(module: nn.Module, args: Any, output: Tensor) -> None:
            nonlocal batch
            batch = output.shape[0]

        def shaped(patch: Patch, value: Tensor) -> Tensor:
            """Call `patch` with (batch, pos, unit), also where the block flattens batch and pos, as OPT does."""
            return patch(value.view(batch, -1, value.shape[-1])).view(value.shape)

        def after(patch: Patch) -> Callable[..., Tensor]:
            return lambda module, args, output: shaped(patch, output)

        def before(patch: Patch) -> Callable[..., tuple[Any, ...]]:
            return lambda module, args: (shaped(patch, args[0]), *args[1:])

        with ExitStack() as stack:
            stack.callback(self.hf.get_input_embeddings().register_forward_hook(count).remove)
            for layer, patch in patches.items():
                module = self.down_proj(layer)
                if unit == "node":
                    handle = module.register_forward_hook(after(patch))
                else:
                    handle = module.register_forward_pre_hook(before(patch))
                stack.callback(handle.remove)
            yield


@contextmanager
def forward_through(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Give a module another forward inside the `with`, and afterwards what it had, its own or one it was given."""
    given = module.__dict__.get("forward")
    module.forward = forward
    try:
        yield
    finally:
        if given is None:
            del module.forward
        else:
            module.forward = given


def takes_position_ids(hf: Any) -> bool:
    """Whether the architecture is told positions (ALiBi models are not)."""
    return "position_ids" in inspect.signature(hf.forward).parameters


def check_unit(unit: str) -> Unit:
    """The unit's name, or a clear error."""
    if unit not in ("node", "neuron"):
        raise ValueError(
            f'unit must be "node" (an output of the down-projection) or "neuron" (an input), not {unit!r}.'
        )
    return cast(Unit, unit)


def projection_widths(module: nn.Module) -> tuple[int, int]:
    """(inputs, outputs) of a projection, from its weight: `nn.Linear` keeps (out, in), gpt2's `Conv1D` (in, out).

    >>> projection_widths(nn.Linear(3, 2))
    (3, 2)
    """
    rows, columns = cast(Tensor, module.weight).shape
    return (rows, columns) if inputs_first(module) else (columns, rows)


def inputs_first(module: nn.Module) -> bool:
    """Whether a projection's weight is (in, out), as in gpt2's `Conv1D`, and not (out, in)."""
    return type(module).__name__ == "Conv1D"


def pad_batch(
    sequences: Sequence[Sequence[int]], pad_id: int = 0, side: str = "left"
) -> tuple[Int[Tensor, "batch pos"], Int[Tensor, "batch pos"]]:
    """Token ids and attention mask of sequences of different lengths.

    >>> pad_batch([[5, 6], [7]])[0].tolist(), pad_batch([[5, 6], [7]], side="right")[1].tolist()
    ([[5, 6], [0, 7]], [[1, 1], [1, 0]])
    """
    width = max(map(len, sequences))
    ids = torch.full((len(sequences), width), pad_id, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, sequence in enumerate(sequences):
        place = slice(width - len(sequence), width) if side == "left" else slice(0, len(sequence))
        ids[row, place] = torch.tensor(sequence, dtype=torch.long)
        mask[row, place] = 1
    return ids, mask
