"""The same game in shapiq, captum and shap, and their containers from our results."""

from __future__ import annotations

import captum.attr
import numpy as np
import shap
import shapiq
import torch

import flmoe_fast
from flmoe_fast.explainers.captum import ShapleyInteractions
from flmoe_fast.explainers.shap import shap_pair
from flmoe_fast.explainers.shapiq import ShapiqApproximator, ShapiqGame

torch.manual_seed(0)
network = torch.nn.Sequential(torch.nn.Linear(6, 16), torch.nn.Tanh(), torch.nn.Linear(16, 3)).eval()
inputs = torch.randn(1, 6)


@torch.no_grad()
def value(present: torch.Tensor) -> torch.Tensor:
    """Logit of class 1 when the features that are not present are zero."""
    return network(inputs * present)[:, 1]


exact = flmoe_fast.exact_interactions(value, n=6, progress=False)
print("exact SII of features 0 and 1:", exact.sii[0])

# shapiq: our game in its estimators, our estimator in its explainers.
theirs = shapiq.KernelSHAPIQ(n=6, index="SII", max_order=2, random_state=0).approximate(64, ShapiqGame(value, n=6))
explainer = shapiq.AgnosticExplainer(ShapiqGame(value, n=6), index="SII", approximator=ShapiqApproximator(6))
ours = explainer.explain(budget=2000)
print("shapiq's estimator:", theirs[(0, 1)], " ours in its explainer:", ours[(0, 1)])

# captum: the same numbers from fewer evaluations, and pairs.
torch.manual_seed(1)
attributed = captum.attr.ShapleyValueSampling(network).attribute(inputs, target=1, n_samples=50)
torch.manual_seed(1)
again = ShapleyInteractions(network).attribute(inputs, target=1, n_samples=50, perturbations_per_eval=32)
print("captum and ours differ by", float((attributed - again).abs().max()))
pair = ShapleyInteractions(network).interactions(inputs, target=1, pairs=[(0, 1)], contexts=200)
print("pair of features:", pair.sii[0], "+-", pair.sii_stderr[0])

# shap: a model and a masker.
model, masker = shap_pair(value, n=6)
explanation = shap.explainers.Exact(model, masker)(masker.everyone)
total = value(torch.ones(1, 6)) - value(torch.zeros(1, 6))
print("shap's values sum to", float(np.sum(explanation.values)), "=", float(total))
print("as shap.Explanation:", exact.to_shap().shape, " as shapiq.InteractionValues:", exact.to_shapiq()[(0, 1)])
