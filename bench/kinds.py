"""Kinds of games whose Shapley interactions are known, made from a seed: KINDS[name](seed) -> Known.

Estimators that were tuned on a few games win on those games. Here are many more that nobody tuned for: sums of
conjunctions and decision trees, products, maxima of heavy-tailed weights, votes, probabilities that saturate, a text
whose words negate each other, attention, logical functions of few players; from 8 to 500 players. Truth is in closed
form or by enumeration in float64; only of :class:`PairSigmoid` it is a long average, which has an error of its own.

A value function maps bool coalitions (C, n) to float64 values (C,). Games of at most 16 players are asked for all their
pairs, larger ones for 64 pairs of their busiest players.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from math import comb
from typing import Protocol

import numpy as np

Values = Callable[[np.ndarray], np.ndarray]
#: Players up to which a truth may be found by enumeration.
ENUMERABLE = 16
#: Contexts of the long average that stands for a truth, and how many are made at a time.
LONG, BLOCK = 2**18, 2**13


@dataclass(frozen=True)
class Known:
    """A game, the pairs asked for (P, 2), and their SII (P,) with the standard error of that truth (0: exact)."""

    n: int
    values: Values
    pairs: np.ndarray
    truth: np.ndarray
    truth_stderr: np.ndarray | float = 0.0


def all_pairs(n: int) -> np.ndarray:
    """Every pair i < j of n players, (P, 2)."""
    return np.stack(np.triu_indices(n, 1), axis=1)


def busy_pairs(busyness: np.ndarray) -> np.ndarray:
    """The 64 pairs (64, 2) of the eight busiest players of the lower half and the eight of the upper half."""
    half = len(busyness) // 2
    low = np.sort(np.argsort(-busyness[:half], kind="stable")[:8])
    high = half + np.sort(np.argsort(-busyness[half:], kind="stable")[:8])
    return np.stack(np.meshgrid(low, high, indexing="ij"), axis=-1).reshape(-1, 2)


def every_coalition(n: int) -> np.ndarray:
    """All coalitions (2^n, n); bit p of the row's number is player p."""
    return (np.arange(2**n)[:, None] >> np.arange(n) & 1).astype(bool)


def by_enumeration(values: np.ndarray, pairs: np.ndarray) -> np.ndarray:
    """SII (P,) of the pairs from the values of every coalition (2^n,)."""
    n = len(values).bit_length() - 1
    rows = np.arange(2**n)
    sizes = every_coalition(n).sum(1)
    share = np.array([1 / ((n - 1) * comb(n - 2, s)) for s in range(n - 1)])
    found = []
    for i, j in pairs.tolist():
        without = rows[(rows >> i & 1 == 0) & (rows >> j & 1 == 0)]
        both, one, other = (values[without | bits] for bits in (1 << i | 1 << j, 1 << i, 1 << j))
        found.append(share[sizes[without]] @ (both - one - other + values[without]))
    return np.array(found)


def enumerated(n: int, values: Values) -> Known:
    """A game of few players with all its pairs."""
    pairs = all_pairs(n)
    return Known(n, values, pairs, by_enumeration(values(every_coalition(n)), pairs))


def along_the_diagonal(integrand: Callable[[np.ndarray], np.ndarray], degree: int) -> np.ndarray:
    """Integral over u in [0, 1] of a polynomial in u of at most that degree; ``integrand`` maps (U,) to (..., U)."""
    nodes, weights = np.polynomial.legendre.leggauss(degree // 2 + 1)
    return integrand((nodes + 1) / 2) @ weights / 2


# Families with a closed form


class Closed(Protocol):
    """A game that knows its SII, and how much each player has to do with others."""

    def __call__(self, coalitions: np.ndarray) -> np.ndarray: ...

    def sii(self, pairs: np.ndarray) -> np.ndarray: ...

    def busyness(self) -> np.ndarray: ...


def known(game: Closed, pairs: np.ndarray | None = None) -> Known:
    """Such a game, asked for the pairs given or those of its busiest players."""
    strength = game.busyness()
    pairs = busy_pairs(strength) if pairs is None else pairs
    return Known(len(strength), game, pairs, game.sii(pairs))


@dataclass(frozen=True)
class Conjunctions:
    """A sum of terms, each worth its weight where all its members are present and all its absentees are absent.

    Unanimity games have no absentees; a leaf of a decision tree is a term whose literals are the splits on its path.
    """

    members: np.ndarray  # (T, n) bool
    absentees: np.ndarray  # (T, n) bool
    weights: np.ndarray  # (T,)

    def __call__(self, coalitions: np.ndarray) -> np.ndarray:
        rows = coalitions.astype(np.float32)  # counts up to 2^24 are exact
        met = rows @ self.members.T.astype(np.float32) == self.members.sum(1)
        met &= rows @ self.absentees.T.astype(np.float32) == 0
        return met @ self.weights

    def sii(self, pairs: np.ndarray) -> np.ndarray:
        """A term of a + b literals is u^a (1 - u)^b along the diagonal; two derivatives give Beta integrals."""
        here, gone = self.members.sum(1), self.absentees.sum(1)
        sign = self.members.astype(np.int8) - self.absentees.astype(np.int8)
        found = []
        for i, j in pairs.tolist():
            terms = np.flatnonzero(sign[:, i] * sign[:, j])
            product = sign[terms, i].astype(float) * sign[terms, j]
            a = here[terms] - self.members[terms, i] - self.members[terms, j]
            b = gone[terms] - self.absentees[terms, i] - self.absentees[terms, j]
            beta = [1 / ((x + y + 1) * comb(x + y, x)) for x, y in zip(a.tolist(), b.tolist())]
            found.append(float(np.sum(self.weights[terms] * product * np.array(beta))))
        return np.array(found)

    def busyness(self) -> np.ndarray:
        """Weight of the terms that a player is in, (n,)."""
        return np.abs(self.weights) @ (self.members | self.absentees)


@dataclass(frozen=True)
class Product:
    """offset + scale prod_k (1 + factors[k] x_k): noisy-OR, exponentials, parities."""

    factors: np.ndarray  # (n,)
    scale: float = 1.0
    offset: float = 0.0

    def __call__(self, coalitions: np.ndarray) -> np.ndarray:
        return self.offset + self.scale * np.prod(np.where(coalitions, 1 + self.factors, 1.0), axis=1)

    def sii(self, pairs: np.ndarray) -> np.ndarray:
        """scale a_i a_j times the integral of the product of 1 + u a_k over the others."""
        n = len(self.factors)

        def others(u: np.ndarray) -> np.ndarray:
            each = 1 + self.factors[:, None] * u
            return np.stack([np.prod(np.delete(each, pair, axis=0), axis=0) for pair in pairs])

        return self.scale * self.factors[pairs].prod(1) * along_the_diagonal(others, n - 2)

    def busyness(self) -> np.ndarray:
        """(n,)."""
        return np.abs(self.factors)


@dataclass(frozen=True)
class Maximum:
    """The largest weight that is present, 0 of nothing; weights are positive."""

    weights: np.ndarray  # (n,)

    def __call__(self, coalitions: np.ndarray) -> np.ndarray:
        return np.where(coalitions, self.weights, 0.0).max(axis=1, initial=0.0)

    def sii(self, pairs: np.ndarray) -> np.ndarray:
        """A sum of ORs of the heaviest t players; an OR of t gives -1 / (t - 1) to each of its pairs."""
        order = np.argsort(-self.weights, kind="stable")
        rank = np.empty(len(order), dtype=int)
        rank[order] = np.arange(len(order))
        steps = self.weights[order] - np.append(self.weights[order][1:], 0.0)
        t = np.arange(1, len(order) + 1)
        tail = np.cumsum((steps / np.maximum(t - 1, 1))[::-1])[::-1]  # from the heaviest t upwards in t
        return -tail[rank[pairs].max(1)]

    def busyness(self) -> np.ndarray:
        """(n,)."""
        return self.weights


@dataclass(frozen=True)
class Vote:
    """1 where the votes that are present reach the quota."""

    votes: np.ndarray  # (n,) whole numbers
    quota: int

    def __call__(self, coalitions: np.ndarray) -> np.ndarray:
        return (coalitions @ self.votes >= self.quota).astype(np.float64)

    def sii(self, pairs: np.ndarray) -> np.ndarray:
        """By counting the coalitions of the others by size and votes."""
        n, total = len(self.votes), int(self.votes.sum())
        share = np.array([1 / ((n - 1) * comb(n - 2, s)) for s in range(n - 1)])
        reached = np.arange(total + 1)
        found = []
        for i, j in pairs.tolist():
            counts = np.zeros((n - 1, total + 1))
            counts[0, 0] = 1
            for votes in np.delete(self.votes, (i, j)).tolist():
                counts[1:, votes:] += counts[:-1, : total + 1 - votes].copy()
            one, other = int(self.votes[i]), int(self.votes[j])
            passes = [(reached + more >= self.quota).astype(float) for more in (one + other, one, other, 0)]
            found.append(share @ (counts @ (passes[0] - passes[1] - passes[2] + passes[3])))
        return np.array(found)

    def busyness(self) -> np.ndarray:
        """(n,)."""
        return self.votes


# Families without


@dataclass(frozen=True)
class PairSigmoid:
    """A probability: the sigmoid of a quadratic form of the players' signs (+1 present, -1 absent)."""

    single: np.ndarray  # (n,)
    couple: np.ndarray  # (n, n), symmetric, zero diagonal

    def __call__(self, coalitions: np.ndarray) -> np.ndarray:
        signs = 2.0 * coalitions - 1
        return sigmoid(signs @ self.single + ((signs @ self.couple) * signs).sum(1) / 2)

    def long_average(self, pairs: np.ndarray, seed: int, contexts: int = LONG) -> tuple[np.ndarray, np.ndarray]:
        """SII (P,) and its standard error from second differences at contexts of one Bernoulli(u), u stratified.

        A context and its complement are one unit of the standard error; that the strata make it smaller is left out.
        """
        rng = np.random.default_rng([seed, 1])
        i, j = pairs.T
        total, squares = np.zeros(len(pairs)), np.zeros(len(pairs))
        units = contexts // 2
        for start in range(0, units, BLOCK):
            strata = np.arange(start, min(start + BLOCK, units))
            u = (strata + rng.random(len(strata))) / units
            drawn = rng.random((len(strata), len(self.single))) < u[:, None]
            means = (self._second_differences(drawn, i, j) + self._second_differences(~drawn, i, j)) / 2
            total += means.sum(0)
            squares += (means**2).sum(0)
        mean = total / units
        return mean, np.sqrt((squares / units - mean**2) / (units - 1))

    def _second_differences(self, coalitions: np.ndarray, i: np.ndarray, j: np.ndarray) -> np.ndarray:
        """(C, P): of each pair with everybody else as in the coalition."""
        signs = 2.0 * coalitions - 1
        pull = signs @ self.couple
        level = signs @ self.single + (pull * signs).sum(1) / 2
        mutual = self.couple[i, j]
        of_i = self.single[i] + pull[:, i] - mutual * signs[:, j]
        of_j = self.single[j] + pull[:, j] - mutual * signs[:, i]
        rest = level[:, None] - of_i * signs[:, i] - of_j * signs[:, j] - mutual * signs[:, i] * signs[:, j]
        corner = {(a, b): sigmoid(rest + a * of_i + b * of_j + a * b * mutual) for a in (1, -1) for b in (1, -1)}
        return corner[1, 1] - corner[1, -1] - corner[-1, 1] + corner[-1, -1]


def sigmoid(x: np.ndarray) -> np.ndarray:
    """1 / (1 + e^-x), without overflow."""
    return 0.5 * (1 + np.tanh(0.5 * x))


# The kinds, each from a seed


def soum(seed: int, n: int, terms: int, smallest: int = 1, largest: int = 5, heavy: bool = False) -> Known:
    """Unanimity games of random members; heavy weights are Pareto of shape 1.2 with random signs."""
    rng = np.random.default_rng(seed)
    members = np.zeros((terms, n), dtype=bool)
    for row in members:
        row[rng.choice(n, rng.integers(smallest, largest + 1), replace=False)] = True
    weights = rng.choice([-1, 1], terms) * rng.pareto(1.2, terms) if heavy else rng.uniform(-1, 1, terms)
    return known(Conjunctions(members, np.zeros_like(members), weights))


def sparse_high_order(seed: int, n: int = 20, terms: int = 12) -> Known:
    """Few conjunctions of five to nine players, some of whom have to be absent."""
    rng = np.random.default_rng(seed)
    sign = np.zeros((terms, n), dtype=int)
    for row in sign:
        some = rng.choice(n, rng.integers(5, 10), replace=False)
        row[some] = rng.choice([1, 1, -1], len(some))
    return known(Conjunctions(sign == 1, sign == -1, rng.normal(size=terms)))


def boosted_trees(seed: int, n: int, trees: int = 60, depth: int = 5) -> Conjunctions:
    """A boosted regression on random data: a player who is absent has the value of another data point."""
    from sklearn.ensemble import GradientBoostingRegressor

    rng = np.random.default_rng(seed)
    data = rng.normal(size=(600, n))
    first, second, third = (data[:, rng.permutation(n)[:6]] for _ in range(3))
    target = (first * second).sum(1) + np.abs(third).sum(1) + np.sin(2 * first * third).sum(1)
    model = GradientBoostingRegressor(n_estimators=trees, max_depth=depth, subsample=0.7, random_state=seed)
    model.fit(data, target)
    there, instead = data[0].astype(np.float32), data[1].astype(np.float32)
    literals: list[np.ndarray] = []
    weights: list[float] = []

    def walk(tree, node: int, path: np.ndarray) -> None:
        if tree.children_left[node] < 0:
            literals.append(path)
            weights.append(model.learning_rate * float(tree.value[node].item()))
            return
        player, threshold = int(tree.feature[node]), tree.threshold[node]
        for side, child in ((True, tree.children_left[node]), (False, tree.children_right[node])):
            met = {+1: (there[player] <= threshold) == side, -1: (instead[player] <= threshold) == side}
            if path[player]:
                ways = [int(path[player])] if met[int(path[player])] else []
            else:
                ways = [0] if met[1] and met[-1] else [way for way in (1, -1) if met[way]]
            for way in ways:
                step = path.copy()
                step[player] = way or path[player]
                walk(tree, int(child), step)

    for (stage,) in model.estimators_:
        walk(stage.tree_, 0, np.zeros(n, dtype=int))
    table = np.stack(literals)
    return Conjunctions(table == 1, table == -1, np.array(weights))


def boosting(seed: int, n: int = 30) -> Known:
    """Boosted trees; a leaf's path is a conjunction, so that the truth is a sum over leaves."""
    return known(boosted_trees(seed, n))


def boosting_probability(seed: int, n: int = 14) -> Known:
    """Their probability, which saturates."""
    trees = boosted_trees(seed, n)
    values = trees(every_coalition(n))
    centre, spread = np.median(values), values.std()
    return enumerated(n, lambda rows: sigmoid(4 * (trees(rows) - centre) / spread))


def noisy_or(seed: int, n: int) -> Known:
    """Something happens unless every cause that is present fails."""
    rng = np.random.default_rng(seed)
    return known(Product(-rng.beta(1.0, 12.0, n), scale=-1.0, offset=1.0))


def product(seed: int, n: int = 60) -> Known:
    """Factors around one, on either side of it."""
    return known(Product(np.random.default_rng(seed).normal(0, 0.25, n)))


def exponential(seed: int, n: int = 40) -> Known:
    """The exponential of a sum: a few coalitions are worth much more than all others."""
    rng = np.random.default_rng(seed)
    gain = np.abs(rng.normal(0, 0.35, n))
    return known(Product(np.expm1(gain), scale=float(np.exp(-gain.sum()))))


def heaviest(seed: int, n: int = 24) -> Known:
    """Maximum of Pareto weights."""
    return known(Maximum(1 + np.random.default_rng(seed).pareto(1.5, n)))


def vote(seed: int, n: int = 30) -> Known:
    """Three fifths of the votes, of which few players have most; of about equal ones all interactions would vanish."""
    votes = 1 + np.minimum(np.random.default_rng(seed).pareto(0.5, n) * 4, 600).astype(int)
    return known(Vote(votes, int(0.6 * votes.sum())))


def conjunction(seed: int, n: int = 10, size: int = 4) -> Known:
    """AND of few players."""
    members = np.zeros((1, n), dtype=bool)
    members[0, np.random.default_rng(seed).choice(n, size, replace=False)] = True
    return known(Conjunctions(members, np.zeros_like(members), np.ones(1)), all_pairs(n))


def parity(seed: int, n: int = 12, size: int = 4) -> Known:
    """XOR of few players."""
    factors = np.zeros(n)
    factors[np.random.default_rng(seed).choice(n, size, replace=False)] = -2.0
    return known(Product(factors, scale=-0.5, offset=0.5), all_pairs(n))


def pair_sigmoid(seed: int, n: int) -> Known:
    """Probabilities from singles and pairs."""
    rng = np.random.default_rng(seed)
    single = rng.normal(0, 1.5 / n**0.5, n)
    couple = np.triu(rng.normal(size=(n, n)) * (rng.random((n, n)) < 8 / n), 1)
    couple *= 1.5 / np.sqrt((couple**2).sum())
    game = PairSigmoid(single, couple + couple.T)
    pairs = busy_pairs(np.abs(game.couple).sum(1))
    return Known(n, game, pairs, *game.long_average(pairs, seed))


def saturated(seed: int, n: int = 16) -> Known:
    """Probabilities that are near 0 or 1 almost everywhere."""
    rng = np.random.default_rng(seed)
    couple = np.triu(rng.normal(0, 8.0 / n, (n, n)), 1)
    return enumerated(n, PairSigmoid(rng.normal(0, 8.0 / n**0.5, n), couple + couple.T))


def masked_text(seed: int, n: int = 14) -> Known:
    """The mood of a sentence: words weighted by salience, some of which turn or strengthen the two that follow.

    The mean is over the words that are present, so that few words say much; the empty sentence is neutral.
    """
    rng = np.random.default_rng(seed)
    mood = rng.standard_t(2.5, n)
    salience = np.exp(rng.normal(0, 1.0, n))
    turn = np.ones(n)
    turn[rng.choice(n, 5, replace=False)] = [-1.0, -0.7, -0.7, 1.8, 1.8]

    def values(rows: np.ndarray) -> np.ndarray:
        said = np.broadcast_to(mood, rows.shape).copy()
        for gap in (1, 2):
            said[:, gap:] *= np.where(rows[:, :-gap], turn[:-gap], 1.0)
        weights = rows * salience
        return np.tanh(1.5 * (weights * said).sum(1) / (weights.sum(1) + 0.1))

    return enumerated(n, values)


def attention(seed: int, n: int = 16, width: int = 12, layers: int = 2) -> Known:
    """A random transformer's probability of its class; absent tokens are replaced by their mean."""
    rng = np.random.default_rng(seed)
    tokens, places = rng.normal(size=(n, width)), 0.5 * rng.normal(size=(n, width))
    weights = rng.normal(0, 1.6 / width**0.5, (layers, 5, width, width))
    head = rng.normal(0, 2.0 / width**0.5, (width, 4))

    def logits(rows: np.ndarray) -> np.ndarray:
        x = np.where(rows[:, :, None], tokens, tokens.mean(0)) + places
        for query, key, value, up, down in weights:
            y = (x - x.mean(2, keepdims=True)) / x.std(2, keepdims=True)
            scores = (y @ query) @ (y @ key).transpose(0, 2, 1) / width**0.5
            scores = np.exp(scores - scores.max(2, keepdims=True))
            x = x + scores / scores.sum(2, keepdims=True) @ (y @ value)
            x = x + np.maximum(x @ up, 0) @ down
        x = x.mean(1)
        return (x / np.sqrt((x**2).mean(1, keepdims=True))) @ head

    wanted = int(logits(np.ones((1, n), dtype=bool)).argmax())

    def values(rows: np.ndarray) -> np.ndarray:
        parts = [logits(block) for block in np.array_split(rows, -(-len(rows) // 4096))]
        found = np.concatenate(parts)
        found = np.exp(found - found.max(1, keepdims=True))
        return found[:, wanted] / found.sum(1)

    return enumerated(n, values)


# Controls


def nothing(seed: int, n: int = 24) -> Known:
    """A game worth the same whoever is present."""
    pairs = busy_pairs(np.ones(n))
    return Known(n, lambda rows: np.full(len(rows), 0.3), pairs, np.zeros(len(pairs)))


def additive(seed: int, n: int = 24) -> Known:
    """Every player adds its own weight."""
    weights = np.random.default_rng(seed).normal(size=n)
    pairs = busy_pairs(np.abs(weights))
    return Known(n, lambda rows: rows @ weights, pairs, np.zeros(len(pairs)))


def planted_pair(seed: int, n: int = 500) -> Known:
    """Additive players, and one pair of them with a bonus; asked for all pairs."""
    rng = np.random.default_rng(seed)
    weights = rng.normal(size=n) / n**0.5
    i, j = np.sort(rng.choice(n, 2, replace=False)).tolist()
    pairs = all_pairs(n)
    truth = ((pairs[:, 0] == i) & (pairs[:, 1] == j)).astype(float)
    return Known(n, lambda rows: rows @ weights + (rows[:, i] & rows[:, j]), pairs, truth)


KINDS: dict[str, Callable[[int], Known]] = {
    "AND of 4 among 10": conjunction,
    "XOR of 4 among 12": parity,
    "boosting, probability, 14": boosting_probability,
    "masked text 14": masked_text,
    "attention 16": attention,
    "saturated probability 16": saturated,
    "sparse high order 20": sparse_high_order,
    "maximum of Pareto weights 24": heaviest,
    "boosting 30": boosting,
    "heavy-tailed SOUM 30": partial(soum, n=30, terms=150, smallest=2, heavy=True),
    "weighted vote 30": vote,
    "exponential 40": exponential,
    "noisy-OR 40": partial(noisy_or, n=40),
    "sigmoid of pairs 40": partial(pair_sigmoid, n=40),
    "SOUM 48": partial(soum, n=48, terms=300),
    "product 60": product,
    "noisy-OR 200": partial(noisy_or, n=200),
    "sigmoid of pairs 200": partial(pair_sigmoid, n=200),
    "SOUM 200": partial(soum, n=200, terms=1000),
    "SOUM 500": partial(soum, n=500, terms=2000),
}
CONTROLS: dict[str, Callable[[int], Known]] = {"null": nothing, "additive": additive, "planted pair 500": planted_pair}
