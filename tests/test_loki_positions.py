"""A position file that was published with LoKI (`LOKI_POSITIONS` says where it is): read, trained, written back."""

import json
import os
from pathlib import Path

import pytest
import torch
from peft import get_peft_model
from transformers import Qwen2Config, Qwen2ForCausalLM

from workbench.loki import LokiConfig
from workbench.selection import Selection

FILE = Path(os.environ.get("LOKI_POSITIONS", "positions.json"))  # qwen2.5-0.5b-instruct, 10% of the nodes
N_LAYERS, WIDTH, CHOSEN = 24, 896, 89  # floor(896 / 10)

pytestmark = [
    pytest.mark.skipif(not FILE.is_file(), reason="LOKI_POSITIONS names no published file of positions"),
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]


def qwen2() -> Qwen2ForCausalLM:
    """As deep and as wide as Qwen2.5-0.5B, and small in everything else."""
    torch.manual_seed(0)
    narrow = {"intermediate_size": 8, "num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 2}
    config = Qwen2Config(vocab_size=16, hidden_size=WIDTH, num_hidden_layers=N_LAYERS, **narrow)
    return Qwen2ForCausalLM(config)


def test_the_published_positions_are_read_trained_and_written_back(tmp_path: Path) -> None:
    published = json.loads(FILE.read_text(encoding="utf-8"))
    selection = Selection.from_positions(FILE, unit="node", n_units=WIDTH, n_layers=N_LAYERS)
    assert selection.per_layer()["n_selected"].tolist() == [CHOSEN] * N_LAYERS
    assert json.loads(selection.to_positions(tmp_path / "again.json").read_text()) == published
    assert json.loads(selection.save(tmp_path / "selection.json").read_text())["positions"] == published

    before = {name: weight.clone() for name, weight in qwen2().state_dict().items()}
    model = get_peft_model(qwen2(), LokiConfig(selection=str(FILE), unit="node"))
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.5)
    ids = torch.tensor([[3, 5, 7, 9, 11, 2]])
    model(input_ids=ids, labels=ids).loss.backward()
    optimiser.step()
    model.save_pretrained(tmp_path / "adapter")
    kept = json.loads((tmp_path / "adapter/adapter_config.json").read_text())["positions"]
    assert kept == [sorted(rows) for rows in published] != published  # the file lists them in another order
    for name, weight in model.merge_and_unload().state_dict().items():
        moved = (weight != before[name]).reshape(len(weight), -1).any(1).nonzero().flatten().tolist()
        layer = int(name.split(".")[2]) if "layers" in name else None
        assert moved == (kept[layer] if name.endswith("down_proj.weight") else []), name
