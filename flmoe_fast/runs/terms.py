"""What the words of a report mean."""

from __future__ import annotations

from flmoe_fast.pipeline.show.html import Page

#: What words of the page mean, where they first appear.
MEANING = {
    "Expert": "one of the transformers that the mixture is made of. Each is trained to hold one kind of information: "
    "what one modality alone says (uniqueness), what only all together say (synergy), what each could say alone "
    "(redundancy).",
    "Routing weight": "how much the mixture listens to an expert for a sample; the weights of a sample add up to one.",
    "Following": "how much of the weights' variation lies between the classes rather than within them; shuffled labels "
    "show what chance does.",
    "Interaction loss": "what in training pushes each expert towards its kind of information.",
    "Logit": "an expert's score of a class before it is turned into a probability.",
    "Comprehensiveness": "how much is lost when the most important tokens of every modality are replaced.",
    "Sufficiency": "how much is lost when everything but the most important tokens is replaced.",
    "AOPC": "the drop averaged over the percentages of tokens; the gap compares with as many random tokens.",
    "Concentration": "whether few tokens hold most of an expert's importance: the share of its top tokens; the Gini "
    "coefficient is 0 for a flat map and almost 1 for a single token. Counted above the least important token.",
    "Specificity": "how much less two experts' rankings agree than two estimates of one expert's: 0 where experts say "
    "the same, 1 where they have nothing in common. Expert by expert: 1 is the same ranking, 0 none in common.",
    "Shapley interaction (SII)": "positive where two tokens are worth more together than the sum of what each adds "
    "(synergy, red), negative where one makes the other less needed (substitution, blue), zero where they add up.",
    "Redundancy gap": "how much it costs to lose both tokens where losing either one is cheap (ochre); the strict gap "
    "is positive only where each stands in for the other.",
    "Standard error (s.e.)": "how far an estimate is expected to be from what endless computing would give. Lines are "
    "the wider the larger the effect, and the fainter the fewer standard errors it is away from zero.",
    "Shapley value": "a token's fair share of what all tokens together change about the model's output.",
    "Importance": "attention and gradients, a quick guess at what matters; it chose the pairs that were probed.",
}


def explain_terms(page: Page, *terms: str) -> None:
    """Say what terms mean, where the page first uses them."""
    for term in terms:
        page.term(term, MEANING[term])
