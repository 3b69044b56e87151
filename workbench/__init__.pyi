"""The public names, where each comes from, and with it their types."""

from .attribution import attribute as attribute
from .config import Config as Config, TrainConfig as TrainConfig
from .facts import (
    Fact as Fact,
    FactSet as FactSet,
    fictional as fictional,
    load_facts as load_facts,
    load_training_data as load_training_data,
)
from .filtering import filter_facts as filter_facts
from .finetuning import finetune as finetune
from .forgetting import benchmark as benchmark, measure_forgetting as measure_forgetting
from .interfere import interference as interference
from .learning import behaviour as behaviour, harm as harm, layer_advice as layer_advice, predicts as predicts
from .loki import LokiConfig as LokiConfig, adapter_config as adapter_config
from .models import HookedModel as HookedModel, load_model as load_model
from .neurons import knowledge_neurons as knowledge_neurons
from .pipeline import run as run
from .planning import plan as plan
from .recollection import recall as recall
from .reporting import publish as publish, report as report
from .results import RunDir as RunDir
from .selection import Selection as Selection, select as select
from .semantics import (
    attribute_drift as attribute_drift,
    measure_drift as measure_drift,
    semantic_distance as semantic_distance,
)
from .suppression import enhance as enhance, suppress as suppress
from .tracing import trace as trace
from .training import (
    DriftWatch as DriftWatch,
    export as export,
    implant as implant,
    search_learning_rate as search_learning_rate,
    semantic_loss as semantic_loss,
)
