"""What a run is told: plain settings with defaults that work, checked before anything starts; no torch here."""

import json
import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

#: How units can be selected by one quota.
STRATEGIES = "layer_balanced, layer_highest, global_lowest, global_highest, random, global_random or interference_aware"


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class AttributionConfig(_Section):
    """How the known facts are attributed."""

    method: str = Field("ig", description="attribution method: ig or grad_x_act")
    unit: Literal["node", "neuron"] | None = Field(
        None,
        description="node (rows of the down-projection) or neuron; here and below, when not given, the method's "
        "own choice, or else the first",
    )
    steps: int | None = Field(None, ge=1, description="points of the quadrature; refined to a tolerance when not given")
    rule: str | None = Field(None, description="quadrature rule: midpoint, left, right or trapezoid")
    baseline: str | None = Field(None, description="start of the path: zero or blank")
    scope: str | None = Field(None, description="positions that move: last or all")
    objective: str | None = Field(None, description="what is differentiated: logprob, prob, logit or margin")
    target: str | None = Field(None, description="gold (the fact's answer) or predicted")
    max_facts: int | None = Field(
        24, ge=2, description="attribute so many known facts, half of them at most, and so many new ones"
    )


class InterferenceConfig(_Section):
    """How it is measured that facts interfere."""

    metrics: tuple[str, ...] = Field(
        ("cosine", "jaccard"),
        description="measures: cosine, jaccard, superposition, gradient, linear_suppression, suppression",
    )
    top: float = Field(
        1.0, gt=0, le=100, description="top units of jaccard and the suppressions, in percent of a layer's"
    )
    draws: int = Field(1, ge=1, description="of random units for suppression; 19 judge its pairs, at 7 times the cost")
    harm: bool = Field(False, description="learn every attributed fact alone, and say which measure predicts its harm")


class SelectionConfig(_Section):
    """Which units are trained."""

    strategy: str = Field("layer_balanced", description=STRATEGIES)
    quota: float = Field(10.0, gt=0, lt=100, description="share of the units that is trained, in percent")
    score: Literal["signed", "magnitude"] = Field("magnitude", description="rank by score or by its absolute value")
    layers: tuple[Annotated[int, Field(strict=True, ge=0)], ...] | None = Field(
        None, min_length=1, description="only these layers; all when not given"
    )


class TrainConfig(_Section):
    """How facts are implanted; the same for every method, so that methods are compared at the same efficacy."""

    target_efficacy: float = Field(0.95, gt=0, le=1, description="stop when this share of the facts is answered")
    target_loss: float | None = Field(
        None, ge=0, description="stop by this loss (plain, mean of an epoch) instead; 0 is never"
    )
    max_epochs: int = Field(60, ge=1, description="give up after this many passes over the facts")
    batch_size: int = Field(16, ge=1, le=2**20, description="facts per optimiser step")
    learning_rate: float | None = Field(None, gt=0, description="AdamW's rate; the method's own default when not given")
    weight_decay: float = Field(0.01, ge=0, description="AdamW's weight decay")
    max_grad_norm: float = Field(1.0, gt=0, description="gradients are clipped to this norm")
    paraphrases: int = Field(0, ge=0, description="paraphrases of a fact that are trained too; the rest is held out")
    lora_rank: int = Field(16, ge=1, description="rank of the methods that have one, LoKI aside")
    seed: int = Field(0, strict=True, ge=0, lt=2**32, description="seed of initialisation and data order")
    loss: Literal["plain", "sample", "token", "soft"] = Field(
        "plain", description="cross-entropy; with sample or token weights by meaning; or with the semantic term"
    )
    beta: float = Field(1.0, description="sample: how much weight follows semantic distance")
    clip: float = Field(5.0, ge=1, description="sample: weights lie between 1/clip and clip")
    refresh: int = Field(20, ge=1, description="sample: weights are computed anew every so many steps")
    gamma: float = Field(1.0, ge=0, description="token: how much more a token weighs that is far from its target")
    soft_weight: float = Field(1.0, ge=0, description="soft: weight of the semantic distance beside cross-entropy")
    permuted: bool = Field(
        False, description="the control, drawn by seed: weights (sample, token) or meanings (soft) go to others"
    )

    @field_validator("permuted")
    @classmethod
    def _weights(cls, permuted: bool, info: Any) -> bool:
        if permuted and info.data.get("loss") == "plain":
            raise ValueError("the plain loss has nothing to permute: sample, token and soft have")
        return permuted


class EvaluationConfig(_Section):
    """What is read before and after."""

    general: str = Field("general", description="the shipped prose (general), or a text file, a passage a paragraph")
    max_retained: int | None = Field(80, ge=1, description="read so many of the other known facts at most")
    general_tokens: int = Field(1024, ge=64, description="read at most this many tokens of general text")


class Config(_Section):
    """The straight way: recall, attribute, interfere, advise, select, implant, drift and forgetting, report."""

    out: Path = Field(Path("runs/default"), description="the folder of the run")
    model: str = Field("smollm2-135m", description="default's name, folder of safetensors, .gguf file or hub id")
    device: str = Field("auto", description="auto, cpu, cuda, mps")
    dtype: str = Field("auto", description="auto, float32, bfloat16, float16")
    retained: str = Field("world", description="facts that the model may know: a shipped name or a file")
    implanted: str = Field("fictional:24", description="facts to be taught: a shipped name or a file")
    methods: tuple[str, ...] = Field(
        ("loki", "loki_random", "lora"), description="what is compared; none trains nothing"
    )
    seed: int = Field(0, strict=True, ge=0, lt=2**32, description="seed of everything that is drawn")
    attribution: AttributionConfig = AttributionConfig()
    interference: InterferenceConfig = InterferenceConfig()
    selection: SelectionConfig = SelectionConfig()
    training: TrainConfig = TrainConfig()
    evaluation: EvaluationConfig = EvaluationConfig()

    @field_validator("methods")
    @classmethod
    def _unique(cls, methods: tuple[str, ...]) -> tuple[str, ...]:
        if len(set(methods)) != len(methods):
            raise ValueError("methods must be a list of different names")
        return methods

    @classmethod
    def read(cls, path: str | Path | None = None, changes: dict[str, Any] | None = None) -> "Config":
        """Settings from a TOML or JSON file, with some changed; names are dotted, as in `training.seed`.

        >>> Config.read(changes={"training.seed": 3}).training.seed
        3
        """
        settings = _load(Path(path)) if path else {}
        changes = changes or {}
        for name in changes:
            if part := next((other for other in changes if other.startswith(f"{name}.")), None):
                raise ValueError(f"The settings {name!r} and {part!r} cannot both be changed: the one holds the other.")
        for name, value in changes.items():
            *sections, last = name.split(".")
            place = settings
            for section in sections:
                place = place.setdefault(section, {})
                if not isinstance(place, dict):
                    raise ValueError(f"The setting {section!r} must be a table of settings, got {place!r}.")
            place[last] = value
        try:
            return cls.model_validate(settings)
        except ValidationError as error:
            named = ".".join(map(str, error.errors()[0]["loc"]))
            own = any(name == named or named.startswith(f"{name}.") for name in changes)  # not the file's
            raise ValueError(one_sentence(error, None if own else path)) from None


def one_sentence(error: ValidationError, path: str | Path | None = None) -> str:
    """The first problem of a configuration in one sentence."""
    first = error.errors()[0]
    name = ".".join(map(str, first["loc"]))
    where = f" in {path}" if path else ""
    if first["type"] == "extra_forbidden":
        place: Any = Config
        for part in first["loc"][:-1]:
            place = place.model_fields[str(part)].annotation
        return f"There is no setting {name!r}{where}; known here: {', '.join(place.model_fields)}."
    message = first["msg"].removeprefix("Value error, ").replace("a valid tuple", "a list")
    return f"The setting {name!r}{where} does not fit: {message}, got {first['input']!r}."


def _load(path: Path) -> dict[str, Any]:
    """A TOML or JSON file as a dictionary, or one sentence."""
    if not path.is_file():
        raise FileNotFoundError(f"There is no configuration file {path}; run without one for the defaults.")
    try:
        text = path.read_text(encoding="utf-8-sig")
        settings = json.loads(text) if path.suffix == ".json" else tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"{path} cannot be read as {'JSON' if path.suffix == '.json' else 'TOML'}: {error}."
        ) from error
    if not isinstance(settings, dict):
        raise ValueError(f"{path} must hold a table of settings, not a {type(settings).__name__}.")
    return settings
