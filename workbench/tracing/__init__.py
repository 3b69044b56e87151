"""Where along depth and text a fact is recovered: causal tracing, logit lens, direct logit attribution, agreement."""

from workbench.tracing.causal import checked_settings, trace
from workbench.tracing.direct import direct_logit_attribution
from workbench.tracing.lens import logit_lens
from workbench.tracing.spans import ROLES
from workbench.tracing.summaries import agreement, by_role, direct_by_layer, lens_by_layer, profiles, spearman

__all__ = [
    "ROLES",
    "agreement",
    "by_role",
    "checked_settings",
    "direct_by_layer",
    "direct_logit_attribution",
    "lens_by_layer",
    "logit_lens",
    "profiles",
    "spearman",
    "trace",
]
