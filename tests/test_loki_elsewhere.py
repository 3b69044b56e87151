"""LoKI under other people's machinery: compilers, quantised bases, trainers."""

import importlib
import shutil
import subprocess
import sys
import warnings
from pathlib import Path
from types import ModuleType

import pytest
import torch
from peft import PeftModel, get_peft_model
from test_loki import IDS, ROWS, logits, plain, same_bits, tiny, train
from tiny import tokenizer
from torch import nn
from torch.utils.data import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from workbench import announcing
from workbench.loki import LokiConfig, LokiLayer, folding

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

HOME = Path(__file__).parent.parent


def quietly(name: str) -> ModuleType:
    """Import an optional package whose own warnings are not ours, or skip."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip(name, reason=f"{name} is not installed", exc_type=ImportError)


class Sentences(Dataset):
    """The rows of `IDS`, as a trainer wants them."""

    def __len__(self):
        return len(IDS)

    def __getitem__(self, i):
        return {"input_ids": IDS[i], "labels": IDS[i]}


# torch.compile

COMPILED = """
import torch
from torch import nn
from torch._inductor import config
from workbench.loki import LokiConfig, LokiLayer
from workbench.loki.sites import Site

config.cpp.simdlen, config.cpp_cache_precompile_headers = 1, False  # the compiler is asked less, and sooner done
torch.manual_seed(0)
for axis, backend in (("row", "inductor"), ("column", "aot_eager")):
    index = (1, 4, 7)
    layer = LokiLayer(nn.Linear(12, 10), "default", Site(0, axis, index, bias=axis == "row"),
                      LokiConfig(selection=[list(index)]))
    trained = [weight for name, weight in layer.named_parameters() if "loki_" in name]
    for weight in trained:
        nn.init.normal_(weight)
    layer.base_layer.requires_grad_(False)
    x = torch.randn(2, 5, 12, requires_grad=True)
    compiled = torch.compile(layer, fullgraph=True, backend=backend)
    ways = [[y, *torch.autograd.grad((y**2).sum(), [x, *trained])] for y in (layer(x), compiled(x))]
    assert all(torch.allclose(one, other, atol=1e-4) for one, other in zip(*ways, strict=True))
    with torch.no_grad():
        trained[0].add_(1.0)
    assert not torch.allclose(compiled(x), ways[0][0], atol=1e-2)  # it reads the delta, no copy of it
    assert torch.allclose(compiled(x), layer(x), atol=1e-4)

    if axis == "column":
        continue
    codes, many = [], torch.randn(4, 100, 12, requires_grad=True)
    assert layer._folds(many, "default")  # a copy of the weight is the cheaper way here, but for a compiler
    kept = lambda graph, _: codes.append(graph.code) or graph
    traced = torch.compile(layer, fullgraph=True, dynamic=True, backend=kept)
    ways = [[y, *torch.autograd.grad((y**2).sum(), [many, *trained])] for y in (layer(many), traced(many))]
    assert all(torch.allclose(one, other, rtol=1e-4, atol=1e-3) for one, other in zip(*ways, strict=True))
    assert len(codes) == 1 and "scatter_add" in codes[0], codes
print("compiled")
"""


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on a CPU; there is no g++")
def test_compiled_equals_eager_forward_and_backward(tmp_path):
    """In a process of its own: the compiler leaves threads and caches behind, and the annotations stay unchecked."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", COMPILED], cwd=HOME, capture_output=True, text=True, check=False
    )
    assert done.stdout.strip() == "compiled", done.stderr[-2000:]


# Quantised bases


def wide() -> nn.Module:
    """A model whose widths can be quantised in blocks."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=40, **sizes)).eval()


def quantised_by_torchao(model: nn.Module) -> None:
    quantization = quietly("torchao.quantization")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quantization.quantize_(model, quantization.Int8WeightOnlyConfig())


def quantised_by_bitsandbytes(model: nn.Module) -> None:
    library = quietly("bitsandbytes")
    for block in model.model.layers:
        old = block.mlp.down_proj
        new = library.nn.Linear4bit(old.in_features, old.out_features, bias=False, compute_dtype=torch.float32)
        new.weight = library.nn.Params4bit(old.weight.data, requires_grad=False, quant_type="nf4")
        block.mlp.down_proj = new.to("cpu")


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("quantised", [quantised_by_torchao, quantised_by_bitsandbytes])
@pytest.mark.parametrize("unit", ["node", "neuron"])
def test_a_quantised_base_is_trained_beside_and_not_merged(quantised, unit, tmp_path, monkeypatch):
    monkeypatch.setattr(folding, "COPY_IN_TOKENS", 0)  # there is no plain weight to copy
    model, again = wide(), wide()
    quantised(model)
    quantised(again)
    base_logits = logits(model)
    assert not torch.allclose(base_logits, logits(wide()), atol=1e-6)  # it is quantised
    model = get_peft_model(model, LokiConfig(selection=ROWS, unit=unit))
    assert {weight.dtype for weight in model.parameters() if weight.requires_grad} == {torch.float32}
    assert torch.equal(logits(model), base_logits)
    train_adapter(model)
    assert not torch.allclose(logits(model), base_logits, atol=1e-4)
    with model.disable_adapter():
        assert torch.equal(logits(model), base_logits)
    with pytest.raises(ValueError, match="quantised or sharded weights cannot be merged exactly; load the base model"):
        model.merge_adapter()
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(again, tmp_path)
    assert same_bits(*({k: v for k, v in m.state_dict().items() if "loki_" in k} for m in (again, model)))
    assert torch.allclose(logits(again), logits(model), atol=1e-3)  # bitsandbytes repacks what was never trained


def train_adapter(model: nn.Module) -> None:
    optimiser = torch.optim.AdamW([weight for weight in model.parameters() if weight.requires_grad], lr=1e-2)
    for _ in range(3):
        model(input_ids=IDS, labels=IDS).loss.backward()
        optimiser.step()
        optimiser.zero_grad()


# Trainers


def arguments(kind: type, folder: Path, **more: object) -> object:
    return kind(
        output_dir=str(folder),
        max_steps=3,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        weight_decay=0.5,
        report_to=[],
        use_cpu=True,
        save_strategy="no",
        disable_tqdm=True,
        logging_steps=1,
        **more,
    )


def check_trained(model: nn.Module, before: dict, base_logits: torch.Tensor) -> None:
    """What was trained moved, everything else is the same to the bit, although the optimiser decays weights."""
    assert same_bits(plain(model), before)
    moved = {name.rpartition("loki_")[2] for name, p in model.named_parameters() if p.requires_grad and p.any()}
    assert moved == {"delta.default"}
    with model.disable_adapter():
        assert torch.equal(logits(model.eval()), base_logits)
    assert (logits(model) - base_logits).abs().max() > 1e-3


@pytest.mark.parametrize("unit", ["node", "neuron"])
def test_transformers_trainer_is_unchanged(unit, tmp_path):
    base = tiny()
    before, base_logits = plain(base), logits(base)
    model = get_peft_model(base, LokiConfig(selection=ROWS, unit=unit, task_type="CAUSAL_LM"))
    trainer = Trainer(model=model, args=arguments(TrainingArguments, tmp_path / "out"), train_dataset=Sentences())
    losses = [entry["loss"] for entry in trainer.train() and trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]
    check_trained(model, before, base_logits)
    trainer.save_model(str(tmp_path / "saved"))
    assert torch.allclose(logits(PeftModel.from_pretrained(tiny(), tmp_path / "saved")), logits(model), atol=1e-6)


def test_accelerate_is_unchanged(tmp_path):
    from accelerate import Accelerator

    base = tiny()
    before, base_logits = plain(base), logits(base)
    model = get_peft_model(base, LokiConfig(selection=ROWS))
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.5)
    loader = torch.utils.data.DataLoader(Sentences(), batch_size=1)
    prepared, optimiser, loader = accelerator.prepare(model, optimiser, loader)
    for _ in range(3):
        for batch in loader:
            with accelerator.accumulate(prepared):
                accelerator.backward(prepared(**batch).loss)
                optimiser.step()
                optimiser.zero_grad()
    unwrapped = accelerator.unwrap_model(prepared)
    check_trained(unwrapped, before, base_logits)
    assert any(isinstance(module, LokiLayer) for module in unwrapped.modules())


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning")
def test_trl_sft_trainer_is_unchanged(tmp_path):
    trl = quietly("trl")
    datasets = quietly("datasets")
    base = tiny()
    before, base_logits = plain(base), logits(base)
    texts = datasets.Dataset.from_list([{"text": "the capital of France is Paris"}] * 4)
    settings = arguments(trl.SFTConfig, tmp_path / "out", bf16=False, max_length=16)
    config = LokiConfig(selection=ROWS, task_type="CAUSAL_LM")
    trainer = trl.SFTTrainer(
        model=base, args=settings, train_dataset=texts, processing_class=tokenizer(), peft_config=config
    )
    trainer.train()
    assert isinstance(trainer.model, PeftModel)
    check_trained(trainer.model, before, base_logits)


def test_the_check_of_trainers_can_fail():
    base = tiny()
    before, base_logits = plain(base), logits(base)
    model = get_peft_model(base, LokiConfig(selection=ROWS))
    model.base_model.model.model.layers[0].mlp.down_proj.base_layer.requires_grad_(True)
    train(model)
    with pytest.raises(AssertionError):
        check_trained(model, before, base_logits)


# peft alone

READ = """
import sys
first, second, folder = sys.argv[1:]
__import__(first)
if first == "workbench":
    assert not {"peft", "torch"} & set(sys.modules)
    import importlib.util
    assert importlib.util.find_spec("peft")  # to look for it is not to import it
__import__(second)
from peft import PeftModel
from transformers import AutoModelForCausalLM
import workbench.announcing
assert not [one for one in sys.meta_path if type(one).__module__ == "workbench.announcing"]
model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder + "/base"), folder + "/adapter")
print(type(model.base_model).__name__)
"""


@pytest.mark.parametrize("order", [("workbench", "peft"), ("peft", "workbench")], ids=" then ".join)
def test_import_workbench_lets_peft_read_an_adapter_before_or_after(order, tmp_path):
    base = tiny()
    base.save_pretrained(tmp_path / "base")
    get_peft_model(base, LokiConfig(selection=ROWS)).save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    done = subprocess.run(
        [sys.executable, "-c", READ, *order, str(tmp_path)], capture_output=True, text=True, cwd=HOME, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "LokiModel"


def test_a_peft_that_fails_or_comes_half_is_left_alone(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "peft")
    announcing.announce()
    waiting = sys.meta_path[0]
    assert type(waiting).__module__ == "workbench.announcing"
    (tmp_path / "peft.py").write_text("raise ImportError('broken')\n")
    importlib.invalidate_caches()
    with pytest.raises(ImportError, match="broken"):
        importlib.import_module("peft")
    assert waiting in sys.meta_path
    (tmp_path / "peft.py").write_text("from workbench.announcing import announce\nannounce()\nwhole = True\n")
    monkeypatch.setattr(announcing, "import_module", lambda name: importlib.import_module("no_such_room"))
    assert importlib.import_module("peft").whole
    assert waiting not in sys.meta_path
    assert [one.getMessage() for one in caplog.records] == [
        "LoKI is not registered with peft: No module named 'no_such_room'"
    ]
    monkeypatch.delitem(sys.modules, "peft")
